// The CUDA kernels of the ops: tensors to plain structs, allocation, the current stream. With device/torch_device.h the
// only part of this folder that knows torch. Arguments were checked above. Nothing here waits for the device.
#include <cstdlib>
#include <cstring>

#include <device/torch_device.h>
#include "../checks.h"
#include "../cpu/tensor_layouts.h"
#include "launch.h"
#include "tuning.h"

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

// Memory that only kernels see, null if there is nothing to hold.
struct Workspace {
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes > 0) memory = at::empty({bytes}, like.options().dtype(at::kByte));
  }
  void* data() { return memory.defined() ? memory.mutable_data_ptr() : nullptr; }
  Tensor memory;
};

// As torch has been told: float32 products are exact unless it may take tf32.
bool tf32_allowed(const Tensor& t) { return t.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS(); }

// ---- linear --------------------------------------------------------------------------------------------------------

void product(const OnDevice& device, const Tensor& like, Gemm g) {
  const DType dtype = dtype_of(like.scalar_type());
  const bool tf32 = tf32_allowed(like);
  Workspace workspace(gemm_workspace(dtype, tf32, g), like);
  g.workspace = workspace.data();
  launch_gemm(dtype, tf32, g, device.stream);
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                          string_view activation, bool save_preactivation) {
  const OnDevice device(x);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const DType dtype = dtype_of(x.scalar_type());
  const Activation act = parse_activation(activation);
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (gemm_by_aten(dtype, tf32_allowed(x), rows_of(x), w.size(0), w.size(1))) {
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
  product(device, x,
          {rows_of(x), w.size(0), w.size(1), a.view, false, weight.view, true, y.mutable_data_ptr(), w.size(0),
           b.defined() ? b.const_data_ptr() : nullptr, act, save_preactivation ? z.mutable_data_ptr() : nullptr,
           nullptr});
  return {y, z};
}

// input is needed for the weight's gradient, weight for the input's.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                   const OptionalTensor& weight, const OptionalTensor& saved,
                                                   string_view activation_name, std::array<bool, 3> mask) {
  const OnDevice device(grad);
  const Activation activation = parse_activation(activation_name);
  const DType dtype = dtype_of(grad.scalar_type());
  const int64_t m = rows_of(grad), n = grad.size(-1);
  const auto none = [&] { return at::empty({0}, grad.options()); };

  // One pass over the upstream gradient gives the pre-activation's and its column sums.
  Tensor dz = grad, db = none();
  if (activation != Activation::none || mask[2]) {
    const Tensor g = walkable(grad, grad.dim() - 1), s = saved.has_value() ? saved->contiguous() : Tensor();
    if (activation != Activation::none) dz = at::empty(grad.sizes(), grad.options());
    if (mask[2]) db = at::empty({n}, grad.options());
    Workspace workspace(mask[2] ? activation_backward_workspace(dtype, m, n) : 0, grad);
    launch_activation_backward(dtype,
                               {g.const_data_ptr(), s.defined() ? s.const_data_ptr() : nullptr,
                                *row_layout(g, g.dim() - 1),
                                activation != Activation::none ? dz.mutable_data_ptr() : nullptr, m, n, activation,
                                mask[2] ? db.mutable_data_ptr() : nullptr, workspace.data()},
                               device.stream);
  }
  const auto times = [&](int64_t rows, int64_t columns, int64_t inner, bool dz_transposed, const Tensor& other,
                         at::IntArrayRef sizes) {
    if (gemm_by_aten(dtype, tf32_allowed(grad), rows, columns, inner)) {
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
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  auto sizes = x.sizes().vec();
  if (x.dim()) {
    if (keepdim)
      sizes[dim] = 1;
    else
      sizes.erase(sizes.begin() + dim);
  }
  Tensor result = at::empty(sizes, x.options().dtype(acc_type(x.scalar_type())));
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

// ---- cross-entropy -------------------------------------------------------------------------------------------------

// The tensors that a CrossEntropyRows points into.
struct CrossEntropyTensors {
  Tensor x, target, probabilities, weight, weight_sum;
  CrossEntropyRows args = {};
  DType dtype;
};

CrossEntropyTensors cross_entropy_tensors(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                          int64_t ignore_index, double label_smoothing, double z_loss,
                                          std::optional<double> softcap, std::optional<double> logit_scale) {
  CrossEntropyTensors t;
  const int64_t dim = class_dim(input);
  t.x = walkable(input, dim);
  t.dtype = dtype_of(input.scalar_type());
  CrossEntropyRows& a = t.args;
  a.rows = rows_without(input, dim);
  a.classes = input.size(dim);
  a.logits = t.x.const_data_ptr();
  a.layout = *row_layout(t.x, dim);
  if (weight.has_value()) {
    t.weight = weight->to(acc_type(input.scalar_type())).contiguous();
    a.class_weight = t.weight.const_data_ptr();
    if (label_smoothing != 0) {
      t.weight_sum = t.weight.sum();
      a.class_weight_sum = t.weight_sum.const_data_ptr();
    }
  }
  if (is_probability_target(input, target)) {
    t.probabilities = walkable(target, dim);
    a.probabilities = t.probabilities.const_data_ptr();
    a.probability_layout = *row_layout(t.probabilities, dim);
  } else {
    t.target = target.to(at::kLong).contiguous();
    a.target = t.target.const_data_ptr<int64_t>();
  }
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
  a.softcap = softcap.value_or(0.0);
  a.logit_scale = logit_scale.value_or(1.0);
  return t;
}

void point_to_stats(CrossEntropyRows& a, const Tensor& stats) {
  const int64_t row_bytes = a.rows * (int64_t)stats.element_size();
  const auto row = [&](CrossEntropyStat s) -> void* {
    return s < stats.size(0) ? (char*)stats.data_ptr() + s * row_bytes : nullptr;
  };
  a.row_max = row(kMax);
  a.row_log_sum = row(kLogSum);
  a.row_entropy = row(kEntropy);
  a.row_mass = row(kMass);
  a.row_target_mass = row(kTargetMass);
}

// The outputs asked for, then the rows' statistics and the mean's denominator; with `grad` also the gradient for an
// upstream gradient of 1, from the same read of the logits.
std::vector<Tensor> cross_entropy_results(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                          int64_t ignore_index, int64_t reduction, double label_smoothing,
                                          double z_loss, std::optional<double> softcap,
                                          std::optional<double> logit_scale, int64_t outputs,
                                          std::optional<at::ScalarType> loss_dtype, const Tensor* grad) {
  const OnDevice device(input);
  CrossEntropyTensors t =
      cross_entropy_tensors(input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  auto row_shape = input.sizes().vec();
  row_shape.erase(row_shape.begin() + class_dim(input));
  const auto result_type = loss_dtype.value_or(input.scalar_type());
  const auto acc_options = input.options().dtype(acc_type(input.scalar_type()));
  const int64_t stat_rows = cross_entropy_stat_rows(t.probabilities.defined(), outputs & kOutputEntropy);
  Tensor stats = at::empty({stat_rows, t.args.rows}, acc_options);
  point_to_stats(t.args, stats);

  CrossEntropyResults out = {};
  Tensor loss, total, lse, logprob, argmax;
  // The mean's denominator, which a sum has no use for but a saved tensor has to hold something.
  Tensor weight_sum = at::empty({}, input.options().dtype(at::kDouble));
  const bool reduced = reduction != at::Reduction::None;
  if (outputs & kOutputLoss) out.loss = (loss = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLse) out.lse = (lse = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLogprob) out.logprob = (logprob = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputArgmax)
    out.argmax = (argmax = at::empty(row_shape, input.options().dtype(at::kLong))).mutable_data_ptr<int64_t>();
  Workspace workspace(cross_entropy_workspace(t.args.rows), input);
  if ((outputs & kOutputLoss) && reduced) {
    out.total = (total = at::empty({}, input.options().dtype(result_type))).mutable_data_ptr();
    out.total_dtype = dtype_of(result_type);
    out.mean = reduction == at::Reduction::Mean;
  }
  out.weight_sum = weight_sum.mutable_data_ptr<double>();
  out.workspace = workspace.data();
  if (grad) {
    const int64_t dim = class_dim(input);
    Tensor dx = walkable(*grad, dim);
    launch_cross_entropy_forward_backward(t.dtype, t.args, out, dx.mutable_data_ptr(), *row_layout(dx, dim),
                                          device.stream);
    if (!dx.is_same(*grad)) grad->copy_(dx);
  } else {
    launch_cross_entropy_forward(t.dtype, t.args, out, device.stream);
  }

  std::vector<Tensor> results;
  if (outputs & kOutputLoss) results.push_back(reduced ? total : loss.to(result_type));
  if (outputs & kOutputLse) results.push_back(lse.to(result_type));
  if (outputs & kOutputEntropy) results.push_back(stats[kEntropy].reshape(row_shape).to(result_type, false, true));
  if (outputs & kOutputLogprob) results.push_back(logprob.to(result_type));
  if (outputs & kOutputArgmax) results.push_back(argmax);
  results.push_back(stats);
  results.push_back(weight_sum);
  return results;
}

std::vector<Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                          int64_t ignore_index, int64_t reduction, double label_smoothing,
                                          double z_loss, std::optional<double> softcap,
                                          std::optional<double> logit_scale, int64_t outputs,
                                          std::optional<at::ScalarType> loss_dtype) {
  return cross_entropy_results(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap,
                               logit_scale, outputs, loss_dtype, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double z_loss, std::optional<double> softcap, std::optional<double> logit_scale,
    std::optional<at::ScalarType> loss_dtype) {
  Tensor grad = at::empty_like(input);
  const auto r = cross_entropy_results(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap,
                                       logit_scale, kOutputLoss, loss_dtype, &grad);
  return {r[0], r[1], r[2], grad};
}

// Gradients of the differentiable outputs of cross_entropy; absent where an output was not asked for or not used.
struct OutputGrads {
  OptionalTensor loss, lse, entropy, logprob;
};

// Gradients into grad_input (laid out in any way) and into a new tensor for the probabilities.
Tensor cross_entropy_backward_into(const Tensor* grad_input, const OutputGrads& grads, const Tensor& input,
                                   const Tensor& target, const OptionalTensor& weight, const Tensor& stats,
                                   const Tensor& weight_sum, int64_t ignore_index, int64_t reduction,
                                   double label_smoothing, double z_loss, std::optional<double> softcap,
                                   std::optional<double> logit_scale, bool grad_target, bool unless_one = false) {
  const OnDevice device(input);
  CrossEntropyTensors t =
      cross_entropy_tensors(input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  point_to_stats(t.args, stats);
  const auto acc = acc_type(input.scalar_type());
  CrossEntropyUpstream up = {};
  Tensor loss, lse, entropy, logprob;
  const auto rows_in_order = [&](const OptionalTensor& grad, Tensor& keep) -> const void* {
    if (!grad.has_value()) return nullptr;
    keep = grad->to(acc).contiguous();
    return keep.const_data_ptr();
  };
  up.loss = rows_in_order(grads.loss, loss);
  up.loss_stride = reduction == at::Reduction::None ? 1 : 0;
  up.weight_sum = reduction == at::Reduction::Mean ? weight_sum.const_data_ptr<double>() : nullptr;
  up.unless_one = unless_one;
  up.lse = rows_in_order(grads.lse, lse);
  up.entropy = rows_in_order(grads.entropy, entropy);
  up.logprob = rows_in_order(grads.logprob, logprob);

  const int64_t dim = class_dim(input);
  Tensor dx, dt = at::empty({0}, input.options());
  if (grad_input) {
    dx = walkable(*grad_input, dim);
    up.grad_logits = dx.mutable_data_ptr();
    up.grad_layout = *row_layout(dx, dim);
  }
  if (grad_target) {
    dt = at::empty(target.sizes(), target.options());
    up.grad_probabilities = dt.mutable_data_ptr();
    up.grad_probability_layout = *row_layout(dt, dim);
  }
  if (input.numel() > 0) launch_cross_entropy_backward(t.dtype, t.args, up, device.stream);
  if (grad_input && !dx.is_same(*grad_input)) grad_input->copy_(dx);
  return dt;
}

std::tuple<Tensor, Tensor> cross_entropy_backward(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_logprob, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const Tensor& stats, const Tensor& weight_sum, int64_t ignore_index, int64_t reduction, double label_smoothing,
    double z_loss, std::optional<double> softcap, std::optional<double> logit_scale, std::array<bool, 2> mask) {
  Tensor dx = mask[0] ? at::empty_like(input) : at::empty({0}, input.options());
  Tensor dt = cross_entropy_backward_into(mask[0] ? &dx : nullptr, {grad_loss, grad_lse, grad_entropy, grad_logprob},
                                          input, target, weight, stats, weight_sum, ignore_index, reduction,
                                          label_smoothing, z_loss, softcap, logit_scale, mask[1]);
  return {dx, dt};
}

Tensor cross_entropy_backward_inplace(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                                      const OptionalTensor& grad_entropy, const OptionalTensor& grad_logprob,
                                      const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                      const Tensor& stats, const Tensor& weight_sum, int64_t ignore_index,
                                      int64_t reduction, double label_smoothing, double z_loss,
                                      std::optional<double> softcap, std::optional<double> logit_scale,
                                      bool grad_target) {
  input.unsafeGetTensorImpl()->bump_version();
  return cross_entropy_backward_into(&input, {grad_loss, grad_lse, grad_entropy, grad_logprob}, input, target, weight,
                                     stats, weight_sum, ignore_index, reduction, label_smoothing, z_loss, softcap,
                                     logit_scale, grad_target);
}

void cross_entropy_backward_unless_one(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight, const Tensor& stats, const Tensor& weight_sum,
                                       int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss,
                                       std::optional<double> softcap, std::optional<double> logit_scale,
                                       const Tensor& grad) {
  cross_entropy_backward_into(&grad, {grad_loss, {}, {}, {}}, input, target, weight, stats, weight_sum, ignore_index,
                              reduction, label_smoothing, z_loss, softcap, logit_scale, false, /*unless_one=*/true);
}

// ---- mse_loss ------------------------------------------------------------------------------------------------------

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, int64_t reduction) {
  const OnDevice device(input);
  const Tensor x = input.contiguous(), y = target.contiguous();
  const bool each = reduction == at::Reduction::None;
  Tensor out = at::empty(each ? x.sizes() : at::IntArrayRef{}, x.options());
  Workspace workspace(each ? 0 : squared_error_workspace(x.numel()), x);
  launch_squared_error(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                       each ? out.mutable_data_ptr() : nullptr, each ? nullptr : out.mutable_data_ptr(),
                       reduction == at::Reduction::Mean ? 1.0 / (double)x.numel() : 1.0, workspace.data(), x.numel(),
                       device.stream);
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                             int64_t reduction, std::array<bool, 2> mask) {
  const OnDevice device(input);
  const Tensor x = input.contiguous(), y = target.contiguous(), g = grad.contiguous();
  Tensor dx = at::empty(mask[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor dy = at::empty(mask[1] ? x.sizes() : at::IntArrayRef{0}, x.options());
  launch_squared_error_backward(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(), g.const_data_ptr(),
                                reduction == at::Reduction::None,
                                reduction == at::Reduction::Mean ? 2.0 / (double)x.numel() : 2.0,
                                mask[0] ? dx.mutable_data_ptr() : nullptr, mask[1] ? dy.mutable_data_ptr() : nullptr,
                                x.numel(), device.stream);
  return {dx, dy};
}

}  // namespace

RF_CUDA_OPS(m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
  m.impl("softmax_forward", softmax_forward);
  m.impl("softmax_backward", softmax_backward);
  m.impl("logsumexp_forward", logsumexp_forward);
  m.impl("logsumexp_backward", logsumexp_backward);
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_forward_backward", cross_entropy_forward_backward);
  m.impl("cross_entropy_backward_unless_one_", cross_entropy_backward_unless_one);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("cross_entropy_backward_", cross_entropy_backward_inplace);
  m.impl("mse_loss_forward", mse_loss_forward);
  m.impl("mse_loss_backward", mse_loss_backward);
}

}  // namespace rf::cuda
