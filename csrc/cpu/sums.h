// Sums that ATen would divide among threads, and so round otherwise for each number of them.
#pragma once
#include "../torch_api.h"

namespace rf {

// Of a few chains of additions each, for each block of so many numbers; the blocks in order.
inline double ordered_sum(const double* x, int64_t n) {
  constexpr int64_t kBlock = 1024, kLanes = 8;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    double lanes[kLanes] = {};
    for (int64_t i = begin; i < end; ++i) lanes[i % kLanes] += x[i];
    for (int64_t i = kLanes / 2; i > 0; i /= 2)
      for (int64_t l = 0; l < i; ++l) lanes[l] += lanes[l + i];
    total += lanes[0];
  }
  return total;
}
inline double ordered_sum(const Tensor& t) {
  const Tensor wide = t.to(at::kDouble).contiguous();
  return ordered_sum(wide.const_data_ptr<double>(), wide.numel());
}

}  // namespace rf
