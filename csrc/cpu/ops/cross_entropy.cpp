// cross_entropy on the CPU: tensors to plain structs and allocation.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/tuning.h"
#include "shared/cross_entropy_tensors.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

CrossEntropyTensors<CrossEntropyArgs> tensors_of(const CrossEntropyOperands& given, const CrossEntropyOptions& o) {
  auto t = cross_entropy_tensors<CrossEntropyArgs>(given, o);
  const bool needed = given.weight.has_value() && o.label_smoothing != 0;
  t.args.class_weight_sum = needed ? ordered_sum(t.weight) : (double)t.args.classes;
  return t;
}

void check_row(const CrossEntropyArgs& a, int64_t bad) {
  RF_CHECK(TORCH_CHECK_INDEX, bad < 0, "cross_entropy", "target", c10::str("classes from 0 to ", a.classes - 1),
           c10::str("Target ", a.target[bad], " is out of bounds."));
}

// Of rows whose classes' weights are to be summed in the same order wherever the mean is needed.
double denominator_of(const CrossEntropyTensors<CrossEntropyArgs>& t) {
  return cross_entropy_denominator(t.dtype, t.args, t.rows);
}

std::vector<Tensor> cross_entropy_forward_cpu(const CrossEntropyOperands& given, const CrossEntropyOptions& o,
                                              int64_t outputs, OptionalType loss_dtype) {
  check_cross_entropy_forward(given, o, outputs, loss_dtype);
  auto t = tensors_of(given, o);
  const Tensor& input = given.input;
  const auto row_shape = reduced_sizes(input, class_dim(input), false);
  const auto acc = acc_type(input.scalar_type()), result_type = loss_dtype.value_or(input.scalar_type());
  const auto acc_options = input.options().dtype(acc);
  Tensor stats =
      at::empty({cross_entropy_stat_rows(t.probabilities.defined(), outputs & kOutputEntropy), t.rows}, acc_options);
  point_to_stats(t.args, stats);

  CrossEntropyOutputs out = {};
  Tensor loss, lse, logprob, argmax;
  const bool rowwise = o.reduction == at::Reduction::None && (outputs & kOutputLoss);
  if (rowwise) out.loss = (loss = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLse) out.lse = (lse = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputLogprob) out.logprob = (logprob = at::empty(row_shape, acc_options)).mutable_data_ptr();
  if (outputs & kOutputArgmax)
    out.argmax = (argmax = at::empty(row_shape, input.options().dtype(at::kLong))).mutable_data_ptr<int64_t>();

  CrossEntropyPartial sums = cross_entropy_forward(t.dtype, t.args, out, t.rows);
  check_row(t.args, sums.bad_row);
  if (given.weight.has_value()) sums.weight = denominator_of(t);

  std::vector<Tensor> results;
  if (outputs & kOutputLoss) {
    if (rowwise)
      results.push_back(loss.to(result_type));
    else
      results.push_back(
          number(o.reduction == at::Reduction::Mean ? mean_of(sums.loss, sums.weight) : sums.loss, result_type));
  }
  if (outputs & kOutputLse) results.push_back(lse.to(result_type));
  if (outputs & kOutputEntropy) results.push_back(stats[kEntropy].reshape(row_shape).to(result_type, false, true));
  if (outputs & kOutputLogprob) results.push_back(logprob.to(result_type));
  if (outputs & kOutputArgmax) results.push_back(argmax);
  results.push_back(stats);
  results.push_back(number(sums.weight, at::kDouble));
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward_cpu(const CrossEntropyOperands& given,
                                                                              const CrossEntropyOptions& o,
                                                                              OptionalType loss_dtype,
                                                                              double upstream) {
  check_reduced("cross_entropy_forward_backward", o.reduction);
  check_cross_entropy_forward(given, o, kOutputLoss, loss_dtype);
  auto t = tensors_of(given, o);
  const Tensor& input = given.input;
  const auto acc = acc_type(input.scalar_type());
  const int64_t dim = class_dim(input);
  const bool mean = o.reduction == at::Reduction::Mean;
  const Tensor stats = at::empty({cross_entropy_stat_rows(t.probabilities.defined(), false), t.rows},
                                 input.options().dtype(acc)),
               grad = empty_result_like(input), dx = as_strided_rows(grad, dim);
  point_to_stats(t.args, stats);
  const double denominator = denominator_of(t), wide = upstream;
  const float single = (float)upstream;
  CrossEntropyGrads g = {};
  g.loss = acc == at::kDouble ? (const void*)&wide : &single;
  g.loss_scale = mean ? 1 / denominator : 1;
  g.grad_logits = dx.mutable_data_ptr();
  g.grad_layout = *row_layout(dx, dim);
  g.stream = (int64_t)dx.nbytes() >= tuning::kStreamBytes;
  const CrossEntropyPartial sums = cross_entropy_forward_backward(t.dtype, t.args, {}, g, t.rows);
  check_row(t.args, sums.bad_row);
  if (!dx.is_same(grad)) grad.copy_(dx);
  return {number(mean ? mean_of(sums.loss, denominator) : sums.loss, loss_dtype.value_or(input.scalar_type())), stats,
          number(denominator, at::kDouble), grad};
}

// Gradients into grad_input (laid out in any way) and into a new tensor for the probabilities.
Tensor cross_entropy_backward_into(const Tensor* grad_input, const CrossEntropyOutputGrads& grads,
                                   const CrossEntropyOperands& given, const Tensor& stats, const Tensor& weight_sum,
                                   const CrossEntropyOptions& o, bool grad_target) {
  const Tensor &input = given.input, &target = given.target;
  auto t = tensors_of(given, o);
  point_to_stats(t.args, stats);
  const CrossEntropyRowGrads rows(grads, acc_type(input.scalar_type()));
  CrossEntropyGrads g = {};
  rows.point_to(g);
  g.loss_stride = o.reduction == at::Reduction::None ? 1 : 0;
  g.loss_scale = o.reduction == at::Reduction::Mean ? 1.0 / *weight_sum.const_data_ptr<double>() : 1.0;

  const int64_t dim = class_dim(input);
  Tensor dx, dt = at::empty({0}, input.options());
  if (grad_input) {
    dx = as_strided_rows(*grad_input, dim);
    g.grad_logits = dx.mutable_data_ptr();
    g.grad_layout = *row_layout(dx, dim);
    g.stream = (int64_t)dx.nbytes() >= tuning::kStreamBytes;
  }
  if (grad_target) {
    dt = empty_result(target.sizes(), target.options());
    g.grad_probabilities = dt.mutable_data_ptr();
    g.grad_probability_layout = *row_layout(dt, dim);
  }
  check_row(t.args, cross_entropy_backward(t.dtype, t.args, g, t.rows));
  if (grad_input && !dx.is_same(*grad_input)) grad_input->copy_(dx);
  return dt;
}

std::tuple<Tensor, Tensor> cross_entropy_backward_cpu(const CrossEntropyOutputGrads& grads,
                                                      const CrossEntropyOperands& t, const Tensor& stats,
                                                      const Tensor& weight_sum, const CrossEntropyOptions& o,
                                                      std::array<bool, 2> mask) {
  check_cross_entropy_backward("cross_entropy_backward", grads, t, stats, weight_sum, o, mask[1]);
  Tensor dx = mask[0] ? empty_result_like(t.input) : at::empty({0}, t.input.options());
  Tensor dt = cross_entropy_backward_into(mask[0] ? &dx : nullptr, grads, t, stats, weight_sum, o, mask[1]);
  return {dx, dt};
}

Tensor cross_entropy_backward_inplace_cpu(const CrossEntropyOutputGrads& grads, const CrossEntropyOperands& t,
                                          const Tensor& stats, const Tensor& weight_sum, const CrossEntropyOptions& o,
                                          bool grad_target) {
  check_cross_entropy_backward("cross_entropy_backward_", grads, t, stats, weight_sum, o, grad_target, &t.input);
  t.input.unsafeGetTensorImpl()->bump_version();
  return cross_entropy_backward_into(&t.input, grads, t, stats, weight_sum, o, grad_target);
}

void cross_entropy_backward_unless_cpu(const Tensor& grad_loss, const CrossEntropyOperands& t, const Tensor& stats,
                                       const Tensor& weight_sum, const CrossEntropyOptions& o, const Tensor& grad,
                                       double upstream) {
  check_cross_entropy_unless(grad_loss, t, stats, weight_sum, o, grad, upstream);
  if (grad_loss.item<double>() != upstream)
    cross_entropy_backward_into(&grad, {grad_loss, {}, {}, {}}, t, stats, weight_sum, o, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<cross_entropy_forward_cpu>(m, "cross_entropy_forward", isa_in_use);
  register_kernels<cross_entropy_forward_backward_cpu>(m, "cross_entropy_forward_backward", isa_in_use);
  register_kernels<cross_entropy_backward_unless_cpu>(m, "cross_entropy_backward_unless_", isa_in_use);
  register_kernels<cross_entropy_backward_cpu>(m, "cross_entropy_backward", isa_in_use);
  register_kernels<cross_entropy_backward_inplace_cpu>(m, "cross_entropy_backward_", isa_in_use);
}

}  // namespace rf
