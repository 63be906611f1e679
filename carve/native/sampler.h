// Choose the next token from logits, as carve_runtime.sampling does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "files.h"

namespace carve {

// Greedy where the temperature is 0 (the lowest id on a tie), else restricted by top-k, then by
// top-p. The draws of a seed are this program's own, not numpy's.
class Sampler {
 public:
  Sampler(double temperature, int64_t top_k, double top_p, uint64_t seed)
      : temperature_(temperature), top_k_(top_k), top_p_(top_p), random_(seed) {
    if (!(std::isfinite(temperature) && temperature >= 0))
      throw BadRequest("temperature must be finite and >= 0");
    if (top_k < 0) throw BadRequest("top-k must be >= 0");
    if (!(top_p > 0 && top_p <= 1)) throw BadRequest("top-p must be in (0, 1]");
  }

  int64_t operator()(const float* logits, size_t count) {
    size_t best = 0;
    for (size_t i = 0; i < count; ++i) {
      if (std::isnan(logits[i])) throw std::runtime_error("the model's logits are not finite");
      if (logits[i] > logits[best]) best = i;
    }
    if (!std::isfinite(logits[best])) throw std::runtime_error("the model's logits are not finite");
    if (temperature_ == 0) return static_cast<int64_t>(best);
    std::vector<uint32_t> ids(count);
    std::iota(ids.begin(), ids.end(), 0);
    auto likelier = [&](uint32_t a, uint32_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    if (top_k_ > 0 && static_cast<size_t>(top_k_) < count) {
      std::nth_element(ids.begin(), ids.begin() + top_k_, ids.end(), likelier);
      ids.resize(top_k_);
    }
    std::sort(ids.begin(), ids.end(), likelier);
    std::vector<double> sums(ids.size());
    double total = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      total += std::exp((double(logits[ids[i]]) - double(logits[best])) / temperature_);
      sums[i] = total;
    }
    // As many as reach top-p of the whole.
    size_t keep = std::lower_bound(sums.begin(), sums.end(), top_p_ * total) - sums.begin();
    double last = sums[std::min(keep, sums.size() - 1)];
    double drawn = static_cast<double>(random_() >> 11) * 0x1p-53 * last;
    size_t found = std::upper_bound(sums.begin(), sums.end(), drawn) - sums.begin();
    return ids[std::min(found, std::min(keep, sums.size() - 1))];
  }

 private:
  double temperature_;
  int64_t top_k_;
  double top_p_;
  std::mt19937_64 random_;
};

}  // namespace carve
