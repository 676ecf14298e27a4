// The engine for products of any size, and what the ways for small ones share with it.
#pragma once
#include "drivers.h"

namespace rf {

constexpr int64_t acc_size(DType t) { return t == DType::f64 ? 8 : 4; }
inline DType c_type(DType operands, const Gemm& g) {
  return g.wide_c && operands != DType::f64 ? DType::f32 : operands;
}

// Bytes; of L2 what one core has.
struct Caches {
  int64_t l2, last;
};
const Caches& caches();

// On at most so many threads. The bits of C do not depend on how many.
void gemm_packed(DType dtype, const Gemm& g, int64_t threads);

}  // namespace rf
