// regfast::linear_nll: a reduced loss has its gradients computed in forward, while the residuals are there, and saves
// them; a loss per element, or one whose saved tensors are packed away, saves its inputs alone and computes the
// predictions again in backward.
#include "shared/torch_api.h"

#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "autograd/saved_gradients.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Operands = LinearNllOperands;

struct Options : LinearNllOptions {
  OptionalType loss_dtype;

  auto members() const { return std::tuple_cat(LinearNllOptions::members(), std::tie(loss_dtype)); }
};

using ForwardSignature = Tensor(const Operands&, const Options&);
using ForwardBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Operands&, const Options&,
                                                                                    std::array<bool, 4>);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Operands&,
                                                                     const LinearNllOptions&, std::array<bool, 4>);
constexpr auto composite = op_of<ForwardSignature, "regfast::composite_linear_nll">;
constexpr auto forward = kernels_of<ForwardSignature, "regfast::linear_nll_forward">;
constexpr auto forward_backward = kernels_of<ForwardBackwardSignature, "regfast::linear_nll_forward_backward">;
constexpr auto backward_kernels = op_of<BackwardSignature, "regfast::linear_nll_backward">;

struct LinearNllBackward {
  using Options = rf::Options;
  // Input, weight, bias and a gaussian's variance; these, target, the rows' weights and four gradients.
  static constexpr int kInputs = 4, kSaved = 10;

  static variable_list backward(const Recorded<LinearNllBackward>& op, const variable_list& upstream) {
    const Options& o = op.options;
    const Tensor &x = op.saved[0], &w = op.saved[1], &b = op.saved[2], &v = op.saved[3], &target = op.saved[4];
    const auto sample_weight = optional(op.saved[5]);
    const Tensor& up = upstream[0];
    if (backward_takes_composite("linear_nll_backward", {&up, &x, &w, &target}))
      return composite_gradients({x, w, b, v}, {up}, [&](const std::vector<Tensor>& in) {
        return std::vector<Tensor>{
            composite({in[0], in[1], target, optional(in[2]), optional(in[3]), sample_weight}, o)};
      });
    const auto gradients = at::ArrayRef<Tensor>(op.saved).slice(6);
    if (auto taken = take_saved_gradients(up, gradients, {&x, &w, &b, &v}, op.needs)) return *taken;
    const auto [dx, dw, db, dv] =
        backward_kernels(up, {x, w, target, optional(b), optional(v), sample_weight}, o, op.needs);
    return op.wanted({&dx, &dw, &db, &dv});
  }
};

Tensor recorded(const Operands& t, const Options& o) {
  const Tensor &x = t.input, &w = t.weight, &b = value_or_undefined(t.bias), &v = value_or_undefined(t.scale);
  Tensor loss, dx, dw, db, dv;
  if (o.reduction != at::Reduction::None && !saved_tensors_are_packed()) {
    const std::array<bool, 4> mask = {x.requires_grad(), w.requires_grad(), b.defined() && b.requires_grad(),
                                      v.defined() && v.requires_grad()};
    std::tie(loss, dx, dw, db, dv) = forward_backward(t, o, mask);
    keep_wanted({&dx, &dw, &db, &dv}, mask);
  } else {
    loss = forward(t, o);
  }
  record<LinearNllBackward>(loss, {&x, &w, &b, &v},
                            {&x, &w, &b, &v, &t.target, &value_or_undefined(t.sample_weight), &dx, &dw, &db, &dv}, o);
  return loss;
}

bool any_unusual(const Operands& t) {
  return rf::any_unusual("linear_nll", {&t.input, &t.weight, &t.target, &value_or_undefined(t.bias),
                                        &value_or_undefined(t.scale), &value_or_undefined(t.sample_weight)});
}

Tensor linear_nll(const Operands& t, const Options& given) {
  const Tensor &b = value_or_undefined(t.bias), &v = value_or_undefined(t.scale),
               &s = value_or_undefined(t.sample_weight);
  Options o = given;
  if (any_unusual(t)) return composite(t, o);
  const bool gaussian = (Family)o.family == Family::gaussian;
  check_linear_nll((Family)o.family == Family::squared ? "linear_mse_loss" : "linear_nll", t, gaussian);
  o.loss_dtype = loss_type(t.input, t.target, o.loss_dtype);
  // Gradients of what is observed rather than fitted are rare.
  const bool observed = any_requires_grad({&t.target, &s}) || (!gaussian && any_requires_grad({&v}));
  const char* const special = observed ? "a target, weight or scale that requires grad" : nullptr;
  if (takes_composite("linear_nll", {&t.input, &t.weight, &t.target, &b, &v, &s}, special)) return composite(t, o);
  // One float64 number makes all of them float64: nothing is rounded to the accumulator's type.
  const auto wide = [](const Tensor& of) { return of.defined() && of.scalar_type() == at::kDouble; };
  const auto type = wide(t.target) || wide(v) || wide(s) ? at::kDouble : t.input.scalar_type();
  const Tensor x = as_type(t.input, type), w = as_type(t.weight, type);
  const OptionalTensor bias = b.defined() ? OptionalTensor(as_type(b, type)) : t.bias;
  const Operands converted = {x, w, t.target, bias, t.scale, t.sample_weight};
  return any_requires_grad({&x, &w, &b, &v}) ? recorded(converted, o) : forward(converted, o);
}

// As F.linear followed by a loss: products of autocast's type, a float32 loss.
Tensor autocast(const Operands& t, const Options& given) {
  if (any_unusual(t)) return composite(t, given);
  const Autocast cast(t.input);
  const Tensor x = cast(t.input);
  Options o = given;
  if (x.scalar_type() == cast.type && !o.loss_dtype)
    o.loss_dtype = c10::promoteTypes(at::kFloat, loss_type(x, t.target, std::nullopt));
  return linear_nll({x, cast(t.weight), t.target, cast(t.bias), t.scale, t.sample_weight}, o);
}

Tensor forward_meta(const Operands& t, const Options& o) {
  check_linear_nll_forward(t, o, o.loss_dtype);
  const auto options = t.input.options().dtype(loss_type(t.input, t.target, o.loss_dtype));
  return o.reduction == at::Reduction::None ? at::empty_symint(t.target.sym_sizes(), options) : at::empty({}, options);
}

// Gradients in a type of their own, or in that of what they belong to.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_meta(const Operands& t, std::array<bool, 4> mask,
                                                          OptionalType type) {
  const auto like = [&](bool wanted, const Tensor& of, c10::SymIntArrayRef sizes) {
    const auto options = wanted && type ? of.options().dtype(*type) : of.options();
    return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const Tensor &w = t.weight, &v = t.scale.has_value() ? *t.scale : w;
  return {like(mask[0], t.input, t.input.sym_sizes()), like(mask[1], w, w.sym_sizes()),
          like(mask[2], w, w.sym_sizes().slice(0, 1)), like(mask[3], v, v.sym_sizes())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_meta(const Operands& t, const Options& o,
                                                                         std::array<bool, 4> mask) {
  check_linear_nll_forward(t, o, o.loss_dtype, mask[3]);
  check_reduced("linear_nll_forward_backward", o.reduction);
  auto [dx, dw, db, dv] = gradients_meta(t, mask, acc_type(t.input.scalar_type()));
  return {at::empty({}, t.input.options().dtype(loss_type(t.input, t.target, o.loss_dtype))), dx, dw, db, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const Tensor& grad, const Operands& t,
                                                         const LinearNllOptions& o, std::array<bool, 4> mask) {
  check_linear_nll_backward(grad, t, o, mask[3]);
  return gradients_meta(t, mask, std::nullopt);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<linear_nll, composite, autocast>(m, "linear_nll");
  register_meta<forward_meta>(m, "linear_nll_forward");
  register_meta<forward_backward_meta>(m, "linear_nll_forward_backward");
  register_meta<backward_meta>(m, "linear_nll_backward");
}

}  // namespace rf
