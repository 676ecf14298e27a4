// linear for every device: tensors to plain structs and allocation; products are regfast's or ATen's. Device has,
// beside what product.h asks for, memory for results, the passes of an activation, whether ATen's product applies one,
// and `gathered`: what of an operand that its GEMM reads where it lies is better copied before.
#pragma once
#include "shared/op_checks.h"
#include "shared/product.h"

namespace rf {

// What went into an activation has this gradient, the activation's result having `grad`, whose column sums, a layer's
// bias's gradient, are made in the same pass where they are wanted.
struct ActivationGradient {
  Tensor dz, column_sums;  // dz: contiguous unless it is `grad` itself; empty where not wanted
};
template <class Device>
ActivationGradient activation_gradient(const Device& device, const Tensor& grad, const OptionalTensor& saved,
                                       Activation activation, bool column_sums) {
  const bool derives = activation != Activation::none;
  if (!derives && !column_sums) return {grad, device.empty({0}, grad.options())};
  const Tensor g = device.readable_rows(grad), s = saved.has_value() ? saved->contiguous() : Tensor();
  const Tensor dz = derives ? device.empty(grad.sizes(), grad.options()) : g;
  const ActivationBackward p = {.grad = g.const_data_ptr(),
                                .saved = data_or_null(s),
                                .grad_layout = *row_layout(g, g.dim() - 1),
                                .output = derives ? dz.mutable_data_ptr() : nullptr,
                                .columns = grad.size(-1),
                                .activation = activation};
  return {dz, device.activation_backward(grad, p, rows_of(grad), column_sums)};
}

template <class Device>
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  const Activation act = check_linear_forward(x, w, bias, activation);
  const Device device(x);
  const int64_t m = rows_of(x), n = w.size(0), k = w.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  const auto new_result = [&](bool wanted) {
    return wanted ? device.empty(sizes, x.options()) : device.empty({0}, x.options());
  };
  if (by_aten(device, {x.scalar_type(), m, n, k})) {
    // What is kept for gelu_tanh's derivative is the pre-activation, which the epilogue does not leave.
    if (bias.has_value() && x.numel() > 0 && !save_preactivation &&
        device.fused_by_aten(dtype_of(x.scalar_type()), act)) {
      const bool gelu = act == Activation::gelu_tanh;
      return {at::_addmm_activation(*bias, x.reshape({m, k}), w.t(), 1, 1, gelu).view(sizes), new_result(false)};
    }
    Tensor z = at::linear(x, w, bias);
    if (act == Activation::none) return {z, new_result(false)};
    z = z.contiguous();
    Tensor y = save_preactivation ? new_result(true) : z;
    device.activate(z, y, act);
    return {y, save_preactivation ? z : new_result(false)};
  }
  Tensor y = new_result(true), z = new_result(save_preactivation);
  if (y.numel() == 0) return {y, z};
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const Operand left = operand(device.gathered(x, n)), right = operand(device.gathered(w, m));
  device.gemm(dtype_of(x.scalar_type()), {.m = m,
                                          .n = n,
                                          .k = k,
                                          .a = left.view,
                                          .a_transposed = false,
                                          .b = right.view,
                                          .b_transposed = true,
                                          .c = y.mutable_data_ptr(),
                                          .c_stride = n,
                                          .bias = data_or_null(b),
                                          .activation = act,
                                          .preactivation = save_preactivation ? z.mutable_data_ptr() : nullptr});
  return {y, z};
}

// input is needed for the weight's gradient, weight for the input's.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   string_view activation_name, std::array<bool, 3> mask) {
  const Activation activation = check_linear_backward(grad, input, weight, saved, activation_name, mask);
  const Device device(grad);
  const int64_t m = rows_of(grad), n = grad.size(-1);
  const auto [dz, db] = activation_gradient(device, grad, saved, activation, mask[2]);
  // dz, or its transpose, times another tensor by rows.
  const auto product = [&, &dz = dz](bool transposed, const Tensor& other, at::IntArrayRef sizes) {
    const int64_t rows = transposed ? n : m, columns = other.size(-1), inner = transposed ? m : n;
    if (by_aten(device, {grad.scalar_type(), rows, columns, inner})) {
      const Tensor left = dz.reshape({m, n}), right = other.reshape({inner, columns});
      return at::mm(transposed ? left.t() : left, right).view(sizes);
    }
    Tensor c = device.empty(sizes, grad.options());
    if (c.numel() == 0) return c;
    const Operand left = operand(dz), right = operand(device.gathered(other, rows));
    device.gemm(dtype_of(grad.scalar_type()), {.m = rows,
                                               .n = columns,
                                               .k = inner,
                                               .a = left.view,
                                               .a_transposed = transposed,
                                               .b = right.view,
                                               .b_transposed = false,
                                               .c = c.mutable_data_ptr(),
                                               .c_stride = columns});
    return c;
  };
  Tensor dx = device.empty({0}, grad.options()), dw = device.empty({0}, grad.options());
  if (mask[0]) {
    auto sizes = grad.sizes().vec();
    sizes.back() = weight->size(1);
    dx = product(false, *weight, sizes);
  }
  if (mask[1]) dw = product(true, *input, {n, input->size(-1)});
  return {dx, dw, db};
}

// For chunks of a loss that Python goes through: panels and sums stay in the accumulator's type.
template <class Device>
Tensor product(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  const auto acc = check_product("_product", a, b);
  check_product_bias(a, b, bias);
  const Device device(a);
  const Tensor c = device.empty({a.size(0), b.size(1)}, a.options().dtype(acc));
  const Tensor added = bias.has_value() ? bias->to(acc).contiguous() : Tensor();
  if (c.numel() > 0 && a.size(1) > 0)
    multiply(device, a, b, c, added);
  else if (added.defined())
    Tensor(c).copy_(added.expand(c.sizes()));
  else
    Tensor(c).zero_();
  return c;
}

template <class Device>
void add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  check_add_product(sum, a, b);
  if (!sum.is_inference()) sum.unsafeGetTensorImpl()->bump_version();
  if (sum.numel() > 0 && a.size(1) > 0) multiply(Device(a), a, b, sum, {}, Sum::next);
}

template <class Device>
void register_linear(torch::Library& m, std::string (*by)(const Tensor&)) {
  register_kernels<linear_forward<Device>>(m, "linear_forward", by);
  register_kernels<linear_backward<Device>>(m, "linear_backward", by);
  register_kernels<product<Device>>(m, "_product", by);
  register_kernels<add_product<Device>>(m, "_add_product_", by);
}

}  // namespace rf
