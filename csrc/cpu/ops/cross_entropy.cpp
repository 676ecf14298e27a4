// The CPU kernels of the ops: tensors to plain structs, allocation, threads. With tensor_layouts.h and
// cross_entropy_tensors.h, which other devices use too, all of this folder that knows torch. Arguments were checked
// above.
#include <torch/csrc/stable/c/shim.h>

#include "shared/op_checks.h"
#include "shared/torch_api.h"
#include "cpu/ops/activation_gradient.h"
#include "shared/compensated_sum.h"
#include "shared/cross_entropy_tensors.h"
#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "shared/layouts.h"
#include "cpu/ops/traced.h"
#include "cpu/tuning.h"

namespace rf {

// torch's own pool through its C interface: the header-only at::parallel_for would need a second OpenMP runtime here.
void run_parallel(int64_t n, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
  TORCH_CHECK(torch_parallel_for(0, n, grain, fn, ctx) == 0, "regfast: torch's thread pool failed");
}
int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

namespace {

// ---- linear --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  check_linear_forward(x, w, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const DType dtype = dtype_of(x.scalar_type());
  const Activation act = parse_activation(activation);
  if (product_by_aten(x.scalar_type(), rows_of(x), w.size(0), w.size(1))) {
    Tensor z = at::linear(x, w, bias);
    if (act == Activation::none) return {z, at::empty({0}, x.options())};
    Tensor y = save_preactivation ? advised(at::empty(sizes, x.options())) : z;
    activation_forward(dtype, z.const_data_ptr(), y.mutable_data_ptr(), z.numel(), act);
    return {y, save_preactivation ? z : at::empty({0}, x.options())};
  }
  Tensor y = advised(at::empty(sizes, x.options()));
  Tensor z = save_preactivation ? advised(at::empty(sizes, x.options())) : at::empty({0}, x.options());
  if (y.numel() == 0) return {y, z};
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const Operand a = operand(x), weight = operand(w);
  gemm(dtype, {rows_of(x),
               w.size(0),
               w.size(1),
               a.view,
               false,
               weight.view,
               true,
               {y.mutable_data_ptr(), w.size(0), nullptr, 0, b.defined() ? b.const_data_ptr() : nullptr, act,
                save_preactivation ? z.mutable_data_ptr() : nullptr}});
  return {y, z};
}

// input is needed for the weight's gradient, weight for the input's.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   string_view activation_name, std::array<bool, 3> mask) {
  check_linear_backward(grad, input, weight, saved, activation_name, mask);
  const Activation activation = parse_activation(activation_name);
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
    Tensor c = advised(at::empty(sizes, grad.options()));
    const Operand left = operand(dz), right = operand(other);
    gemm(dtype, {rows,
                 columns,
                 inner,
                 left.view,
                 dz_transposed,
                 right.view,
                 false,
                 {c.mutable_data_ptr(), columns, nullptr, 0, nullptr, Activation::none, nullptr}});
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

// ---- softmax family ------------------------------------------------------------------------------------------------

Tensor softmax_cpu(const Tensor& input, int64_t dim, bool log) {
  dim = check_softmax_forward(softmax_name(log), input, dim);
  const Tensor x = walkable(input, dim);
  Tensor y = advised(at::empty(input.sizes(), input.options()));
  if (y.numel() == 0) return y;
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.output = y.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(y, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.log = log;
  softmax(SoftmaxOp::forward, dtype_of(x.scalar_type()), a, rows_without(x, dim));
  return y;
}

Tensor softmax_backward_cpu(const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  dim = check_softmax_backward(grad, output, dim);
  const Tensor g = walkable(grad, dim), y = walkable(output, dim);
  Tensor dx = advised(at::empty(y.sizes(), y.options()));
  if (y.numel() == 0) return dx;
  SoftmaxArgs a = {};
  a.input = y.const_data_ptr();
  a.grad = g.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = *row_layout(y, dim);
  a.grad_in = *row_layout(g, dim);
  a.out = *row_layout(dx, dim);
  a.classes = y.dim() ? y.size(dim) : 1;
  a.log = log;
  softmax(SoftmaxOp::backward, dtype_of(y.scalar_type()), a, rows_without(y, dim));
  return dx;
}

// In accumulator type: the op rounds, backward does not have to.
Tensor logsumexp_cpu(const Tensor& input, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", input, dim);
  const Tensor x = walkable(input, dim);
  Tensor result = at::empty(reduced_sizes(x, dim, keepdim), x.options().dtype(acc_type(x.scalar_type())));
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = {1, 0, 0, 1};
  a.classes = x.dim() ? x.size(dim) : 1;
  a.row_result = result.mutable_data_ptr();
  softmax(SoftmaxOp::logsumexp_forward, dtype_of(x.scalar_type()), a, result.numel());
  return result;
}

// lse and grad have the shape that logsumexp returned, with or without the reduced dimension.
Tensor logsumexp_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& lse, int64_t dim) {
  dim = check_logsumexp_backward(grad, input, lse, dim);
  const Tensor x = walkable(input, dim);
  const auto acc = acc_type(x.scalar_type());
  const Tensor g = grad.to(acc).contiguous(), l = lse.to(acc).contiguous();
  Tensor dx = advised(at::empty(x.sizes(), x.options()));
  if (dx.numel() == 0) return dx;
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(dx, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.row_result = l.data_ptr();
  a.row_grad = g.const_data_ptr();
  softmax(SoftmaxOp::logsumexp_backward, dtype_of(x.scalar_type()), a, l.numel());
  return dx;
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

CrossEntropyTensors<CrossEntropyArgs> tensors_of(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                 double label_smoothing, double z_loss, std::optional<double> softcap,
                                                 std::optional<double> logit_scale) {
  auto t = cross_entropy_tensors<CrossEntropyArgs>(input, target, weight, ignore_index, label_smoothing, z_loss,
                                                   softcap, logit_scale);
  CrossEntropyArgs& a = t.args;
  CompensatedSum sum;
  for (int64_t c = 0; weight.has_value() && c < a.classes; ++c)
    sum.add(t.dtype == DType::f64 ? t.weight.const_data_ptr<double>()[c] : t.weight.const_data_ptr<float>()[c]);
  a.class_weight_sum = weight.has_value() ? sum.value() : (double)a.classes;
  return t;
}

void check_row(const CrossEntropyArgs& a, int64_t bad) {
  RF_CHECK(TORCH_CHECK_INDEX, bad < 0, "cross_entropy", "target", c10::str("classes from 0 to ", a.classes - 1),
           c10::str("Target ", a.target[bad], " is out of bounds."));
}

std::vector<Tensor> cross_entropy_forward_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                              int64_t ignore_index, int64_t reduction, double label_smoothing,
                                              double z_loss, std::optional<double> softcap,
                                              std::optional<double> logit_scale, int64_t outputs,
                                              std::optional<at::ScalarType> loss_dtype) {
  check_cross_entropy_forward(input, target, weight, ignore_index, reduction, label_smoothing, softcap, outputs,
                              loss_dtype);
  auto t = tensors_of(input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  const auto row_shape = reduced_sizes(input, class_dim(input), false);
  const auto acc = acc_type(input.scalar_type()), result_type = loss_dtype.value_or(input.scalar_type());
  const auto acc_options = input.options().dtype(acc);
  Tensor stats =
      at::empty({cross_entropy_stat_rows(t.probabilities.defined(), outputs & kOutputEntropy), t.rows}, acc_options);
  point_to_stats(t.args, stats);

  CrossEntropyOutputs out = {};
  Tensor loss, lse, logprob, argmax;
  const bool rowwise = reduction == at::Reduction::None && (outputs & kOutputLoss);
  if (rowwise) out.loss = (loss = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLse) out.lse = (lse = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLogprob) out.logprob = (logprob = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputArgmax)
    out.argmax = (argmax = at::empty(row_shape, input.options().dtype(at::kLong))).mutable_data_ptr<int64_t>();

  const CrossEntropyPartial sums = cross_entropy_forward(t.dtype, t.args, out, t.rows);
  check_row(t.args, sums.bad_row);

  std::vector<Tensor> results;
  if (outputs & kOutputLoss) {
    if (rowwise)
      results.push_back(loss.to(result_type));
    else
      results.push_back(number(reduction == at::Reduction::Mean ? mean_of(sums.loss, sums.weight) : sums.loss, result_type));
  }
  if (outputs & kOutputLse) results.push_back(lse.to(result_type));
  if (outputs & kOutputEntropy) results.push_back(stats[kEntropy].reshape(row_shape).to(result_type, false, true));
  if (outputs & kOutputLogprob) results.push_back(logprob.to(result_type));
  if (outputs & kOutputArgmax) results.push_back(argmax);
  results.push_back(stats);
  results.push_back(number(sums.weight, at::kDouble));
  return results;
}

// Gradients into grad_input (laid out in any way) and into a new tensor for the probabilities.
Tensor cross_entropy_backward_into(const Tensor* grad_input, const CrossEntropyOutputGrads& grads, const Tensor& input,
                                   const Tensor& target, const OptionalTensor& weight, const Tensor& stats,
                                   const Tensor& weight_sum, int64_t ignore_index, int64_t reduction,
                                   double label_smoothing, double z_loss, std::optional<double> softcap,
                                   std::optional<double> logit_scale, bool grad_target) {
  auto t = tensors_of(input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  point_to_stats(t.args, stats);
  const CrossEntropyRowGrads rows(grads, acc_type(input.scalar_type()));
  CrossEntropyGrads g = {};
  rows.point_to(g);
  g.loss_stride = reduction == at::Reduction::None ? 1 : 0;
  g.loss_scale = reduction == at::Reduction::Mean ? 1.0 / *weight_sum.const_data_ptr<double>() : 1.0;

  const int64_t dim = class_dim(input);
  Tensor dx, dt = at::empty({0}, input.options());
  if (grad_input) {
    dx = walkable(*grad_input, dim);
    g.grad_logits = dx.mutable_data_ptr();
    g.grad_layout = *row_layout(dx, dim);
    g.stream = (int64_t)dx.nbytes() >= tuning::kStreamBytes;
  }
  if (grad_target) {
    dt = advised(at::empty(target.sizes(), target.options()));
    g.grad_probabilities = dt.mutable_data_ptr();
    g.grad_probability_layout = *row_layout(dt, dim);
  }
  check_row(t.args, cross_entropy_backward(t.dtype, t.args, g, t.rows));
  if (grad_input && !dx.is_same(*grad_input)) grad_input->copy_(dx);
  return dt;
}

std::tuple<Tensor, Tensor> cross_entropy_backward_cpu(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_logprob, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const Tensor& stats, const Tensor& weight_sum, int64_t ignore_index, int64_t reduction, double label_smoothing,
    double z_loss, std::optional<double> softcap, std::optional<double> logit_scale, std::array<bool, 2> mask) {
  check_cross_entropy_backward("cross_entropy_backward", {&grad_loss, &grad_lse, &grad_entropy, &grad_logprob}, input,
                               target, weight, stats, weight_sum, ignore_index, reduction, label_smoothing, softcap,
                               mask[1]);
  Tensor dx = mask[0] ? advised(at::empty_like(input)) : at::empty({0}, input.options());
  Tensor dt = cross_entropy_backward_into(mask[0] ? &dx : nullptr, {grad_loss, grad_lse, grad_entropy, grad_logprob},
                                          input, target, weight, stats, weight_sum, ignore_index, reduction,
                                          label_smoothing, z_loss, softcap, logit_scale, mask[1]);
  return {dx, dt};
}

Tensor cross_entropy_backward_inplace_cpu(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                                          const OptionalTensor& grad_entropy, const OptionalTensor& grad_logprob,
                                          const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                          const Tensor& stats, const Tensor& weight_sum, int64_t ignore_index,
                                          int64_t reduction, double label_smoothing, double z_loss,
                                          std::optional<double> softcap, std::optional<double> logit_scale,
                                          bool grad_target) {
  check_cross_entropy_backward("cross_entropy_backward_", {&grad_loss, &grad_lse, &grad_entropy, &grad_logprob}, input,
                               target, weight, stats, weight_sum, ignore_index, reduction, label_smoothing, softcap,
                               grad_target, &input);
  input.unsafeGetTensorImpl()->bump_version();
  return cross_entropy_backward_into(&input, {grad_loss, grad_lse, grad_entropy, grad_logprob}, input, target, weight,
                                     stats, weight_sum, ignore_index, reduction, label_smoothing, z_loss, softcap,
                                     logit_scale, grad_target);
}

// ---- mse_loss ------------------------------------------------------------------------------------------------------

Tensor mse_loss_forward_cpu(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_mse_loss("mse_loss", input, target, reduction);
  const Tensor x = input.contiguous(), y = target.contiguous();
  const bool each = reduction == at::Reduction::None;
  Tensor out = each ? advised(at::empty(x.sizes(), x.options())) : Tensor();
  const double sum = squared_error(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                                   each ? out.mutable_data_ptr() : nullptr, x.numel());
  if (each) return out;
  return number(reduction == at::Reduction::Mean ? sum / (double)x.numel() : sum, x.scalar_type());
}

std::tuple<Tensor, Tensor> mse_loss_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& target,
                                                 int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, input, target, reduction);
  const Tensor x = input.contiguous(), y = target.contiguous(), g = grad.contiguous();
  Tensor dx = advised(at::empty(mask[0] ? x.sizes() : at::IntArrayRef{0}, x.options()));
  Tensor dy = advised(at::empty(mask[1] ? x.sizes() : at::IntArrayRef{0}, x.options()));
  const double scale = reduction == at::Reduction::Mean ? 2.0 / (double)x.numel() : 2.0;
  squared_error_backward(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(), g.const_data_ptr(),
                         reduction == at::Reduction::None, scale, mask[0] ? dx.mutable_data_ptr() : nullptr,
                         mask[1] ? dy.mutable_data_ptr() : nullptr, x.numel());
  return {dx, dy};
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<linear_forward>(m, "linear_forward", isa_in_use);
  register_kernels<linear_backward>(m, "linear_backward", isa_in_use);
  register_kernels<softmax_cpu>(m, "softmax_forward", isa_in_use);
  register_kernels<softmax_backward_cpu>(m, "softmax_backward", isa_in_use);
  register_kernels<logsumexp_cpu>(m, "logsumexp_forward", isa_in_use);
  register_kernels<logsumexp_backward_cpu>(m, "logsumexp_backward", isa_in_use);
  register_kernels<cross_entropy_forward_cpu>(m, "cross_entropy_forward", isa_in_use);
  register_kernels<cross_entropy_backward_cpu>(m, "cross_entropy_backward", isa_in_use);
  register_kernels<cross_entropy_backward_inplace_cpu>(m, "cross_entropy_backward_", isa_in_use);
  register_kernels<mse_loss_forward_cpu>(m, "mse_loss_forward", isa_in_use);
  register_kernels<mse_loss_backward_cpu>(m, "mse_loss_backward", isa_in_use);
}

}  // namespace rf
