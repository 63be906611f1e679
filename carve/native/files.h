// Files that may come from anywhere: regular ones, inside the model's folder, with the manifest's
// SHA-256.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace carve {

// The model's folder cannot be used.
struct BadModel : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The model is sound, and cannot serve this request.
struct BadRequest : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A regular file's bytes, mapped for reading.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    // Nothing waits for a pipe's other end.
    int handle = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (handle < 0) throw BadModel(path + " cannot be read: " + std::strerror(errno));
    bool sound = fstat(handle, &stat_) == 0 && S_ISREG(stat_.st_mode);
    if (sound && stat_.st_size > 0) {
      size_ = static_cast<size_t>(stat_.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, handle, 0);
    }
    close(handle);
    if (!sound) throw BadModel(path + " is not a regular file");
    if (data_ == MAP_FAILED) throw BadModel(path + " cannot be mapped: " + std::strerror(errno));
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() {
    if (data_ != nullptr && data_ != MAP_FAILED) munmap(data_, size_);
  }

  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

  // Whether the name still leads to this file, and nobody has written to it.
  bool is_still(const std::string& path) const {
    struct stat now;
    return stat(path.c_str(), &now) == 0 && now.st_dev == stat_.st_dev &&
           now.st_ino == stat_.st_ino && now.st_size == stat_.st_size &&
           now.st_mtim.tv_sec == stat_.st_mtim.tv_sec &&
           now.st_mtim.tv_nsec == stat_.st_mtim.tv_nsec;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  struct stat stat_ {};
};

// Every link followed.
inline std::string resolved(const std::string& path) {
  char* found = realpath(path.c_str(), nullptr);
  if (found == nullptr) throw BadModel(path + " is missing or unreadable");
  std::string result(found);
  std::free(found);
  return result;
}

// A plain relative path below `root` (resolved), which no link may lead out of.
inline std::string inside(const std::string& root, const std::string& path) {
  std::string part;
  for (size_t at = 0; at <= path.size(); ++at) {
    char c = at < path.size() ? path[at] : '/';
    if (static_cast<unsigned char>(c) < 32 || c == '\\' || c == ':')
      throw BadModel("the model names a file that is no plain relative path");
    if (c != '/') {
      part += c;
      continue;
    }
    if (part.empty() || part == "." || part == "..")
      throw BadModel("the model names a file that is no plain relative path");
    part.clear();
  }
  std::string found = resolved(root + "/" + path);
  std::string below = root == "/" ? root : root + "/";
  if (found.compare(0, below.size(), below) != 0)
    throw BadModel(root + "/" + path + " is a link to outside the model's folder");
  return found;
}

// FIPS 180-4, in lowercase hexadecimal.
inline std::string sha256(std::string_view data) {
  static constexpr std::array<uint32_t, 64> k = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
      0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
      0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
      0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
      0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
      0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
      0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
      0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
      0xc67178f2};
  std::array<uint32_t, 8> h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  auto turn = [](uint32_t x, int n) { return (x >> n) | (x << (32 - n)); };
  auto block = [&](const unsigned char* p) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i)
      w[i] = uint32_t(p[4 * i]) << 24 | uint32_t(p[4 * i + 1]) << 16 |
             uint32_t(p[4 * i + 2]) << 8 | uint32_t(p[4 * i + 3]);
    for (int i = 16; i < 64; ++i) {
      uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ (a >> 3)) + w[i - 7] +
             (turn(b, 17) ^ turn(b, 19) ^ (b >> 10));
    }
    std::array<uint32_t, 8> s = h;
    for (int i = 0; i < 64; ++i) {
      uint32_t e = s[4], a = s[0];
      uint32_t t = s[7] + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) +
                   ((e & s[5]) ^ (~e & s[6])) + k[i] + w[i];
      uint32_t u = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) +
                   ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
      s = {t + u, s[0], s[1], s[2], s[3] + t, s[4], s[5], s[6]};
    }
    for (int i = 0; i < 8; ++i) h[i] += s[i];
  };
  const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
  size_t whole = data.size() / 64 * 64, rest = data.size() - whole;
  for (size_t at = 0; at < whole; at += 64) block(bytes + at);
  unsigned char last[128] = {};
  if (rest) std::memcpy(last, bytes + whole, rest);
  last[rest] = 0x80;
  size_t end = rest < 56 ? 64 : 128;
  for (int i = 0; i < 8; ++i) last[end - 1 - i] = uint64_t(data.size()) * 8 >> (8 * i);
  for (size_t at = 0; at < end; at += 64) block(last + at);
  std::string text;
  for (uint32_t word : h)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  return text;
}

}  // namespace carve
