// linear_nll for every device: tensors as matrices, allocation, and results in the shapes and types that the ops
// return. RowLoss is what a device has of its own, made for a call: LinearNllTensors with
//   device                     its memory for results
//   set_upstream(grad)         of each loss, or of the reduced one; without it that is 1
//   new_losses(type)           memory for the losses, which are returned in this type
//   run()                      the losses and gradients that there is memory for, and reduced ones if `value`
//   reduced(type)              the sum or mean of the losses
//   of_bias(), of_scale(one)   gradients, the latter for one number or one of each output; undefined where not wanted
//   finish(gradient)           what is left to be multiplied
#pragma once
#include "shared/chunked_linear.h"
#include "shared/op_checks.h"

namespace rf {

struct LinearNllTensors {
  Tensor x, w, target;      // rows x features, outputs x features, rows x outputs
  Tensor bias, row_weight;  // bias in the accumulator's type or its own, the weights in the former
  int64_t rows, features, outputs;
  DType dtype;
  at::ScalarType acc;
  Family family;
  int64_t reduction;
  // What is computed: gradients (undefined where not wanted; of w acc), of bias and scale, and the losses' sum.
  Tensor dx, dw;
  bool bias_too = false, scale_too = false, value = false;

  LinearNllTensors(const LinearNllOperands& t, const LinearNllOptions& o, bool wide_bias) {
    dtype = dtype_of(t.input.scalar_type());
    acc = acc_type(t.input.scalar_type());
    rows = rows_of(t.input);
    outputs = t.weight.size(0);
    features = t.weight.size(1);
    x = as_rows(t.input, rows, features);
    w = t.weight;
    target = as_rows(t.target, rows, outputs);
    if (t.bias.has_value()) bias = as_type(*t.bias, wide_bias ? acc : t.bias->scalar_type()).contiguous();
    if (t.sample_weight.has_value()) row_weight = t.sample_weight->to(acc).reshape({rows}).contiguous();
    family = (Family)o.family;
    reduction = o.reduction;
  }
  at::TensorOptions options() const { return x.options().dtype(acc); }
  bool empty() const { return rows == 0 || outputs == 0; }
  bool each() const { return reduction == at::Reduction::None; }
};

namespace linear_nll_ops {

using Operands = LinearNllOperands;
using Options = LinearNllOptions;

template <class RowLoss>
void new_gradients(RowLoss& p, at::ScalarType dx_type, std::array<bool, 4> mask) {
  const auto matrix = [&](at::IntArrayRef sizes, at::ScalarType type) {
    Tensor t = p.device.empty(sizes, p.x.options().dtype(type));
    return p.empty() ? t.zero_() : t;
  };
  if (mask[0]) p.dx = matrix({p.rows, p.features}, dx_type);
  if (mask[1]) p.dw = matrix({p.outputs, p.features}, p.acc);
  p.bias_too = mask[2];
  p.scale_too = mask[3];
}

// In the shapes of what they belong to, and, rounded, in its types.
template <class RowLoss>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_of(const RowLoss& p, const Operands& of, bool rounded) {
  const auto finished = [&](const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
    if (!t.defined()) return p.device.empty({0}, like.options());
    p.finish(t);
    const Tensor result = rounded ? as_type(t, like.scalar_type()) : t;
    return result.sizes() == sizes ? result : result.view(sizes);
  };
  const Tensor &weight = of.weight, &scale = of.scale.has_value() ? *of.scale : weight;
  return {finished(p.dx, of.input, of.input.sizes()), finished(p.dw, weight, weight.sizes()),
          finished(p.of_bias(), weight, weight.sizes().slice(0, 1)),
          finished(p.of_scale(scale.dim() == 0), scale, scale.sizes())};
}

template <class RowLoss>
Tensor forward(const Operands& t, const Options& o, OptionalType loss_dtype) {
  check_linear_nll_forward(t, o, loss_dtype);
  RowLoss p(t, o);
  const auto type = loss_type(t.input, t.target, loss_dtype);
  p.value = true;
  const Tensor losses = p.each() ? p.new_losses(type) : Tensor();
  p.run();
  return p.each() ? as_type(losses, type).view(t.target.sizes()) : p.reduced(type);
}

template <class RowLoss>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward(const Operands& t, const Options& o,
                                                                    OptionalType loss_dtype, std::array<bool, 4> mask) {
  check_linear_nll_forward(t, o, loss_dtype, mask[3]);
  check_reduced("linear_nll_forward_backward", o.reduction);
  RowLoss p(t, o);
  p.value = true;
  new_gradients(p, p.acc, mask);
  p.run();
  auto [dx, dw, db, ds] = gradients_of(p, t, false);
  return {p.reduced(loss_type(t.input, t.target, loss_dtype)), dx, dw, db, ds};
}

template <class RowLoss>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Operands& t, const Options& o,
                                                    std::array<bool, 4> mask) {
  check_linear_nll_backward(grad, t, o, mask[3]);
  RowLoss p(t, o);
  p.set_upstream(grad);
  new_gradients(p, p.dx_type(), mask);
  p.run();
  return gradients_of(p, t, true);
}

}  // namespace linear_nll_ops

template <class RowLoss>
void register_linear_nll(torch::Library& m, std::string (*by)(const Tensor&)) {
  using namespace linear_nll_ops;
  register_kernels<forward<RowLoss>>(m, "linear_nll_forward", by);
  register_kernels<forward_backward<RowLoss>>(m, "linear_nll_forward_backward", by);
  register_kernels<backward<RowLoss>>(m, "linear_nll_backward", by);
}

}  // namespace rf
