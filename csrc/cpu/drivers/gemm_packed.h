// The engine for products of any size, and what the ways for small ones share with it.
#pragma once
#include "cpu/drivers/drivers.h"

namespace rf {

inline DType c_type(DType operands, const Gemm& g) { return g.wide_c ? acc_dtype(operands) : operands; }

// The kernels for pairs of bf16, if they multiply this product, or null.
const PairKernels* pair_kernels(DType dtype, const Gemm& g);

// Whether rows come from memory and are shorter than what its prefetchers follow side by side.
bool short_and_far(int64_t row_bytes, int64_t rows);

// On at most so many threads. The bits of C do not depend on how many.
void gemm_packed(DType dtype, const Gemm& g, int64_t threads);
// What that takes of scratch memory, all threads together.
int64_t gemm_scratch_bytes(DType dtype, const Gemm& g, int64_t threads);

}  // namespace rf
