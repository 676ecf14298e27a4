// How linear_cross_entropy is divided into chunks of rows, and the memory that it takes. No torch.
#pragma once
#include "shared/types.h"

namespace rf {

struct LinearCrossEntropySize {
  DType dtype;
  int64_t rows, features, classes, positions;  // positions: of a K-dimensional loss, else 1
  int64_t panels = 1;                          // as large as a chunk's logits: they, and what is widened beside them
  int64_t memory_budget;                       // bytes
};
// 32 MiB for each core of the machine, 1 GiB at most.
int64_t default_memory_budget();
// Equal chunks that fit the budget, of at least kLeastChunkRows rows.
int64_t chunk_rows(const LinearCrossEntropySize& size);
// Bytes of a call with all gradients, besides inputs, results and gradients.
int64_t peak_bytes(const LinearCrossEntropySize& size);
// Entries that are multiplied one by one if a chunk has no more of them (kSparseShare): then that is faster.
int64_t most_sparse_entries(int64_t rows, int64_t outputs);
// The least budget whose chunks have so many rows.
int64_t budget_for_chunk(const LinearCrossEntropySize& size, int64_t rows);

}  // namespace rf
