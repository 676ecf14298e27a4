// cross_entropy on a CUDA device: tensors to plain structs, allocation, the current stream. Nothing here waits for the
// device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/cross_entropy_tensors.h"
#include "shared/op_checks.h"

namespace rf::cuda {
namespace {

struct Tensors : CrossEntropyTensors<CrossEntropyRows> {
  Tensor weight_sum;
};

Tensors tensors_of(const CrossEntropyOperands& given, const CrossEntropyOptions& o) {
  Tensors t = {cross_entropy_tensors<CrossEntropyRows>(given, o), Tensor()};
  t.args.rows = t.rows;
  if (given.weight.has_value() && o.label_smoothing != 0) {
    t.weight_sum = t.weight.sum();
    t.args.class_weight_sum = t.weight_sum.const_data_ptr();
  }
  return t;
}

// The outputs asked for, then the rows' statistics and the mean's denominator; with `grad` also the gradient for an
// upstream gradient that is known, from the same read of the logits.
std::vector<Tensor> cross_entropy_results(const CrossEntropyOperands& given, const CrossEntropyOptions& o,
                                          int64_t outputs, OptionalType loss_dtype, const Tensor* grad,
                                          double upstream = 1) {
  const Tensor& input = given.input;
  const OnDevice device(input);
  Tensors t = tensors_of(given, o);
  const auto row_shape = reduced_sizes(input, class_dim(input), false);
  const auto result_type = loss_dtype.value_or(input.scalar_type());
  const auto acc_options = input.options().dtype(acc_type(input.scalar_type()));
  const int64_t stat_rows = cross_entropy_stat_rows(t.probabilities.defined(), outputs & kOutputEntropy);
  Tensor stats = at::empty({stat_rows, t.args.rows}, acc_options);
  point_to_stats(t.args, stats);

  CrossEntropyResults out = {};
  Tensor loss, total, lse, logprob, argmax;
  // The mean's denominator, which a sum has no use for but a saved tensor has to hold something.
  Tensor weight_sum = at::empty({}, input.options().dtype(at::kDouble));
  const bool reduced = o.reduction != at::Reduction::None;
  if (outputs & kOutputLoss) out.loss = (loss = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLse) out.lse = (lse = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLogprob) out.logprob = (logprob = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputArgmax)
    out.argmax = (argmax = at::empty(row_shape, input.options().dtype(at::kLong))).mutable_data_ptr<int64_t>();
  Workspace workspace(cross_entropy_workspace(t.args.rows), input);
  if ((outputs & kOutputLoss) && reduced) {
    out.total = (total = at::empty({}, input.options().dtype(result_type))).mutable_data_ptr();
    out.total_dtype = dtype_of(result_type);
    out.mean = o.reduction == at::Reduction::Mean;
  }
  out.weight_sum = weight_sum.mutable_data_ptr<double>();
  out.workspace = workspace.data();
  if (grad) {
    const int64_t dim = class_dim(input);
    Tensor dx = as_strided_rows(*grad, dim);
    launch_cross_entropy_forward_backward(t.dtype, t.args, out, dx.mutable_data_ptr(), *row_layout(dx, dim),
                                          device.stream, upstream);
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

std::vector<Tensor> cross_entropy_forward(const CrossEntropyOperands& t, const CrossEntropyOptions& o, int64_t outputs,
                                          OptionalType loss_dtype) {
  check_cross_entropy_forward(t, o, outputs, loss_dtype);
  return cross_entropy_results(t, o, outputs, loss_dtype, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward(const CrossEntropyOperands& t,
                                                                          const CrossEntropyOptions& o,
                                                                          OptionalType loss_dtype, double upstream) {
  check_reduced("cross_entropy_forward_backward", o.reduction);
  check_cross_entropy_forward(t, o, kOutputLoss, loss_dtype);
  Tensor grad = at::empty_like(t.input);
  const auto r = cross_entropy_results(t, o, kOutputLoss, loss_dtype, &grad, upstream);
  return {r[0], r[1], r[2], grad};
}

// Gradients into grad_input (laid out in any way) and into a new tensor for the probabilities.
Tensor cross_entropy_backward_into(const Tensor* grad_input, const CrossEntropyOutputGrads& grads,
                                   const CrossEntropyOperands& given, const Tensor& stats, const Tensor& weight_sum,
                                   const CrossEntropyOptions& o, bool grad_target, double unless = NAN) {
  const Tensor &input = given.input, &target = given.target;
  const OnDevice device(input);
  auto t = tensors_of(given, o);
  point_to_stats(t.args, stats);
  const CrossEntropyRowGrads rows(grads, acc_type(input.scalar_type()));
  CrossEntropyUpstream up = {};
  rows.point_to(up);
  up.loss_stride = o.reduction == at::Reduction::None ? 1 : 0;
  up.weight_sum = o.reduction == at::Reduction::Mean ? weight_sum.const_data_ptr<double>() : nullptr;
  up.unless = unless;

  const int64_t dim = class_dim(input);
  Tensor dx, dt = at::empty({0}, input.options());
  if (grad_input) {
    dx = as_strided_rows(*grad_input, dim);
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

std::tuple<Tensor, Tensor> cross_entropy_backward(const CrossEntropyOutputGrads& grads, const CrossEntropyOperands& t,
                                                  const Tensor& stats, const Tensor& weight_sum,
                                                  const CrossEntropyOptions& o, std::array<bool, 2> mask) {
  check_cross_entropy_backward("cross_entropy_backward", grads, t, stats, weight_sum, o, mask[1]);
  Tensor dx = mask[0] ? at::empty_like(t.input) : at::empty({0}, t.input.options());
  Tensor dt = cross_entropy_backward_into(mask[0] ? &dx : nullptr, grads, t, stats, weight_sum, o, mask[1]);
  return {dx, dt};
}

Tensor cross_entropy_backward_inplace(const CrossEntropyOutputGrads& grads, const CrossEntropyOperands& t,
                                      const Tensor& stats, const Tensor& weight_sum, const CrossEntropyOptions& o,
                                      bool grad_target) {
  check_cross_entropy_backward("cross_entropy_backward_", grads, t, stats, weight_sum, o, grad_target, &t.input);
  t.input.unsafeGetTensorImpl()->bump_version();
  return cross_entropy_backward_into(&t.input, grads, t, stats, weight_sum, o, grad_target);
}

void cross_entropy_backward_unless(const Tensor& grad_loss, const CrossEntropyOperands& t, const Tensor& stats,
                                   const Tensor& weight_sum, const CrossEntropyOptions& o, const Tensor& grad,
                                   double upstream) {
  check_cross_entropy_unless(grad_loss, t, stats, weight_sum, o, grad, upstream);
  cross_entropy_backward_into(&grad, {grad_loss, {}, {}, {}}, t, stats, weight_sum, o, false, upstream);
}

}  // namespace

void register_cross_entropy(torch::Library& m) {
  register_kernels<cross_entropy_forward>(m, "cross_entropy_forward", architecture_in_use);
  register_kernels<cross_entropy_forward_backward>(m, "cross_entropy_forward_backward", architecture_in_use);
  register_kernels<cross_entropy_backward_unless>(m, "cross_entropy_backward_unless_", architecture_in_use);
  register_kernels<cross_entropy_backward>(m, "cross_entropy_backward", architecture_in_use);
  register_kernels<cross_entropy_backward_inplace>(m, "cross_entropy_backward_", architecture_in_use);
}

}  // namespace rf::cuda
