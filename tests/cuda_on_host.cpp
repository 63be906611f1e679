// CUDA's libraries as far as TVM's runtime calls them, with kernels that run on the processor.
//
// Compiled twice: with RUNTIME as libcudart.so.13, without as libcuda.so.1. "Machine code" is the
// path of a shared library that cuda_on_host.h was compiled into.
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef RUNTIME

extern "C" {
int cudaDeviceGetAttribute(int* v, int which, int) {
  *v = which == 75 ? 9 : which == 10 ? 32 : 0;  // major number; threads of a warp
  if (which == 1) *v = 1024;                    // threads of a block
  return 0;
}
int cudaMalloc(void** p, size_t n) {
  n = (n + 255) / 256 * 256;
  *p = aligned_alloc(256, n);
  memset(*p, 0xff, n);  // NaN: nothing may count on zeros
  return 0;
}
int cudaMallocHost(void** p, size_t n) { return cudaMalloc(p, n); }
int cudaFree(void* p) { free(p); return 0; }
int cudaFreeHost(void* p) { free(p); return 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t n, int, void*) { memcpy(to, from, n); return 0; }
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, void*) { memcpy(to, from, n); return 0; }
int cudaGetDevice(int* d) { *d = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
int cudaMemGetInfo(size_t* a, size_t* b) { *a = *b = 1 << 30; return 0; }
int cudaStreamCreate(void** s) { *s = s; return 0; }
int cudaStreamCreateWithFlags(void** s, unsigned) { *s = s; return 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorName(int) { return "cuda_on_host"; }
const char* cudaGetErrorString(int) { return "cuda_on_host"; }
// What no test calls.
int cudaGetDeviceProperties(void*, int) { abort(); }
int cudaEventCreate(void*) { abort(); }
int cudaEventDestroy(void*) { abort(); }
int cudaEventElapsedTime(float*, void*, void*) { abort(); }
int cudaEventRecord(void*, void*) { abort(); }
int cudaEventSynchronize(void*) { abort(); }
int cudaGraphDestroy(void*) { abort(); }
int cudaGraphExecDestroy(void*) { abort(); }
int cudaGraphInstantiate(void*, void*, unsigned long long) { abort(); }
int cudaGraphLaunch(void*, void*) { abort(); }
int cudaStreamBeginCapture(void*, int) { abort(); }
int cudaStreamEndCapture(void*, void*) { abort(); }
}

#else

#include <dlfcn.h>

struct Launch {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};
struct Kernel {
  void (*run)(void*, int, const unsigned*, const unsigned*, void**);
  void* function;
  int arguments;
};

extern "C" {
int cuModuleLoadData(void** module, const void* data) {
  *module = dlopen(static_cast<const char*>(data), RTLD_NOW);
  return *module ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** kernel, void* module, const char* name) {
  void* function = dlsym(module, name);
  void* count = dlsym(module, (std::string(name) + "_arguments").c_str());
  if (!function || !count) return 500;
  auto* k = new Kernel{nullptr, function, *static_cast<int*>(count)};
  *reinterpret_cast<void**>(&k->run) = dlsym(module, "run_kernel");
  *kernel = k;
  return 0;
}
int cuLaunchKernelEx(const Launch* l, void* kernel, void** arguments, void**) {
  for (int i = 0; i < 3; i++) if (!l->grid[i] || !l->block[i]) return 1;
  auto* k = static_cast<Kernel*>(kernel);
  k->run(k->function, k->arguments, l->grid, l->block, arguments);
  return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuDeviceGetName(char* s, int n, int) { strncpy(s, "cuda_on_host", n); return 0; }
int cuGetErrorName(int, const char** s) { *s = "cuda_on_host"; return 0; }
int cuGetErrorString(int, const char** s) { *s = "cuda_on_host"; return 0; }
int cuTensorMapEncodeTiled() { abort(); }
}

#endif
