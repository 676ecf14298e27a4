// The engine for products of any size, and what the ways for small ones share with it.
#pragma once
#include "cpu/drivers/drivers.h"

namespace rf {

inline DType c_type(DType operands, const GemmProblem& g) { return g.wide_c ? acc_dtype(operands) : operands; }

// Without a place for sums that wait.
inline Epilogue epilogue_of(const GemmProblem& g) {
  return {.c = g.c,
          .c_stride = g.c_stride,
          .bias = g.bias,
          .activation = g.activation,
          .preactivation = g.preactivation,
          .bias_rows = g.bias_rows,
          .bias_stride = g.bias_stride};
}

// The kernels for pairs of bf16, if they multiply this product, or null.
const PairKernels* pair_kernels(DType dtype, const GemmProblem& g);

// Whether rows come from memory and are shorter than what its prefetchers follow side by side.
bool short_and_far(int64_t row_bytes, int64_t rows);

// On at most so many threads. The bits of C do not depend on how many.
void gemm_packed(DType dtype, const GemmProblem& g, int64_t threads);
// What that takes of scratch memory, all threads together.
int64_t gemm_scratch_bytes(DType dtype, const GemmProblem& g, int64_t threads);

}  // namespace rf
