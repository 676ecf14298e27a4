// The sizes of linear_cross_entropy's chunks and of the memory they take.
#include "cpu/drivers/linear_cross_entropy.h"

#include <algorithm>
#include <thread>

#include "cpu/drivers/gemm_packed.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/compensated_sum.h"

namespace rf {
namespace {

// Of a chunk, each row's logits, features gathered and their gradient before it is spread again, and statistics.
int64_t bytes_per_row(const LinearCrossEntropySize& s) {
  return acc_size(s.dtype) * (s.panels * s.classes * s.positions + 2 * s.features + 5 * s.positions);
}

// Of the machine, not the threads in use: the chunks decide the order of sums, whose bits are the same with any number.
int64_t cores() {
  static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

// What a chunk takes that does not grow with each row: the products' packed operands and the bias's sums.
int64_t engine_bytes(const LinearCrossEntropySize& s, int64_t rows) {
  const int64_t outputs = s.classes * s.positions;
  // Only the layouts matter: x and w by rows, the panel by rows.
  const MatrixView x = {nullptr, 1, s.features, 0, 1}, panel = {nullptr, 1, outputs, 0, 1};
  const GemmProblem
      logits = {.m = rows, .n = outputs, .k = s.features, .a = x, .b = x, .b_transposed = true, .wide_c = true},
      dx = {.m = rows, .n = s.features, .k = outputs, .a = panel, .b = x, .wide_a = true, .wide_c = true},
      dw = {.m = outputs,
            .n = s.features,
            .k = rows,
            .a = panel,
            .a_transposed = true,
            .b = x,
            .wide_a = true,
            .wide_c = true,
            .accumulate = true};
  int64_t most = 0;
  if (rows > 0 && outputs > 0 && s.features > 0)
    for (const GemmProblem* g : {&logits, &dx, &dw}) most = std::max(most, gemm_scratch_bytes(s.dtype, *g, cores()));
  return most + outputs * (acc_size(s.dtype) + (int64_t)sizeof(CompensatedSum));
}

// Rows that stay in a core's cache from one product to the next, where the weight and its gradient do not ask for more.
int64_t cached_rows(const LinearCrossEntropySize& s) {
  const int64_t outputs = s.classes * s.positions, wide = acc_size(s.dtype);
  if (outputs * s.features * wide > tuning::kCachedWeightBytes) return INT64_MAX;
  return tuning::kCachedChunkBytes / (s.features * size_of(s.dtype) + s.panels * outputs * wide + 1);
}

}  // namespace

int64_t default_memory_budget() { return std::min(cores() * tuning::kCoreBudget, tuning::kMostBudget); }

int64_t chunk_rows(const LinearCrossEntropySize& s) {
  constexpr int64_t step = tuning::kLeastChunkRows;
  const int64_t budget = s.memory_budget.value_or(default_memory_budget());
  // The most steps that fit the budget; one does, or has to.
  int64_t fits = 1, too_many = ceil_div(std::max<int64_t>(1, s.rows), step) + 1;
  while (too_many - fits > 1) {
    const int64_t middle = fits + (too_many - fits) / 2;
    (budget_for_chunk(s, middle * step) <= budget ? fits : too_many) = middle;
  }
  if (!s.memory_budget) fits = std::min(fits, std::max<int64_t>(1, cached_rows(s) / step));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(s.rows, fits * step));
  return std::max<int64_t>(1, std::min(s.rows, round_up(ceil_div(s.rows, chunks), step)));
}

int64_t peak_bytes(const LinearCrossEntropySize& s) {
  const int64_t rows = chunk_rows(s);
  return rows * bytes_per_row(s) + engine_bytes(s, rows);
}

int64_t most_sparse_entries(int64_t rows, int64_t outputs) {
  if (outputs > INT32_MAX) return -1;
  return (int64_t)(tuning::kSparseShare * (double)rows * (double)outputs);
}

int64_t budget_for_chunk(const LinearCrossEntropySize& s, int64_t rows) {
  const int64_t whole = round_up(std::max<int64_t>(1, rows), tuning::kLeastChunkRows);
  return whole * bytes_per_row(s) + engine_bytes(s, whole);
}

}  // namespace rf
