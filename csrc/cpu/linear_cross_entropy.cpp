// The sizes of linear_cross_entropy's chunks and of the memory they take.
#include "linear_cross_entropy.h"

#include <algorithm>
#include <thread>

#include "gemm_packed.h"
#include "parallel.h"
#include "tuning.h"

namespace rf {
namespace {

// Of a chunk, each row's logits, features gathered and their gradient before it is spread again, and statistics.
int64_t bytes_per_row(const LinearCrossEntropySize& s) {
  return acc_size(s.dtype) * (s.panels * s.classes * s.positions + 2 * s.features + 5 * s.positions);
}

int64_t for_chunks(int64_t budget) { return budget - budget / tuning::kEngineShare; }

}  // namespace

int64_t default_memory_budget() {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::min(cores * tuning::kCoreBudget, tuning::kMostBudget);
}

int64_t chunk_rows(const LinearCrossEntropySize& s) {
  const int64_t fit = for_chunks(s.memory_budget) / std::max<int64_t>(1, bytes_per_row(s));
  const int64_t most = std::max(fit / tuning::kLeastChunkRows, int64_t(1)) * tuning::kLeastChunkRows;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(s.rows, most));
  return std::max<int64_t>(1, std::min(s.rows, round_up(ceil_div(s.rows, chunks), tuning::kLeastChunkRows)));
}

int64_t peak_bytes(const LinearCrossEntropySize& s) {
  const int64_t rows = chunk_rows(s), outputs = s.classes * s.positions;
  // Only the layouts matter: x and w by rows, the panel by rows.
  const MatrixView x = {nullptr, 1, s.features, 0, 1}, panel = {nullptr, 1, outputs, 0, 1};
  Gemm logits = {rows, outputs, s.features, x, false, x, true, {}}, dx = {rows, s.features, outputs, panel, false, x, false, {}},
       dw = {outputs, s.features, rows, panel, true, x, false, {}};
  for (Gemm* g : {&logits, &dx, &dw}) g->wide_c = true;
  dx.wide_a = dw.wide_a = dw.accumulate = true;
  int64_t engine = 0;
  for (const Gemm* g : {&logits, &dx, &dw}) engine = std::max(engine, gemm_scratch_bytes(s.dtype, *g, thread_count()));
  return rows * bytes_per_row(s) + engine + outputs * acc_size(s.dtype);  // the bias's sums
}

int64_t most_sparse_entries(int64_t rows, int64_t outputs) {
  if (outputs > INT32_MAX) return -1;
  return (int64_t)(tuning::kSparseShare * (double)rows * (double)outputs);
}

int64_t budget_for_chunk(LinearCrossEntropySize s, int64_t rows) {
  const int64_t wanted = round_up(std::max<int64_t>(1, rows), tuning::kLeastChunkRows) * bytes_per_row(s);
  return ceil_div(wanted * tuning::kEngineShare, tuning::kEngineShare - 1) + tuning::kEngineShare;
}

}  // namespace rf
