// CUDA's kernels compiled by a C++ compiler: threads of a block take turns, each with a stack of its
// own, and change at barriers and shuffles. A block that cannot go on ends the process.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __launch_bounds__(...)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
template <typename T> T max(T a, T b) { return a > b ? a : b; }
template <typename T> T min(T a, T b) { return a < b ? a : b; }

namespace host {
enum State { RUNS, AT_BARRIER, AT_SHUFFLE, DONE };
struct Thread { ucontext_t context; State state; float given, kept; int kind; };
struct Index { unsigned x, y, z; };
static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned current;
static void* function;
static uint64_t arguments[24];

static void leave(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}
}  // namespace host

static host::Index threadIdx, blockIdx;

static void __syncthreads() { host::leave(host::AT_BARRIER); }
static void __syncwarp() {}
static unsigned __activemask() { return 0xffffffffu; }
static float exchange(float value, unsigned from, int kind) {
  host::threads[host::current].given = value;
  host::threads[host::current].kind = kind;
  host::leave(host::AT_SHUFFLE);
  return host::threads[(host::current & ~31u) | from].kept;
}
static float __shfl_xor_sync(unsigned, float value, int mask, int) {
  return exchange(value, (host::current & 31u) ^ mask, mask);
}
static float __shfl_down_sync(unsigned, float value, int step, int) {
  const unsigned lane = (host::current & 31u);
  return exchange(value, lane + step < 32 ? lane + step : lane, 32 + step);
}
static float __shfl_sync(unsigned, float value, int lane, int) {
  return exchange(value, lane, 64 + lane);
}

namespace host {
static void call() {
  using F = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
  uint64_t* a = arguments;  // pointers and whole numbers: what is too much is not looked at
  reinterpret_cast<F>(function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                                a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19],
                                a[20], a[21], a[22], a[23]);
  leave(DONE);
}

static void fail(const char* why) {
  fprintf(stderr, "cuda_on_host: %s\n", why);
  abort();
}

static void block(const unsigned* size) {
  const unsigned count = threads.size();
  for (;;) {
    bool moved = false;
    unsigned waiting = 0, done = 0;
    for (unsigned t = 0; t < count; t++) {
      if (threads[t].state != RUNS) continue;
      current = t;
      threadIdx = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      swapcontext(&scheduler, &threads[t].context);
      moved = true;
    }
    for (unsigned w = 0; w < count; w += 32) {
      unsigned here = 0;
      for (unsigned t = w; t < w + 32 && t < count; t++) {
        here += threads[t].state == AT_SHUFFLE && threads[t].kind == threads[w].kind;
        waiting += threads[t].state == AT_BARRIER;
        done += threads[t].state == DONE;
      }
      if (here < 32) continue;
      for (unsigned t = w; t < w + 32; t++) {
        threads[t].kept = threads[t].given;
        threads[t].state = RUNS;
      }
      moved = true;
    }
    if (done == count) return;
    if (moved) continue;
    if (waiting < count) fail("threads wait for some that never come");
    for (auto& t : threads) t.state = RUNS;
  }
}
}  // namespace host

extern "C" void run_kernel(void* function, int count, const unsigned* grid, const unsigned* size,
                           void** given) {
  using namespace host;
  const size_t stack = 32768, many = size[0] * size[1] * size[2];
  static std::vector<char> stacks;
  if (count > 24) fail("too many arguments");
  if (stacks.size() < many * stack) stacks.resize(many * stack);
  host::function = function;
  for (int i = 0; i < count; i++) memcpy(&arguments[i], given[i], 8);
  threads.resize(many);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        for (size_t t = 0; t < many; t++) {
          getcontext(&threads[t].context);
          threads[t].context.uc_stack = {&stacks[t * stack], 0, stack};
          threads[t].state = RUNS;
          makecontext(&threads[t].context, call, 0);
        }
        block(size);
      }
}
