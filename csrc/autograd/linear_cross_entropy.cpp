// regfast::linear_cross_entropy: a reduced loss has its gradients computed in forward, chunk by chunk while the logits
// are there, and saves them; anything else saves its inputs alone and computes the logits again in backward, and so
// does a reduced loss whose saved tensors are packed away.
#include "autograd/saved_gradients.h"
#include "shared/cross_entropy_options.h"
#include "shared/op_checks.h"
#include "shared/torch_api.h"

namespace rf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options : CrossEntropyOptions {
  std::optional<int64_t> memory_budget;
  double filter_eps;

  void save(AutogradContext* ctx) const {
    CrossEntropyOptions::save(ctx);
    ctx->saved_data["memory_budget"] = memory_budget;
    ctx->saved_data["filter_eps"] = filter_eps;
  }
  static Options saved(AutogradContext* ctx) {
    auto& d = ctx->saved_data;
    return {CrossEntropyOptions::saved(ctx), d["memory_budget"].toOptional<int64_t>(), d["filter_eps"].toDouble()};
  }
};

struct Operands {
  Tensor x, w, target;
  OptionalTensor bias, weight;
};

#define RF_OPERANDS const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&
#define RF_LOSS_OPTIONS int64_t, int64_t, double, double, std::optional<double>, std::optional<double>
using ScalarTypes = std::optional<at::ScalarType>;
using Budget = std::optional<int64_t>;
using CompositeSignature = std::vector<Tensor>(RF_OPERANDS, RF_LOSS_OPTIONS, int64_t, ScalarTypes);
using ForwardSignature = std::vector<Tensor>(RF_OPERANDS, RF_LOSS_OPTIONS, int64_t, Budget, ScalarTypes);
using ForwardBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(RF_OPERANDS, RF_LOSS_OPTIONS, bool,
                                                                                    Budget, double, ScalarTypes,
                                                                                    std::array<bool, 3>);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const OptionalTensor&, const OptionalTensor&,
                                                                     const OptionalTensor&, const OptionalTensor&,
                                                                     RF_OPERANDS, RF_LOSS_OPTIONS, Budget, double,
                                                                     std::array<bool, 4>);
#undef RF_OPERANDS
#undef RF_LOSS_OPTIONS

std::vector<Tensor> composite(const Operands& t, const Options& o) {
  static const auto op = find_op<CompositeSignature>("regfast::composite_linear_cross_entropy");
  return op.call(t.x, t.w, t.target, t.bias, t.weight, o.ignore_index, o.reduction, o.label_smoothing, o.z_loss,
                 o.softcap, o.logit_scale, o.outputs, o.loss_dtype);
}

std::vector<Tensor> forward(const Operands& t, const Options& o) {
  static const auto op = find_op<ForwardSignature>("regfast::linear_cross_entropy_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(t.x, t.w, t.target, t.bias, t.weight, o.ignore_index, o.reduction, o.label_smoothing, o.z_loss,
                 o.softcap, o.logit_scale, o.outputs, o.memory_budget, o.loss_dtype);
}

// Whether forward computes the gradients: of a number alone, and none of the size of the logits, which a target's is.
bool grads_in_forward(const Tensor& target, const Options& o) {
  return (o.outputs & kOutputLoss) && !(o.outputs & ~(kOutputLoss | kOutputArgmax)) &&
         o.reduction != at::Reduction::None && !target.requires_grad() && !saved_tensors_are_packed();
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, const Tensor& target,
                               const OptionalTensor& bias, const OptionalTensor& weight, const Options& o) {
    const Tensor& b = value_or_undefined(bias);
    variable_list results, saved = {x, w, target, b, value_or_undefined(weight)};
    if (grads_in_forward(target, o)) {
      at::AutoDispatchBelowADInplaceOrView below;
      static const auto op = find_op<ForwardBackwardSignature>("regfast::linear_cross_entropy_forward_backward");
      const std::array<bool, 3> mask = {x.requires_grad(), w.requires_grad(), b.defined() && b.requires_grad()};
      auto [loss, argmax, dx, dw, db] =
          op.call(x, w, target, bias, weight, o.ignore_index, o.reduction, o.label_smoothing, o.z_loss, o.softcap,
                  o.logit_scale, o.outputs & kOutputArgmax, o.memory_budget, o.filter_eps, o.loss_dtype, mask);
      results.push_back(loss);
      if (o.outputs & kOutputArgmax) results.push_back(argmax);
      for (const auto& [g, wanted] : {std::pair{dx, mask[0]}, {dw, mask[1]}, {db, mask[2]}})
        saved.push_back(wanted ? g : Tensor());
    } else {
      results = rf::forward({x, w, target, bias, weight}, o);
    }
    ctx->save_for_backward(std::move(saved));
    o.save(ctx);
    ctx->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    variable_list result(6);
    if (!any_defined(upstream)) return result;
    const Options o = Options::saved(ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &target = saved[2], &b = saved[3], &weight = saved[4];
    if (backward_takes_composite("linear_cross_entropy_backward", {&x, &w, &target, &b, &weight})) {
      auto g = composite_gradients({x, w, target, b}, upstream, [&](const std::vector<Tensor>& in) {
        return composite({in[0], in[1], in[2], optional(in[3]), optional(weight)}, o);
      });
      std::copy(g.begin(), g.end(), result.begin());
      return result;
    }
    const std::array<bool, 4> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      b.defined() && ctx->needs_input_grad(3), ctx->needs_input_grad(2)};
    const Tensor* inputs[] = {&x, &w, &b, &target};
    const int places[] = {0, 1, 3, 2};
    const auto saved_gradients = at::ArrayRef<Tensor>(saved).slice(5);
    if (take_saved_gradients(upstream[0], saved_gradients, inputs, mask, places, result)) return result;
    const auto up = o.by_output(upstream);
    static const auto op = find_op<BackwardSignature>("regfast::linear_cross_entropy_backward");
    auto [dx, dw, db, dt] =
        op.call(up[0], up[1], up[2], up[3], x, w, target, optional(b), optional(weight), o.ignore_index, o.reduction,
                o.label_smoothing, o.z_loss, o.softcap, o.logit_scale, o.memory_budget, o.filter_eps, mask);
    const Tensor* grads[] = {&dx, &dw, &db, &dt};
    for (int i = 0; i < 4; ++i)
      if (mask[i]) result[places[i]] = *grads[i];
    return result;
  }
};

// Probabilities where floating, as they have to be then where the target's shape is that of the logits.
bool holds_probabilities(const Tensor& target) { return at::isFloatingType(target.scalar_type()); }

// With results as if the logits were of type `count_as`. Arguments have been checked.
std::vector<Tensor> linear_cross_entropy_as(at::ScalarType count_as, Operands t, Options o) {
  const Tensor &b = value_or_undefined(t.bias), &c = value_or_undefined(t.weight);
  const bool probabilities = holds_probabilities(t.target);
  const CrossEntropyTypes types(count_as, t.target, c, probabilities);
  const bool typed = !o.loss_dtype && types.loss != t.x.scalar_type();
  if (typed) o.loss_dtype = types.loss;
  const auto finish = [&](std::vector<Tensor> results) {
    return typed ? types.give(std::move(results), o.outputs) : results;
  };
  // Without classes (of sizes that only a run will tell there are some), and with a differentiated class weight, it is
  // torch's, or its refusal.
  const char* const special = t.w.sym_size(0).maybe_as_int() == 0 ? "no classes"
                              : c.defined() && c.requires_grad()  ? "a weight that requires grad"
                                                                  : nullptr;
  if (takes_composite("linear_cross_entropy", {&t.x, &t.w, &t.target, &b, &c}, special)) return finish(composite(t, o));
  // One float64 number makes all of them float64; otherwise probabilities may have the type that logits have here.
  const bool wide =
      probabilities && (t.target.scalar_type() == at::kDouble || (c.defined() && c.scalar_type() == at::kDouble));
  const auto type = wide ? at::kDouble : t.x.scalar_type();
  t.x = t.x.to(type);
  t.w = t.w.to(type);
  if (b.defined()) t.bias = b.to(type);
  if (probabilities && t.target.scalar_type() != type) t.target = t.target.to(acc_type(type));
  return finish(any_requires_grad({&t.x, &t.w, &t.target, &value_or_undefined(t.bias)})
                    ? LinearCrossEntropyFunction::apply(t.x, t.w, t.target, t.bias, t.weight, o)
                    : forward(t, o));
}

std::vector<Tensor> linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& target,
                                         const OptionalTensor& bias, const OptionalTensor& weight, int64_t ignore_index,
                                         int64_t reduction, double label_smoothing, double z_loss,
                                         std::optional<double> softcap, std::optional<double> logit_scale,
                                         int64_t outputs, std::optional<int64_t> memory_budget, double filter_eps,
                                         std::optional<at::ScalarType> loss_dtype) {
  const Options o = {{ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype},
                     memory_budget,
                     filter_eps};
  const Tensor &b = value_or_undefined(bias), &c = value_or_undefined(weight);
  if (any_unusual("linear_cross_entropy", {&x, &w, &target, &b, &c})) return composite({x, w, target, bias, weight}, o);
  check_linear_cross_entropy("linear_cross_entropy", x, w, target, b, c, ignore_index, label_smoothing, softcap,
                             memory_budget, filter_eps);
  check_class_weight_type("linear_cross_entropy", x.scalar_type(), c, holds_probabilities(target));
  return linear_cross_entropy_as(x.scalar_type(), {x, w, target, bias, weight}, o);
}

std::vector<Tensor> batched(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                            const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                            double label_smoothing, double z_loss, std::optional<double> softcap,
                            std::optional<double> logit_scale, int64_t outputs, std::optional<int64_t> memory_budget,
                            double filter_eps, std::optional<at::ScalarType> loss_dtype) {
  if (!at::autocast::is_autocast_enabled(x.device().type()))
    check_class_weight_type("linear_cross_entropy", x.scalar_type(), value_or_undefined(weight),
                            holds_probabilities(target));
  return composite({x, w, target, bias, weight},
                   {{ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype},
                    memory_budget,
                    filter_eps});
}

// As F.linear followed by F.cross_entropy: products of autocast's type, a float32 loss, and nothing else rounded.
std::vector<Tensor> autocast(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                             const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                             double label_smoothing, double z_loss, std::optional<double> softcap,
                             std::optional<double> logit_scale, int64_t outputs, std::optional<int64_t> memory_budget,
                             double filter_eps, std::optional<at::ScalarType> loss_dtype) {
  const Options o = {{ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype},
                     memory_budget,
                     filter_eps};
  const Tensor &b = value_or_undefined(bias), &c = value_or_undefined(weight);
  if (any_unusual("linear_cross_entropy", {&x, &w, &target, &b, &c})) return composite({x, w, target, bias, weight}, o);
  const auto device = x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto to = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(to, t, device); };
  const Operands t = {cast(x), cast(w), target, cast(bias), weight};
  check_linear_cross_entropy("linear_cross_entropy", t.x, t.w, target, value_or_undefined(t.bias), c, ignore_index,
                             label_smoothing, softcap, memory_budget, filter_eps);
  const auto logits = autocast_loss_type(t.x.scalar_type());
  if (c.defined() && logits != autocast_loss_type(c.scalar_type()))
    check_class_weight_type("linear_cross_entropy", logits, c, holds_probabilities(target));
  return linear_cross_entropy_as(logits, t, o);
}

std::vector<Tensor> forward_meta(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                                 const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                                 double label_smoothing, double, std::optional<double> softcap, std::optional<double>,
                                 int64_t outputs, std::optional<int64_t> memory_budget,
                                 std::optional<at::ScalarType> loss_dtype) {
  check_linear_cross_entropy_forward(x, w, target, bias, weight, ignore_index, reduction, label_smoothing, softcap,
                                     outputs, memory_budget, loss_dtype);
  const auto shape = symbolic_loss_shape(x, w);
  const auto type = loss_type(x, target, loss_dtype), other = loss_dtype.value_or(x.scalar_type());
  std::vector<Tensor> results;
  if (outputs & kOutputLoss)
    results.push_back(reduction == at::Reduction::None ? at::empty_symint(shape, x.options().dtype(type))
                                                       : at::empty({}, x.options().dtype(type)));
  for (const int64_t bit : {kOutputLse, kOutputEntropy})
    if (outputs & bit) results.push_back(at::empty_symint(shape, x.options().dtype(other)));
  if (outputs & kOutputLogprob) results.push_back(at::empty_symint(shape, x.options().dtype(type)));
  if (outputs & kOutputArgmax) results.push_back(at::empty_symint(shape, x.options().dtype(at::kLong)));
  return results;
}

// Gradients in a type of their own (but target's), or in that of what they belong to.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_meta(const Tensor& x, const Tensor& w, const Tensor& target,
                                                          std::array<bool, 4> mask,
                                                          std::optional<at::ScalarType> type) {
  const auto like = [&](bool wanted, c10::SymIntArrayRef sizes, const Tensor& t, bool own) {
    const auto options = wanted && own && type ? t.options().dtype(*type) : t.options();
    return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  return {like(mask[0], x.sym_sizes(), x, true), like(mask[1], w.sym_sizes(), w, true),
          like(mask[2], w.sym_sizes().slice(0, w.dim() - 1), w, true),
          like(mask[3], target.sym_sizes(), target, false)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_meta(
    const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias, const OptionalTensor& weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, double, std::optional<double> softcap,
    std::optional<double>, bool argmax, std::optional<int64_t> memory_budget, double filter_eps,
    std::optional<at::ScalarType> loss_dtype, std::array<bool, 3> mask) {
  check_linear_cross_entropy_forward(x, w, target, bias, weight, ignore_index, reduction, label_smoothing, softcap,
                                     kOutputLoss, memory_budget, loss_dtype, filter_eps);
  check_reduced("linear_cross_entropy_forward_backward", reduction);
  auto [dx, dw, db, none] = gradients_meta(x, w, target, {mask[0], mask[1], mask[2], false}, acc_type(x.scalar_type()));
  const auto classes = x.options().dtype(at::kLong);
  return {at::empty({}, x.options().dtype(loss_type(x, target, loss_dtype))),
          argmax ? at::empty_symint(symbolic_loss_shape(x, w), classes) : at::empty({0}, classes), dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_logprob, const Tensor& x, const Tensor& w, const Tensor& target,
    const OptionalTensor& bias, const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double, std::optional<double> softcap, std::optional<double>,
    std::optional<int64_t> memory_budget, double filter_eps, std::array<bool, 4> mask) {
  check_linear_cross_entropy_backward({&grad_loss, &grad_lse, &grad_entropy, &grad_logprob}, x, w, target, bias, weight,
                                      ignore_index, reduction, label_smoothing, softcap, memory_budget, filter_eps,
                                      mask[3]);
  return gradients_meta(x, w, target, mask, std::nullopt);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, Autograd, m) { m.impl("linear_cross_entropy", linear_cross_entropy); }
TORCH_LIBRARY_IMPL(regfast, CompositeExplicitAutograd, m) { m.impl("linear_cross_entropy", linear_cross_entropy); }
TORCH_LIBRARY_IMPL(regfast, FuncTorchBatched, m) { register_batched<batched>(m, "linear_cross_entropy"); }
TORCH_LIBRARY_IMPL(regfast, AutocastCPU, m) { m.impl("linear_cross_entropy", autocast); }
TORCH_LIBRARY_IMPL(regfast, AutocastCUDA, m) { m.impl("linear_cross_entropy", autocast); }
TORCH_LIBRARY_IMPL(regfast, Meta, m) {
  m.impl("linear_cross_entropy_forward", forward_meta);
  m.impl("linear_cross_entropy_forward_backward", forward_backward_meta);
  m.impl("linear_cross_entropy_backward", backward_meta);
}

}  // namespace rf
