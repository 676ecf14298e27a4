// linear_cross_entropy for every device: allocation, and results in the shapes and types that the ops return. RowLoss
// is what a device has of its own, made for a call: LinearCrossEntropyTensors with
//   device                     its memory for results
//   writes_x(), writes_w()     whether the loop writes all of these gradients
//   of_rows(upstream)          numbers per loss as the loop wants them, of the rows that take part; acc
//   of_all(results)            and back
//   run(outputs, upstream or null, gradients)   over_chunks, which gives the total as the device has it
//   reduced(total, type)       that as a tensor
//   finish(gradients)          those of a reduced loss, for an upstream gradient of 1
#pragma once
#include "shared/chunked_linear.h"
#include "shared/linear_cross_entropy_tensors.h"
#include "shared/op_checks.h"

namespace rf {
namespace linear_cross_entropy_ops {

using Operands = LinearCrossEntropyOperands;
using Options = CrossEntropyOptions;
using Outputs = LinearCrossEntropyOutputs;
using Gradients = LinearCrossEntropyGradients;
using Budget = std::optional<int64_t>;

inline std::vector<int64_t> loss_shape(const Operands& t) {
  return C10_AS_INTARRAYREF_SLOW(symbolic_loss_shape(t.input, t.linear_weight)).vec();
}

template <class RowLoss>
Outputs new_outputs(const RowLoss& p, int64_t reduction, int64_t outputs) {
  const auto per_loss = [&](bool wanted, at::ScalarType type) {
    return wanted ? p.device.empty({p.rows * p.positions}, p.x.options().dtype(type)) : Tensor();
  };
  const bool loss = outputs & kOutputLoss, each = reduction == at::Reduction::None;
  return {per_loss(loss && each, p.acc),
          per_loss(outputs & kOutputLse, p.acc),
          per_loss(outputs & kOutputEntropy, p.acc),
          per_loss(outputs & kOutputLogprob, p.acc),
          per_loss(outputs & kOutputArgmax, at::kLong),
          loss && !each};
}

template <class RowLoss>
Gradients new_gradients(const RowLoss& p, const Tensor& target, at::ScalarType dx_type, std::array<bool, 4> mask) {
  const auto options = p.x.options().dtype(p.acc);
  const auto matrix = [&](at::IntArrayRef sizes, at::ScalarType type, bool written) {
    Tensor t = p.device.empty(sizes, options.dtype(type));
    return written ? t : t.zero_();
  };
  Gradients g;
  if (mask[0]) g.x = matrix(p.x.sizes(), dx_type, p.writes_x());
  if (mask[1]) g.w = matrix({p.outputs, p.features}, p.acc, p.writes_w());
  if (mask[2]) g.bias = p.device.empty({p.outputs}, options);
  if (mask[3]) g.target = p.device.empty(p.probabilities.sizes(), target.options());
  return g;
}

// As the ops return them: in the shapes of what they belong to, and, rounded, in its types.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> shaped(const Device& device, const Gradients& g, const Operands& of,
                                                  bool rounded) {
  const auto finished = [&](const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
    if (!t.defined()) return device.empty({0}, like.options());
    const Tensor result = rounded ? as_type(t, like.scalar_type()) : t;
    return result.sizes() == sizes ? result : result.view(sizes);
  };
  const Tensor& weight = of.linear_weight;
  return {finished(g.x, of.input, of.input.sizes()), finished(g.w, weight, weight.sizes()),
          finished(g.bias, weight, weight.sizes().slice(0, weight.dim() - 1)),
          finished(g.target, of.target, of.target.sizes())};
}

template <class RowLoss>
std::vector<Tensor> forward(const Operands& t, const Options& o, int64_t outputs, Budget memory_budget,
                            OptionalType loss_dtype) {
  check_linear_cross_entropy_forward(t, o, outputs, memory_budget, loss_dtype);
  const bool every_row = outputs & ~(kOutputLoss | kOutputLogprob);
  RowLoss p(t, o, memory_budget, 0, every_row);
  const Outputs out = new_outputs(p, o.reduction, outputs);
  const auto total = p.run(out, nullptr, {});
  const auto type = loss_type(t.input, t.target, loss_dtype), other = loss_dtype.value_or(t.input.scalar_type());
  const auto shape = loss_shape(t);
  const auto finished = [&](const Tensor& each, at::ScalarType to) {
    return as_type(p.of_all(each).reshape(shape), to);
  };
  std::vector<Tensor> results;
  if (outputs & kOutputLoss) results.push_back(out.total ? p.reduced(total, type) : finished(out.loss, type));
  if (outputs & kOutputLse) results.push_back(finished(out.lse, other));
  if (outputs & kOutputEntropy) results.push_back(finished(out.entropy, other));
  if (outputs & kOutputLogprob) results.push_back(finished(out.logprob, type));
  if (outputs & kOutputArgmax) results.push_back(out.argmax.reshape(shape));
  return results;
}

template <class RowLoss>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward(const Operands& t, const Options& o,
                                                                    bool argmax_too, Budget memory_budget,
                                                                    double filter_eps, OptionalType loss_dtype,
                                                                    std::array<bool, 3> mask) {
  check_linear_cross_entropy_forward(t, o, kOutputLoss, memory_budget, loss_dtype, filter_eps);
  check_reduced("linear_cross_entropy_forward_backward", o.reduction);
  RowLoss p(t, o, memory_budget, filter_eps, argmax_too);
  const Gradients g = new_gradients(p, t.target, p.acc, {mask[0], mask[1], mask[2], false});
  const Outputs out = new_outputs(p, o.reduction, argmax_too ? kOutputLoss | kOutputArgmax : kOutputLoss);
  LinearCrossEntropyUpstream one;
  one.is_one = true;
  const auto total = p.run(out, &one, g);
  p.finish(g);
  auto [dx, dw, db, none] = shaped(p.device, g, t, false);
  return {p.reduced(total, loss_type(t.input, t.target, loss_dtype)),
          argmax_too ? out.argmax.reshape(loss_shape(t)) : p.device.empty({0}, t.input.options().dtype(at::kLong)), dx,
          dw, db};
}

template <class RowLoss>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const CrossEntropyOutputGrads& grads, const Operands& t,
                                                    const Options& o, Budget memory_budget, double filter_eps,
                                                    std::array<bool, 4> mask) {
  check_linear_cross_entropy_backward(grads, t, o, memory_budget, filter_eps, mask[3]);
  const bool every_row = grads.lse.has_value() || grads.entropy.has_value();
  RowLoss p(t, o, memory_budget, filter_eps, every_row);
  const Gradients g = new_gradients(p, t.target, t.input.scalar_type(), mask);
  const auto rows = [&](const OptionalTensor& t) { return t.has_value() ? p.of_rows(*t) : Tensor(); };
  const bool reduced = o.reduction != at::Reduction::None && grads.loss.has_value();
  const LinearCrossEntropyUpstream up = {.loss = reduced ? as_type(*grads.loss, p.acc) : rows(grads.loss),
                                         .lse = rows(grads.lse),
                                         .entropy = rows(grads.entropy),
                                         .logprob = rows(grads.logprob)};
  p.run({}, &up, g);
  return shaped(p.device, g, t, true);
}

}  // namespace linear_cross_entropy_ops

template <class RowLoss>
void register_linear_cross_entropy(torch::Library& m, std::string (*by)(const Tensor&)) {
  using namespace linear_cross_entropy_ops;
  register_kernels<forward<RowLoss>>(m, "linear_cross_entropy_forward", by);
  register_kernels<forward_backward<RowLoss>>(m, "linear_cross_entropy_forward_backward", by);
  register_kernels<backward<RowLoss>>(m, "linear_cross_entropy_backward", by);
}

}  // namespace rf
