// regfast::linear_nll: a reduced loss has its gradients computed in forward, while the residuals are there, and saves
// them; a loss per element, or one whose saved tensors are packed away, saves its inputs alone and computes the
// predictions again in backward.
#include "autograd/register.h"
#include "autograd/saved_gradients.h"
#include "autograd/saved_options.h"
#include "shared/op_checks.h"
#include "shared/torch_api.h"

namespace rf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

Tensor composite(const Operands& t, const Options& o) {
  static const auto op = find_op<ForwardSignature>("regfast::composite_linear_nll");
  return op.call(t, o);
}

Tensor forward(const Operands& t, const Options& o) {
  static const auto op = find_op<ForwardSignature>("regfast::linear_nll_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(t, o);
}

// The differentiable inputs: x, w, bias and a gaussian's variance, at these places among forward's arguments.
constexpr int kPlaces[] = {0, 1, 3, 4};

struct LinearNllFunction : torch::autograd::Function<LinearNllFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, const Tensor& target,
                        const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& sample_weight,
                        const Options& o) {
    const Tensor &b = value_or_undefined(bias), &v = value_or_undefined(scale);
    variable_list saved = {x, w, target, b, v, value_or_undefined(sample_weight)};
    Tensor result;
    if (o.reduction != at::Reduction::None && !saved_tensors_are_packed()) {
      at::AutoDispatchBelowADInplaceOrView below;
      static const auto op = find_op<ForwardBackwardSignature>("regfast::linear_nll_forward_backward");
      const std::array<bool, 4> mask = {x.requires_grad(), w.requires_grad(), b.defined() && b.requires_grad(),
                                        v.defined() && v.requires_grad()};
      auto [loss, dx, dw, db, dv] = op.call({x, w, target, bias, scale, sample_weight}, o, mask);
      result = loss;
      for (const auto& [g, wanted] : {std::pair{dx, mask[0]}, {dw, mask[1]}, {db, mask[2]}, {dv, mask[3]}})
        saved.push_back(wanted ? g : Tensor());
    } else {
      result = rf::forward({x, w, target, bias, scale, sample_weight}, o);
    }
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, o);
    ctx->set_materialize_grads(false);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    variable_list result(7);
    const Tensor& up = upstream[0];
    if (!up.defined()) return result;
    const auto o = saved_options<Options>(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor *inputs[] = {&saved[0], &saved[1], &saved[3], &saved[4]}, &target = saved[2];
    const auto sample_weight = optional(saved[5]);
    if (backward_takes_composite("linear_nll_backward", {&up, inputs[0], inputs[1], &target})) {
      auto g = composite_gradients(
          {*inputs[0], *inputs[1], *inputs[2], *inputs[3]}, {up}, [&](const std::vector<Tensor>& in) {
            return std::vector<Tensor>{
                composite({in[0], in[1], target, optional(in[2]), optional(in[3]), sample_weight}, o)};
          });
      for (int i = 0; i < 4; ++i) result[kPlaces[i]] = g[i];
      return result;
    }
    // Edges are counted among the tensors that were given: a variance without bias has the place before its own.
    const size_t edges[] = {0, 1, 3, inputs[2]->defined() ? 4u : 3u};
    std::array<bool, 4> mask;
    for (int i = 0; i < 4; ++i) mask[i] = inputs[i]->defined() && ctx->needs_input_grad(edges[i]);
    if (take_saved_gradients(up, at::ArrayRef<Tensor>(saved).slice(6), inputs, mask, kPlaces, result)) return result;
    static const auto op = find_op<BackwardSignature>("regfast::linear_nll_backward");
    auto [dx, dw, db, dv] = op.call(
        up, {*inputs[0], *inputs[1], target, optional(*inputs[2]), optional(*inputs[3]), sample_weight}, o, mask);
    const Tensor* grads[] = {&dx, &dw, &db, &dv};
    for (int i = 0; i < 4; ++i)
      if (mask[i]) result[kPlaces[i]] = *grads[i];
    return result;
  }
};

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
  const Tensor x = t.input.to(type), w = t.weight.to(type);
  const OptionalTensor bias = b.defined() ? OptionalTensor(b.to(type)) : t.bias;
  if (any_requires_grad({&x, &w, &b, &v}))
    return LinearNllFunction::apply(x, w, t.target, bias, t.scale, t.sample_weight, o);
  return forward({x, w, t.target, bias, t.scale, t.sample_weight}, o);
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
