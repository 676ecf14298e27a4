// regfast::linear_nll: a reduced loss has its gradients computed in forward, while the residuals are there, and saves
// them; a loss per element, or one whose saved tensors are packed away, saves its inputs alone and computes the
// predictions again in backward.
#include "autograd/saved_gradients.h"
#include "shared/op_checks.h"
#include "shared/torch_api.h"

namespace rf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using ScalarTypes = std::optional<at::ScalarType>;

struct Operands {
  Tensor x, w, target;
  OptionalTensor bias, scale, sample_weight;
};
struct Options {
  int64_t family;
  double variance;
  bool full;
  int64_t reduction;
  ScalarTypes loss_dtype;
};

#define RF_LINEAR_NLL                                                                                               \
  const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, \
      int64_t, double, bool, int64_t
using ForwardSignature = Tensor(RF_LINEAR_NLL, ScalarTypes);
using ForwardBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(RF_LINEAR_NLL, ScalarTypes,
                                                                                    std::array<bool, 4>);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, RF_LINEAR_NLL, std::array<bool, 4>);
#undef RF_LINEAR_NLL

Tensor composite(const Operands& t, const Options& o) {
  static const auto op = find_op<ForwardSignature>("regfast::composite_linear_nll");
  return op.call(t.x, t.w, t.target, t.bias, t.scale, t.sample_weight, o.family, o.variance, o.full, o.reduction,
                 o.loss_dtype);
}

Tensor forward(const Operands& t, const Options& o) {
  static const auto op = find_op<ForwardSignature>("regfast::linear_nll_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(t.x, t.w, t.target, t.bias, t.scale, t.sample_weight, o.family, o.variance, o.full, o.reduction,
                 o.loss_dtype);
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
      auto [loss, dx, dw, db, dv] = op.call(x, w, target, bias, scale, sample_weight, o.family, o.variance, o.full,
                                            o.reduction, o.loss_dtype, mask);
      result = loss;
      for (const auto& [g, wanted] : {std::pair{dx, mask[0]}, {dw, mask[1]}, {db, mask[2]}, {dv, mask[3]}})
        saved.push_back(wanted ? g : Tensor());
    } else {
      result = rf::forward({x, w, target, bias, scale, sample_weight}, o);
    }
    ctx->save_for_backward(std::move(saved));
    auto& d = ctx->saved_data;
    d["family"] = o.family;
    d["variance"] = o.variance;
    d["full"] = o.full;
    d["reduction"] = o.reduction;
    d["loss_dtype"] = o.loss_dtype;
    ctx->set_materialize_grads(false);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    variable_list result(7);
    const Tensor& up = upstream[0];
    if (!up.defined()) return result;
    auto& d = ctx->saved_data;
    const Options o = {d["family"].toInt(), d["variance"].toDouble(), d["full"].toBool(), d["reduction"].toInt(),
                       d["loss_dtype"].toOptional<at::ScalarType>()};
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
    auto [dx, dw, db, dv] = op.call(up, *inputs[0], *inputs[1], target, optional(*inputs[2]), optional(*inputs[3]),
                                    sample_weight, o.family, o.variance, o.full, o.reduction, mask);
    const Tensor* grads[] = {&dx, &dw, &db, &dv};
    for (int i = 0; i < 4; ++i)
      if (mask[i]) result[kPlaces[i]] = *grads[i];
    return result;
  }
};

Tensor linear_nll(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                  const OptionalTensor& scale, const OptionalTensor& sample_weight, int64_t family, double variance,
                  bool full, int64_t reduction, ScalarTypes loss_dtype) {
  Options o = {family, variance, full, reduction, loss_dtype};
  const Tensor &b = value_or_undefined(bias), &v = value_or_undefined(scale), &s = value_or_undefined(sample_weight);
  if (any_unusual("linear_nll", {&x, &w, &target, &b, &v, &s}))
    return composite({x, w, target, bias, scale, sample_weight}, o);
  const bool gaussian = (Family)family == Family::gaussian;
  check_linear_nll((Family)family == Family::squared ? "linear_mse_loss" : "linear_nll", x, w, target, b, v, s,
                   gaussian);
  o.loss_dtype = loss_type(x, target, loss_dtype);
  // Gradients of what is observed rather than fitted are rare.
  const bool observed = any_requires_grad({&target, &s}) || (!gaussian && any_requires_grad({&v}));
  const char* const special = observed ? "a target, weight or scale that requires grad" : nullptr;
  if (takes_composite("linear_nll", {&x, &w, &target, &b, &v, &s}, special))
    return composite({x, w, target, bias, scale, sample_weight}, o);
  // One float64 number makes all of them float64: nothing is rounded to the accumulator's type.
  const auto wide = [](const Tensor& t) { return t.defined() && t.scalar_type() == at::kDouble; };
  const auto type = wide(target) || wide(v) || wide(s) ? at::kDouble : x.scalar_type();
  const OptionalTensor typed_bias = b.defined() ? OptionalTensor(b.to(type)) : bias;
  const Operands t = {x.to(type), w.to(type), target, typed_bias, scale, sample_weight};
  if (any_requires_grad({&t.x, &t.w, &b, &v}))
    return LinearNllFunction::apply(t.x, t.w, t.target, t.bias, t.scale, t.sample_weight, o);
  return forward(t, o);
}

Tensor batched(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
               const OptionalTensor& scale, const OptionalTensor& sample_weight, int64_t family, double variance,
               bool full, int64_t reduction, ScalarTypes loss_dtype) {
  return composite({x, w, target, bias, scale, sample_weight}, {family, variance, full, reduction, loss_dtype});
}

// As F.linear followed by a loss: products of autocast's type, a float32 loss.
Tensor autocast(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                const OptionalTensor& scale, const OptionalTensor& sample_weight, int64_t family, double variance,
                bool full, int64_t reduction, ScalarTypes loss_dtype) {
  const Tensor &b = value_or_undefined(bias), &v = value_or_undefined(scale), &s = value_or_undefined(sample_weight);
  if (any_unusual("linear_nll", {&x, &w, &target, &b, &v, &s}))
    return composite({x, w, target, bias, scale, sample_weight}, {family, variance, full, reduction, loss_dtype});
  const auto device = x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto to = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(to, t, device); };
  const Tensor input = cast(x);
  if (input.scalar_type() == to && !loss_dtype)
    loss_dtype = c10::promoteTypes(at::kFloat, loss_type(input, target, std::nullopt));
  return linear_nll(input, cast(w), target, cast(bias), scale, sample_weight, family, variance, full, reduction,
                    loss_dtype);
}

Tensor forward_meta(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                    const OptionalTensor& scale, const OptionalTensor& sample_weight, int64_t family, double, bool,
                    int64_t reduction, ScalarTypes loss_dtype) {
  check_linear_nll_forward(x, w, target, bias, scale, sample_weight, family, reduction, loss_dtype);
  const auto options = x.options().dtype(loss_type(x, target, loss_dtype));
  return reduction == at::Reduction::None ? at::empty_symint(target.sym_sizes(), options) : at::empty({}, options);
}

// Gradients in a type of their own, or in that of what they belong to.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_meta(const Tensor& x, const Tensor& w, const OptionalTensor& scale,
                                                          std::array<bool, 4> mask, ScalarTypes type) {
  const auto like = [&](bool wanted, const Tensor& t, c10::SymIntArrayRef sizes) {
    const auto options = wanted && type ? t.options().dtype(*type) : t.options();
    return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const Tensor& v = scale.has_value() ? *scale : w;
  return {like(mask[0], x, x.sym_sizes()), like(mask[1], w, w.sym_sizes()), like(mask[2], w, w.sym_sizes().slice(0, 1)),
          like(mask[3], v, v.sym_sizes())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_meta(
    const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& sample_weight, int64_t family, double, bool, int64_t reduction, ScalarTypes loss_dtype,
    std::array<bool, 4> mask) {
  check_linear_nll_forward(x, w, target, bias, scale, sample_weight, family, reduction, loss_dtype, mask[3]);
  check_reduced("linear_nll_forward_backward", reduction);
  auto [dx, dw, db, dv] = gradients_meta(x, w, scale, mask, acc_type(x.scalar_type()));
  return {at::empty({}, x.options().dtype(loss_type(x, target, loss_dtype))), dx, dw, db, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                         const Tensor& target, const OptionalTensor& bias,
                                                         const OptionalTensor& scale,
                                                         const OptionalTensor& sample_weight, int64_t family, double,
                                                         bool, int64_t reduction, std::array<bool, 4> mask) {
  check_linear_nll_backward(grad, x, w, target, bias, scale, sample_weight, family, reduction, mask[3]);
  return gradients_meta(x, w, scale, mask, std::nullopt);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, Autograd, m) { m.impl("linear_nll", linear_nll); }
TORCH_LIBRARY_IMPL(regfast, CompositeExplicitAutograd, m) { m.impl("linear_nll", linear_nll); }
TORCH_LIBRARY_IMPL(regfast, FuncTorchBatched, m) { register_batched<batched>(m, "linear_nll"); }
TORCH_LIBRARY_IMPL(regfast, AutocastCPU, m) { m.impl("linear_nll", autocast); }
TORCH_LIBRARY_IMPL(regfast, AutocastCUDA, m) { m.impl("linear_nll", autocast); }
TORCH_LIBRARY_IMPL(regfast, Meta, m) {
  m.impl("linear_nll_forward", forward_meta);
  m.impl("linear_nll_forward_backward", forward_backward_meta);
  m.impl("linear_nll_backward", backward_meta);
}

}  // namespace rf
