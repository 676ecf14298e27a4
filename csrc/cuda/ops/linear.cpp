// linear on a CUDA device, and the products of the ops that are made of it: tensors to plain structs, allocation, the
// current stream. Nothing here waits for the device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf::cuda {

// As torch has been told: float32 products are exact unless it may take tf32. (allowTF32CuBLAS() throws where only the
// newer of torch's two settings was made.)
bool tf32_allowed(const Tensor& t) {
  return t.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

// Whether ATen multiplies: the answer of gemm_by_aten, which the caller then follows.
static bool product_by_aten(const Tensor& like, int64_t m, int64_t n, int64_t k) {
  const char* const why = gemm_by_aten(dtype_of(like.scalar_type()), tf32_allowed(like), m, n, k);
  if (why && trace::on()) trace::product_by_aten(like.scalar_type(), m, n, k, why);
  return why;
}

void product(const OnDevice& device, const Tensor& like, Gemm g) {
  const DType dtype = dtype_of(like.scalar_type());
  const bool tf32 = tf32_allowed(like);
  Workspace workspace(gemm_workspace(dtype, tf32, g), like);
  g.workspace = workspace.data();
  launch_gemm(dtype, tf32, g, device.stream);
}

void linear_into(const OnDevice& device, const Tensor& x, const Tensor& w, const Tensor& bias, Tensor& out) {
  const int64_t m = x.size(0), n = w.size(0), k = w.size(1);
  if (product_by_aten(x, m, n, k)) {
    bias.defined() ? at::addmm_out(out, bias, x, w.t()) : at::mm_out(out, x, w.t());
    return;
  }
  const Tensor b = bias.defined() ? bias.contiguous() : Tensor();
  const Operand left = operand(x), right = operand(w);
  product(device, x,
          {m, n, k, left.view, false, right.view, true, out.mutable_data_ptr(), n,
           b.defined() ? b.const_data_ptr() : nullptr, Activation::none, nullptr, nullptr});
}

ActivationGradient activation_gradient(const OnDevice& device, const Tensor& grad, const OptionalTensor& saved,
                                       Activation activation, bool column_sums) {
  ActivationGradient result = {grad, at::empty({column_sums ? grad.size(-1) : 0}, grad.options())};
  if (activation == Activation::none && !column_sums) return result;
  const DType dtype = dtype_of(grad.scalar_type());
  const int64_t m = rows_of(grad), n = grad.size(-1);
  const Tensor g = as_strided_rows(grad, grad.dim() - 1), s = saved.has_value() ? saved->contiguous() : Tensor();
  if (activation != Activation::none) result.dz = at::empty(grad.sizes(), grad.options());
  Workspace workspace(column_sums ? activation_backward_workspace(dtype, m, n) : 0, grad);
  launch_activation_backward(
      dtype,
      {{g.const_data_ptr(), s.defined() ? s.const_data_ptr() : nullptr, *row_layout(g, g.dim() - 1),
        activation != Activation::none ? result.dz.mutable_data_ptr() : nullptr, n, activation},
       m,
       column_sums ? result.column_sums.mutable_data_ptr() : nullptr,
       workspace.data()},
      device.stream);
  return result;
}

namespace {

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  const Activation act = check_linear_forward(x, w, bias, activation);
  const OnDevice device(x);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const DType dtype = dtype_of(x.scalar_type());
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (product_by_aten(x, rows_of(x), w.size(0), w.size(1))) {
    // What is kept for gelu_tanh's derivative is the pre-activation, which the epilogue does not leave.
    if (bias.has_value() && x.numel() > 0 && !save_preactivation && fused_by_aten(x, act)) {
      const Tensor rows = x.reshape({rows_of(x), x.size(-1)});
      return {at::_addmm_activation(*bias, rows, w.t(), 1, 1, act == Activation::gelu_tanh).view(sizes), none()};
    }
    Tensor z = at::linear(x, w, bias);
    if (act == Activation::none) return {z, none()};
    z = z.contiguous();
    Tensor y = save_preactivation ? at::empty(sizes, x.options()) : z;
    launch_activation_forward(dtype, z.const_data_ptr(), y.mutable_data_ptr(), z.numel(), act, device.stream);
    return {y, save_preactivation ? z : none()};
  }
  Tensor y = at::empty(sizes, x.options());
  Tensor z = save_preactivation ? at::empty(sizes, x.options()) : none();
  if (y.numel() == 0) return {y, z};
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const Operand a = operand(x), weight = operand(w);
  product(
      device, x,
      {rows_of(x), w.size(0), w.size(1), a.view, false, weight.view, true, y.mutable_data_ptr(), w.size(0),
       b.defined() ? b.const_data_ptr() : nullptr, act, save_preactivation ? z.mutable_data_ptr() : nullptr, nullptr});
  return {y, z};
}

// input is needed for the weight's gradient, weight for the input's.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   string_view activation_name, std::array<bool, 3> mask) {
  const Activation activation = check_linear_backward(grad, input, weight, saved, activation_name, mask);
  const OnDevice device(grad);
  const int64_t m = rows_of(grad), n = grad.size(-1);
  const auto none = [&] { return at::empty({0}, grad.options()); };

  const ActivationGradient of = activation_gradient(device, grad, saved, activation, mask[2]);
  const Tensor &dz = of.dz, &db = of.column_sums;
  const auto times = [&](int64_t rows, int64_t columns, int64_t inner, bool dz_transposed, const Tensor& other,
                         at::IntArrayRef sizes) {
    if (product_by_aten(grad, rows, columns, inner)) {
      const Tensor left = dz.reshape({m, n}), right = other.reshape({inner, columns});
      return at::mm(dz_transposed ? left.t() : left, right).view(sizes);
    }
    Tensor c = at::empty(sizes, grad.options());
    if (c.numel() == 0) return c;
    const Operand left = operand(dz), right = operand(other);
    product(device, grad,
            {rows, columns, inner, left.view, dz_transposed, right.view, false, c.mutable_data_ptr(), columns, nullptr,
             Activation::none, nullptr, nullptr});
    return c;
  };
  Tensor dx = none(), dw = none();
  if (mask[0]) {
    auto sizes = grad.sizes().vec();
    sizes.back() = weight->size(1);
    dx = times(m, weight->size(1), n, false, *weight, sizes);
  }
  if (mask[1]) dw = times(n, input->size(-1), m, true, *input, {n, input->size(-1)});
  return {dx, dw, db};
}

}  // namespace

void register_linear(torch::Library& m) {
  register_kernels<linear_forward>(m, "linear_forward", architecture_in_use);
  register_kernels<linear_backward>(m, "linear_backward", architecture_in_use);
}

}  // namespace rf::cuda
