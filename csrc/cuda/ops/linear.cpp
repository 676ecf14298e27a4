// The CUDA kernels of the ops but the cross-entropies: tensors to plain structs, allocation, the current stream.
// Arguments were checked above. Nothing here waits for the device.
#include <cstdlib>
#include <cstring>

#include "shared/op_checks.h"
#include "shared/layouts.h"
#include "cuda/ops/ops.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

// Whether the kernels are used for a CUDA tensor: REGFAST_CUDA_KERNELS=1 (or 0) says so, else tuning.h's list of the
// architectures that they have been proven on.
bool enabled(const Tensor& t) {
  static const char* const said = std::getenv("REGFAST_CUDA_KERNELS");
  if (said && *said) return std::strcmp(said, "0") != 0;
  return tuning::proven(architecture(t));
}
[[maybe_unused]] const bool announced = (cuda_kernels_enabled = enabled, true);

}  // namespace

// ---- linear --------------------------------------------------------------------------------------------------------

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
  const Tensor g = walkable(grad, grad.dim() - 1), s = saved.has_value() ? saved->contiguous() : Tensor();
  if (activation != Activation::none) result.dz = at::empty(grad.sizes(), grad.options());
  Workspace workspace(column_sums ? activation_backward_workspace(dtype, m, n) : 0, grad);
  launch_activation_backward(
      dtype,
      {g.const_data_ptr(), s.defined() ? s.const_data_ptr() : nullptr, *row_layout(g, g.dim() - 1),
       activation != Activation::none ? result.dz.mutable_data_ptr() : nullptr, m, n, activation,
       column_sums ? result.column_sums.mutable_data_ptr() : nullptr, workspace.data()},
      device.stream);
  return result;
}

namespace {

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  check_linear_forward(x, w, bias);
  const OnDevice device(x);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const DType dtype = dtype_of(x.scalar_type());
  const Activation act = parse_activation(activation);
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (product_by_aten(x, rows_of(x), w.size(0), w.size(1))) {
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
  check_linear_backward(grad, input, weight, saved, activation_name, mask);
  const OnDevice device(grad);
  const Activation activation = parse_activation(activation_name);
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

// ---- softmax family ------------------------------------------------------------------------------------------------

Tensor softmax_forward(const Tensor& input, int64_t dim, bool log) {
  dim = check_softmax_forward(softmax_name(log), input, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  Tensor y = at::empty(input.sizes(), input.options());
  if (y.numel() == 0) return y;
  SoftmaxRows a = {};
  a.rows = rows_without(x, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.output = y.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(y, dim);
  a.log = log;
  launch_softmax_forward(dtype_of(x.scalar_type()), a, device.stream);
  return y;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  dim = check_softmax_backward(grad, output, dim);
  const OnDevice device(output);
  const Tensor g = walkable(grad, dim), y = walkable(output, dim);
  Tensor dx = at::empty(y.sizes(), y.options());
  if (y.numel() == 0) return dx;
  SoftmaxRows a = {};
  a.rows = rows_without(y, dim);
  a.classes = y.dim() ? y.size(dim) : 1;
  a.input = y.const_data_ptr();
  a.grad = g.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = *row_layout(y, dim);
  a.grad_in = *row_layout(g, dim);
  a.out = *row_layout(dx, dim);
  a.log = log;
  launch_softmax_backward(dtype_of(y.scalar_type()), a, device.stream);
  return dx;
}

// In accumulator type: the op rounds, backward does not have to.
Tensor logsumexp_forward(const Tensor& input, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", input, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  Tensor result = at::empty(reduced_sizes(x, dim, keepdim), x.options().dtype(acc_type(x.scalar_type())));
  if (result.numel() == 0) return result;
  SoftmaxRows a = {};
  a.rows = result.numel();
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = a.in;
  a.row_result = result.mutable_data_ptr();
  launch_logsumexp_forward(dtype_of(x.scalar_type()), a, device.stream);
  return result;
}

// lse and grad have the shape that logsumexp returned, with or without the reduced dimension.
Tensor logsumexp_backward(const Tensor& grad, const Tensor& input, const Tensor& lse, int64_t dim) {
  dim = check_logsumexp_backward(grad, input, lse, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  const auto acc = acc_type(x.scalar_type());
  const Tensor g = grad.to(acc).contiguous(), l = lse.to(acc).contiguous();
  Tensor dx = at::empty(x.sizes(), x.options());
  if (dx.numel() == 0) return dx;
  SoftmaxRows a = {};
  a.rows = l.numel();
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(dx, dim);
  a.row_result = l.data_ptr();
  a.row_grad = g.const_data_ptr();
  launch_logsumexp_backward(dtype_of(x.scalar_type()), a, device.stream);
  return dx;
}

// ---- mse_loss ------------------------------------------------------------------------------------------------------

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_mse_loss("mse_loss", input, target, reduction);
  const OnDevice device(input);
  const Tensor x = input.contiguous(), y = target.contiguous();
  const bool each = reduction == at::Reduction::None;
  Tensor out = at::empty(each ? x.sizes() : at::IntArrayRef{}, x.options());
  if (out.numel() == 0) return out;
  Workspace workspace(each ? 0 : squared_error_workspace(x.numel()), x);
  launch_squared_error(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                       each ? out.mutable_data_ptr() : nullptr, each ? nullptr : out.mutable_data_ptr(),
                       reduction == at::Reduction::Mean ? 1.0 / (double)x.numel() : 1.0, workspace.data(), x.numel(),
                       device.stream);
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                             int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, input, target, reduction);
  const OnDevice device(input);
  const Tensor x = input.contiguous(), y = target.contiguous(), g = grad.contiguous();
  Tensor dx = at::empty(mask[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor dy = at::empty(mask[1] ? x.sizes() : at::IntArrayRef{0}, x.options());
  launch_squared_error_backward(
      dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(), g.const_data_ptr(),
      reduction == at::Reduction::None, reduction == at::Reduction::Mean ? 2.0 / (double)x.numel() : 2.0,
      mask[0] ? dx.mutable_data_ptr() : nullptr, mask[1] ? dy.mutable_data_ptr() : nullptr, x.numel(), device.stream);
  return {dx, dy};
}

}  // namespace

RF_CUDA_OPS(m) {
  register_kernels<linear_forward>(m, "linear_forward", architecture_in_use);
  register_kernels<linear_backward>(m, "linear_backward", architecture_in_use);
  register_kernels<softmax_forward>(m, "softmax_forward", architecture_in_use);
  register_kernels<softmax_backward>(m, "softmax_backward", architecture_in_use);
  register_kernels<logsumexp_forward>(m, "logsumexp_forward", architecture_in_use);
  register_kernels<logsumexp_backward>(m, "logsumexp_backward", architecture_in_use);
  register_cross_entropy(m);
  register_linear_cross_entropy(m);
  register_linear_nll(m);
  register_phm_linear(m);
  register_kernels<mse_loss_forward>(m, "mse_loss_forward", architecture_in_use);
  register_kernels<mse_loss_backward>(m, "mse_loss_backward", architecture_in_use);
}

}  // namespace rf::cuda
