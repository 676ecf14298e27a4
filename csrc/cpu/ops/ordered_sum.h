// Sums that ATen would divide among threads, and so round otherwise for each number of them.
#pragma once
#include "shared/compensated_sum.h"
#include "shared/torch_api.h"

namespace rf {

// In a few chains of compensated additions, so that one does not wait for the other.
inline double ordered_sum(const double* x, int64_t n) {
  constexpr int64_t kLanes = 4;
  CompensatedSum lanes[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l].add(x[i + l]);
  for (; i < n; ++i) lanes[0].add(x[i]);
  for (int64_t l = 1; l < kLanes; ++l) lanes[0].add(lanes[l]);
  return lanes[0].value();
}
inline double ordered_sum(const Tensor& t) {
  const Tensor wide = t.to(at::kDouble).contiguous();
  return ordered_sum(wide.const_data_ptr<double>(), wide.numel());
}

}  // namespace rf
