// What a layer's backward does before its products: the activation's derivative and the bias's gradient, in one pass.
#pragma once
#include "cpu/drivers/drivers.h"
#include "cpu/ops/outputs.h"
#include "shared/layouts.h"

namespace rf {

struct ActivationGradient {
  Tensor dz, column_sums;  // contiguous unless it is `grad` itself; empty where not wanted
};
inline ActivationGradient activation_gradient(const Tensor& grad, const OptionalTensor& saved, Activation activation,
                                              bool column_sums) {
  if (activation == Activation::none && !column_sums) return {grad, at::empty({0}, grad.options())};
  const int64_t n = grad.size(-1);
  // Rows of the upstream gradient are adjacent, or made so: an expanded scalar is the one case in practice.
  const Tensor g = grad.stride(-1) == 1 || n == 1 ? as_strided_rows(grad, grad.dim() - 1) : grad.contiguous();
  const Tensor s = saved.has_value() ? saved->contiguous() : Tensor();
  const Tensor sums = at::empty({column_sums ? n : 0}, grad.options().dtype(acc_type(grad.scalar_type())));
  const Tensor dz = activation != Activation::none ? empty_result(grad.sizes(), grad.options()) : g;
  activation_backward(dtype_of(grad.scalar_type()),
                      {{g.const_data_ptr(), s.defined() ? s.const_data_ptr() : nullptr, *row_layout(g, g.dim() - 1),
                        activation != Activation::none ? dz.mutable_data_ptr() : nullptr, n, activation},
                       column_sums ? sums.mutable_data_ptr() : nullptr},
                      rows_of(grad));
  return {dz, sums.to(grad.scalar_type())};
}

}  // namespace rf
