// How a matrix is divided among blocks of which each adds up columns: a thread has a vector of them, in rows blockDim.y
// apart of a part of the rows, and the threads of a vector add their sums at the end (reduce_columns).
#pragma once
#include <algorithm>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/tuning.h"

namespace rf::cuda {

struct Division {
  int64_t lanes, panels, parts, part_rows;  // lanes: a block's vectors of columns, a power of two

  dim3 grid() const { return dim3((unsigned)panels, (unsigned)parts); }
  dim3 block() const { return dim3((unsigned)lanes, (unsigned)(tuning::kElementwiseThreads / lanes)); }
};

inline Division divide(int64_t element_size, int64_t rows, int64_t columns) {
  const int64_t vectors = ceil_div(columns, 16 / element_size);
  Division d;
  d.lanes = tuning::power_of_two(2 * vectors - 1, 1, kWarp);
  d.panels = ceil_div(vectors, d.lanes);
  const int64_t thread_rows = tuning::kElementwiseThreads / d.lanes;
  const int64_t wanted = ceil_div((int64_t)device().sms * tuning::kColumnSumBlocksPerSm, d.panels);
  const int64_t most = ceil_div(rows, thread_rows * tuning::kColumnSumLeastRows);
  d.parts = std::max<int64_t>(1, std::min({wanted, most, (int64_t)tuning::kColumnSumMostParts}));
  d.part_rows = ceil_div(rows, d.parts);
  return d;
}

}  // namespace rf::cuda
