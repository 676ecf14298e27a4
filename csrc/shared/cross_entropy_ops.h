// cross_entropy for every device: tensors to plain structs, allocation, results in the order that the op returns them.
// Device is what one has of its own: memory for results, and
//   tensors(operands, options)   CrossEntropyTensors with the device's arguments
//   kSumsRows                    whether its reduced losses are sums of losses that each have their memory
//   forward, forward_backward, backward   its kernels; the first two give the reduced loss and the mean's denominator
//   knows(grad, value)           whether it can tell, without waiting, that an upstream gradient has a value
#pragma once
#include "shared/cross_entropy_tensors.h"
#include "shared/op_checks.h"

namespace rf {

struct CrossEntropyTotal {
  Tensor loss, denominator;  // loss of the type that is asked for, undefined if none is; denominator float64
};

namespace cross_entropy_ops {

using Operands = CrossEntropyOperands;
using Options = CrossEntropyOptions;

// Memory for the rows' statistics, which its arguments point to from then on.
template <class Device, class Tensors>
Tensor new_stats(const Device& device, Tensors& t, bool entropy) {
  const Tensor stats = device.empty({cross_entropy_stat_rows(t.probabilities.defined(), entropy), t.rows},
                                    t.x.options().dtype(acc_type(t.x.scalar_type())));
  point_to_stats(t.args, stats);
  return stats;
}

// The outputs asked for, then the rows' statistics and the mean's denominator.
template <class Device>
std::vector<Tensor> forward(const Operands& given, const Options& o, int64_t outputs, OptionalType loss_dtype) {
  check_cross_entropy_forward(given, o, outputs, loss_dtype);
  const Tensor& input = given.input;
  const Device device(input);
  auto t = device.tensors(given, o);
  const Tensor stats = new_stats(device, t, outputs & kOutputEntropy);
  const auto row_shape = reduced_sizes(input, class_dim(input), false);
  const auto acc = acc_type(input.scalar_type()), type = loss_dtype.value_or(input.scalar_type());
  const auto per_row = [&](bool wanted, at::ScalarType of) {
    return wanted ? device.empty(row_shape, input.options().dtype(of)) : Tensor();
  };
  const bool loss_too = outputs & kOutputLoss, each = o.reduction == at::Reduction::None;
  const Tensor loss = per_row(loss_too && (each || Device::kSumsRows), acc), lse = per_row(outputs & kOutputLse, acc),
               logprob = per_row(outputs & kOutputLogprob, acc), argmax = per_row(outputs & kOutputArgmax, at::kLong);
  const CrossEntropyOutputs out = {data_or_null(loss), data_or_null(lse), data_or_null(logprob),
                                   (int64_t*)data_or_null(argmax)};
  const CrossEntropyTotal total = device.forward(t, o, out, loss_too && !each ? OptionalType(type) : std::nullopt);

  std::vector<Tensor> results;
  results.reserve(7);
  if (loss_too) results.push_back(each ? loss.to(type) : total.loss);
  if (outputs & kOutputLse) results.push_back(lse.to(type));
  if (outputs & kOutputEntropy) results.push_back(stats[kEntropy].reshape(row_shape).to(type, false, true));
  if (outputs & kOutputLogprob) results.push_back(logprob.to(type));
  if (outputs & kOutputArgmax) results.push_back(argmax);
  results.push_back(stats);
  results.push_back(total.denominator);
  return results;
}

// A reduced loss, statistics, denominator, and the logits' gradient for an upstream gradient that is known.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_backward(const Operands& given, const Options& o,
                                                            OptionalType loss_dtype, double upstream) {
  check_reduced("cross_entropy_forward_backward", o.reduction);
  check_cross_entropy_forward(given, o, kOutputLoss, loss_dtype);
  const Tensor& input = given.input;
  const Device device(input);
  auto t = device.tensors(given, o);
  const Tensor stats = new_stats(device, t, false), grad = device.empty_like(input),
               dx = as_strided_rows(grad, class_dim(input));
  CrossEntropyBackward g = {};
  g.grad_logits = dx.mutable_data_ptr();
  g.grad_layout = *row_layout(dx, class_dim(input));
  const CrossEntropyTotal total =
      device.forward_backward(t, o, g, (int64_t)dx.nbytes(), upstream, loss_dtype.value_or(input.scalar_type()));
  if (!dx.is_same(grad)) grad.copy_(dx);
  return {total.loss, stats, total.denominator, grad};
}

// Gradients into grad_input (laid out in any way) and into a new tensor for the probabilities. `unless`: nothing is to
// be done where the upstream gradient has this value.
template <class Device>
Tensor backward_into(const Tensor* grad_input, const CrossEntropyOutputGrads& grads, const Operands& given,
                     const Tensor& stats, const Tensor& weight_sum, const Options& o, bool grad_target,
                     double unless = NAN) {
  const Tensor &input = given.input, &target = given.target;
  const Device device(input);
  auto t = device.tensors(given, o);
  point_to_stats(t.args, stats);
  const CrossEntropyRowGrads rows(grads, acc_type(input.scalar_type()));
  CrossEntropyBackward g = {};
  rows.point_to(g);
  g.loss_stride = o.reduction == at::Reduction::None ? 1 : 0;

  const int64_t dim = class_dim(input);
  Tensor dx, dt = device.empty({0}, input.options());
  if (grad_input) {
    dx = as_strided_rows(*grad_input, dim);
    g.grad_logits = dx.mutable_data_ptr();
    g.grad_layout = *row_layout(dx, dim);
  }
  if (grad_target) {
    dt = device.empty(target.sizes(), target.options());
    g.grad_probabilities = dt.mutable_data_ptr();
    g.grad_probability_layout = *row_layout(dt, dim);
  }
  const double* const denominator = o.reduction == at::Reduction::Mean ? weight_sum.const_data_ptr<double>() : nullptr;
  if (input.numel() > 0) device.backward(t, g, (int64_t)(grad_input ? dx.nbytes() : 0), denominator, unless);
  if (grad_input && !dx.is_same(*grad_input)) grad_input->copy_(dx);
  return dt;
}

template <class Device>
std::tuple<Tensor, Tensor> backward(const CrossEntropyOutputGrads& grads, const Operands& t, const Tensor& stats,
                                    const Tensor& weight_sum, const Options& o, std::array<bool, 2> mask) {
  check_cross_entropy_backward("cross_entropy_backward", grads, t, stats, weight_sum, o, mask[1]);
  const Device device(t.input);
  Tensor dx = mask[0] ? device.empty_like(t.input) : device.empty({0}, t.input.options());
  Tensor dt = backward_into<Device>(mask[0] ? &dx : nullptr, grads, t, stats, weight_sum, o, mask[1]);
  return {dx, dt};
}

template <class Device>
Tensor backward_inplace(const CrossEntropyOutputGrads& grads, const Operands& t, const Tensor& stats,
                        const Tensor& weight_sum, const Options& o, bool grad_target) {
  check_cross_entropy_backward("cross_entropy_backward_", grads, t, stats, weight_sum, o, grad_target, &t.input);
  t.input.unsafeGetTensorImpl()->bump_version();
  return backward_into<Device>(&t.input, grads, t, stats, weight_sum, o, grad_target);
}

template <class Device>
void backward_unless(const Tensor& grad_loss, const Operands& t, const Tensor& stats, const Tensor& weight_sum,
                     const Options& o, const Tensor& grad, double upstream) {
  check_cross_entropy_unless(grad_loss, t, stats, weight_sum, o, grad, upstream);
  if (!Device::knows(grad_loss, upstream))
    backward_into<Device>(&grad, {grad_loss, {}, {}, {}}, t, stats, weight_sum, o, false, upstream);
}

}  // namespace cross_entropy_ops

template <class Device>
void register_cross_entropy(torch::Library& m, std::string (*by)(const Tensor&)) {
  using namespace cross_entropy_ops;
  register_kernels<forward<Device>>(m, "cross_entropy_forward", by);
  register_kernels<forward_backward<Device>>(m, "cross_entropy_forward_backward", by);
  register_kernels<backward_unless<Device>>(m, "cross_entropy_backward_unless_", by);
  register_kernels<backward<Device>>(m, "cross_entropy_backward", by);
  register_kernels<backward_inplace<Device>>(m, "cross_entropy_backward_", by);
}

}  // namespace rf
