// What takes the place of torch's own kernels while accelerate(products=True) lasts: products of matrices, and what
// ATen computes by products of its own, which are slow for half types on CPUs without instructions for them.
#pragma once
#include <torch/library.h>

#include <optional>

#include "cpu/drivers/drivers.h"
#include "shared/product.h"
#include "shared/trace.h"

namespace rf {

inline bool is_slow_half(const Tensor& t) {
  const auto type = t.scalar_type();
  return t.is_cpu() && t.layout() == at::kStrided && at::isReducedFloatingType(type) && has_kernel(type) &&
         !large_gemm_by_aten(dtype_of(type));
}

// c = a b, or c += a b, for each pair of matrices; c's rows are adjacent numbers. Of the factors and c each may be wide
// as in multiply.
void multiply_batches(const Tensor& a, const Tensor& b, const Tensor& c, Sum sum = Sum::none);

// On record while somebody listens.
class Record {
 public:
  Record(const char* op, const trace::Tensors& tensors) {
    if (trace::on()) record.emplace(op, tensors, kernels().isa);
  }

 private:
  std::optional<trace::Kernels> record;
};

void take_convolutions(torch::Library& kernels);
void take_attention(torch::Library& kernels);

}  // namespace rf
