// The CPU as the ops of csrc/shared see a device: memory for results, products, activations.
#pragma once
#include "cpu/drivers/drivers.h"
#include "cpu/ops/outputs.h"
#include "shared/product.h"

namespace rf {

inline std::string isa_in_use(const Tensor&) { return kernels().isa; }

struct Cpu {
  explicit Cpu(const Tensor&) {}

  Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const { return empty_result(sizes, options); }
  Tensor empty_like(const Tensor& t) const { return empty_result_like(t); }

  const char* why_aten(const ProductSize& p) const {
    return p.wide ? nullptr : gemm_by_aten(dtype_of(p.type), p.m, p.n, p.k, p.a_across);
  }
  bool fused_by_aten(DType, Activation) const { return false; }
  void gemm(DType dtype, const GemmProblem& p) const { rf::gemm(dtype, p); }

  void activate(const Tensor& z, const Tensor& y, Activation activation) const {
    activation_forward(dtype_of(z.scalar_type()), z.const_data_ptr(), y.mutable_data_ptr(), z.numel(), activation);
  }
  // Rows of the upstream gradient are adjacent, or made so: an expanded scalar is the one case in practice.
  Tensor readable_rows(const Tensor& grad) const {
    return grad.stride(-1) == 1 || grad.size(-1) == 1 ? as_strided_rows(grad, grad.dim() - 1) : grad.contiguous();
  }
  Tensor activation_backward(const Tensor& like, const ActivationBackward& p, int64_t rows, bool column_sums) const {
    const auto type = like.scalar_type();
    const Tensor sums = empty_result({column_sums ? p.columns : 0}, like.options().dtype(acc_type(type)));
    rf::activation_backward(dtype_of(type), {p, column_sums ? sums.mutable_data_ptr() : nullptr}, rows);
    return sums.to(type);
  }
};

}  // namespace rf
