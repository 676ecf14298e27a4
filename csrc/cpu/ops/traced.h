// What the CPU's ops tell of their calls.
#pragma once
#include "cpu/drivers/drivers.h"
#include "shared/torch_api.h"

namespace rf {

inline std::string isa_in_use(const Tensor&) { return kernels().isa; }

// Whether ATen multiplies: the answer of gemm_by_aten, which the caller then follows.
inline bool product_by_aten(at::ScalarType type, int64_t m, int64_t n, int64_t k) {
  const char* const why = gemm_by_aten(dtype_of(type), m, n, k);
  if (why && trace::on()) trace::product_by_aten(type, m, n, k, why);
  return why;
}

}  // namespace rf
