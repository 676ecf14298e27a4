// linear on the CPU: tensors to plain structs and allocation; products are regfast's or ATen's.
#include "shared/torch_api.h"

#include "cpu/drivers/drivers.h"
#include "cpu/ops/activation_gradient.h"
#include "cpu/ops/outputs.h"
#include "cpu/ops/traced.h"
#include "cpu/tuning.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

// A tensor whose elements lie apart in both directions, as the kernels that read it where it lies want it: copied once,
// where a few dot products of its rows take less time than to gather it, and always where gathering also widens.
// Short rows are gathered by the tiles whose lanes they become.
Tensor gathered(const Tensor& t, int64_t other_side) {
  if (t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1) return t;
  if (t.dim() == 2 && t.stride(0) == 1)  // transposed: kernels have ways of their own, but for few rows beside many
    return t.size(0) <= tuning::kFewRows && other_side > tuning::kSkinny ? t.contiguous() : t;
  const bool half = size_of(dtype_of(t.scalar_type())) != acc_size(dtype_of(t.scalar_type()));
  const bool few = other_side <= tuning::kSkinny || rows_of(t) <= tuning::kFewRows;
  return half || (few && t.size(-1) > tuning::kFewSides) ? t.contiguous() : t;
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  const Activation act = check_linear_forward(x, w, bias, activation);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const DType dtype = dtype_of(x.scalar_type());
  if (product_by_aten(x.scalar_type(), rows_of(x), w.size(0), w.size(1))) {
    Tensor z = at::linear(x, w, bias);
    if (act == Activation::none) return {z, at::empty({0}, x.options())};
    Tensor y = save_preactivation ? empty_result(sizes, x.options()) : z;
    activation_forward(dtype, z.const_data_ptr(), y.mutable_data_ptr(), z.numel(), act);
    return {y, save_preactivation ? z : at::empty({0}, x.options())};
  }
  Tensor y = empty_result(sizes, x.options());
  Tensor z = save_preactivation ? empty_result(sizes, x.options()) : at::empty({0}, x.options());
  if (y.numel() == 0) return {y, z};
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const Operand a = operand(gathered(x, w.size(0))), weight = operand(gathered(w, rows_of(x)));
  gemm(dtype, {.m = rows_of(x),
               .n = w.size(0),
               .k = w.size(1),
               .a = a.view,
               .a_transposed = false,
               .b = weight.view,
               .b_transposed = true,
               .epilogue = {.c = y.mutable_data_ptr(),
                            .c_stride = w.size(0),
                            .bias = b.defined() ? b.const_data_ptr() : nullptr,
                            .activation = act,
                            .preactivation = save_preactivation ? z.mutable_data_ptr() : nullptr}});
  return {y, z};
}

// input is needed for the weight's gradient, weight for the input's.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   string_view activation_name, std::array<bool, 3> mask) {
  const Activation activation = check_linear_backward(grad, input, weight, saved, activation_name, mask);
  const DType dtype = dtype_of(grad.scalar_type());
  const int64_t m = rows_of(grad), n = grad.size(-1);
  const auto none = [&] { return at::empty({0}, grad.options()); };

  const ActivationGradient of = activation_gradient(grad, saved, activation, mask[2]);
  const Tensor &dz = of.dz, &db = of.column_sums;
  const auto product = [&](int64_t rows, int64_t columns, int64_t inner, bool dz_transposed, const Tensor& other,
                           at::IntArrayRef sizes) {
    if (product_by_aten(grad.scalar_type(), rows, columns, inner)) {
      const Tensor left = dz.reshape({m, n}), right = other.reshape({inner, columns});
      return at::mm(dz_transposed ? left.t() : left, right).view(sizes);
    }
    Tensor c = empty_result(sizes, grad.options());
    const Operand left = operand(dz), right = operand(gathered(other, rows));
    gemm(dtype, {.m = rows,
                 .n = columns,
                 .k = inner,
                 .a = left.view,
                 .a_transposed = dz_transposed,
                 .b = right.view,
                 .b_transposed = false,
                 .epilogue = {.c = c.mutable_data_ptr(), .c_stride = columns}});
    return c;
  };
  Tensor dx = none(), dw = none();
  if (mask[0]) {
    auto sizes = grad.sizes().vec();
    sizes.back() = weight->size(1);
    dx = product(m, weight->size(1), n, false, *weight, sizes);
  }
  if (mask[1]) dw = product(n, input->size(-1), m, true, *input, {n, input->size(-1)});
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<linear_forward>(m, "linear_forward", isa_in_use);
  register_kernels<linear_backward>(m, "linear_backward", isa_in_use);
}

}  // namespace rf
