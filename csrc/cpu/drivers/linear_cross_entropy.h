// How linear_cross_entropy is divided into chunks of rows on the CPU, and the memory that it takes.
#pragma once
#include "shared/chunks.h"

namespace rf {

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
