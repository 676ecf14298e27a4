// regfast::linear_cross_entropy: a reduced loss has its gradients computed in forward, chunk by chunk while the logits
// are there, and saves them; anything else saves its inputs alone and computes the logits again in backward, and so
// does a reduced loss whose saved tensors are packed away.
#include "../checks.h"
#include "../torch_api.h"
#include "cross_entropy_options.h"
#include "saved_gradients.h"

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
  check_linear_cross_entropy(x, w, target, b, c, ignore_index, label_smoothing, softcap, memory_budget, filter_eps);
  // Probabilities of a type that is neither input's nor its accumulator's promote; a differentiated class weight is
  // torch's, or its refusal.
  const bool probabilities = at::isFloatingType(target.scalar_type());
  const bool promotes = probabilities && has_kernel(x.scalar_type()) && target.scalar_type() != x.scalar_type() &&
                        target.scalar_type() != acc_type(x.scalar_type());
  const char* const special = promotes                           ? "probabilities of another type"
                              : c.defined() && c.requires_grad() ? "a weight that requires grad"
                                                                 : nullptr;
  if (takes_composite("linear_cross_entropy", {&x, &w, &target, &b, &c}, special))
    return composite({x, w, target, bias, weight}, o);
  if (any_requires_grad({&x, &w, &target, &b})) return LinearCrossEntropyFunction::apply(x, w, target, bias, weight, o);
  return forward({x, w, target, bias, weight}, o);
}

std::vector<Tensor> batched(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                            const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                            double label_smoothing, double z_loss, std::optional<double> softcap,
                            std::optional<double> logit_scale, int64_t outputs, std::optional<int64_t> memory_budget,
                            double filter_eps, std::optional<at::ScalarType> loss_dtype) {
  return composite({x, w, target, bias, weight},
                   {{ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, outputs, loss_dtype},
                    memory_budget,
                    filter_eps});
}

// As F.linear followed by F.cross_entropy: products of autocast's type, a float32 loss.
std::vector<Tensor> autocast(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor& bias,
                             const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                             double label_smoothing, double z_loss, std::optional<double> softcap,
                             std::optional<double> logit_scale, int64_t outputs, std::optional<int64_t> memory_budget,
                             double filter_eps, std::optional<at::ScalarType> loss_dtype) {
  const auto device = x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto to = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(to, t, device); };
  const Tensor input = cast(x);
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  if (half && !loss_dtype) loss_dtype = at::kFloat;
  OptionalTensor class_weight = weight;
  if (half && weight) class_weight = weight->to(input.scalar_type());
  return linear_cross_entropy(input, cast(w), target, cast(bias), class_weight, ignore_index, reduction,
                              label_smoothing, z_loss, softcap, logit_scale, outputs, memory_budget, filter_eps,
                              loss_dtype);
}

std::vector<Tensor> forward_meta(const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, int64_t reduction, double, double,
                                 std::optional<double>, std::optional<double>, int64_t outputs, std::optional<int64_t>,
                                 std::optional<at::ScalarType> loss_dtype) {
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
    const Tensor& x, const Tensor& w, const Tensor& target, const OptionalTensor&, const OptionalTensor&, int64_t,
    int64_t, double, double, std::optional<double>, std::optional<double>, bool argmax, std::optional<int64_t>, double,
    std::optional<at::ScalarType> loss_dtype, std::array<bool, 3> mask) {
  auto [dx, dw, db, none] = gradients_meta(x, w, target, {mask[0], mask[1], mask[2], false}, acc_type(x.scalar_type()));
  const auto classes = x.options().dtype(at::kLong);
  return {at::empty({}, x.options().dtype(loss_type(x, target, loss_dtype))),
          argmax ? at::empty_symint(symbolic_loss_shape(x, w), classes) : at::empty({0}, classes), dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const OptionalTensor&, const OptionalTensor&,
                                                         const OptionalTensor&, const OptionalTensor&, const Tensor& x,
                                                         const Tensor& w, const Tensor& target, const OptionalTensor&,
                                                         const OptionalTensor&, int64_t, int64_t, double, double,
                                                         std::optional<double>, std::optional<double>,
                                                         std::optional<int64_t>, double, std::array<bool, 4> mask) {
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
