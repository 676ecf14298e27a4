// The size of linear_cross_entropy or linear_nll, from which a device knows how many rows of logits it takes at a time;
// and the rule for a CUDA device, which is here and not in csrc/cuda because linear_cross_entropy_plan tells it in a
// build without CUDA too. That for the CPU is in cpu/drivers/linear_cross_entropy.h: it asks the GEMM for its scratch.
#pragma once
#include <algorithm>
#include <optional>

#include "shared/types.h"

namespace rf {

struct LinearCrossEntropySize {
  DType dtype;
  int64_t rows, features, classes, positions;  // positions: of a K-dimensional loss, else 1
  int64_t panels = 1;                          // as large as a chunk's logits: they, and what is widened beside them
  std::optional<int64_t> memory_budget;        // bytes; without it the CPU's default, where chunks fit its caches too
};

// ---- on a CUDA device ----------------------------------------------------------------------------------------------

// Part of the device's memory that a call takes by default. All of it counts, not what is free: the chunks decide the
// order of sums, whose bits are not to depend on what else runs. 2.5 GiB of 80 are 10000 rows of 131072 half-precision
// classes, 0.75 GiB of 24 are 3000; dW's sum, which each chunk reads and writes, takes as long as the products of 850.
constexpr int64_t kCudaShareOfMemory = 32;
inline int64_t cuda_default_memory_budget(int64_t device_memory) { return device_memory / kCudaShareOfMemory; }

// Rows are a multiple of what a tile of the products has.
constexpr int64_t kCudaChunkRows = 128;

// The logits, of the input's type, in the accumulator's each further panel; and six numbers per loss.
inline int64_t cuda_bytes_per_row(const LinearCrossEntropySize& s) {
  const int64_t wide = acc_size(s.dtype);
  return s.positions * (s.classes * (size_of(s.dtype) + (s.panels - 1) * wide) + 6 * wide);
}

// Equal chunks that fit the budget, of at least kCudaChunkRows rows; one if all rows fit.
inline int64_t cuda_chunk_rows(const LinearCrossEntropySize& s) {
  const int64_t most = s.memory_budget.value() / std::max<int64_t>(1, cuda_bytes_per_row(s));
  if (s.rows <= most) return std::max<int64_t>(1, s.rows);
  const int64_t chunks = ceil_div(s.rows, std::max<int64_t>(1, most / kCudaChunkRows) * kCudaChunkRows);
  return std::min(s.rows, round_up(ceil_div(s.rows, chunks), kCudaChunkRows));
}

// Bytes of a call with all gradients, besides inputs, results, gradients and the products' workspaces.
inline int64_t cuda_peak_bytes(const LinearCrossEntropySize& s) { return cuda_chunk_rows(s) * cuda_bytes_per_row(s); }

// The least budget whose chunks have so many rows.
inline int64_t cuda_budget_for_chunk(const LinearCrossEntropySize& s, int64_t rows) {
  return round_up(std::max<int64_t>(1, rows), kCudaChunkRows) * cuda_bytes_per_row(s);
}

}  // namespace rf
