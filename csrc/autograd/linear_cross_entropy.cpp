// regfast::linear_cross_entropy: a reduced loss has its gradients computed in forward, chunk by chunk while the logits
// are there, and saves them; anything else saves its inputs alone and computes the logits again in backward, and so
// does a reduced loss whose saved tensors are packed away.
#include "shared/torch_api.h"

#include "autograd/cross_entropy_options.h"
#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "autograd/saved_gradients.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Operands = LinearCrossEntropyOperands;
using Budget = std::optional<int64_t>;

struct Options : CrossEntropyRequest {
  Budget memory_budget;
  double filter_eps;

  auto members() const { return std::tuple_cat(CrossEntropyRequest::members(), std::tie(memory_budget, filter_eps)); }
};

using Signature = std::vector<Tensor>(const Operands&, const CrossEntropyRequest&);
using ForwardSignature = std::vector<Tensor>(const Operands&, const CrossEntropyOptions&, int64_t, Budget,
                                             OptionalType);
using ForwardBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Operands&,
                                                                                    const CrossEntropyOptions&, bool,
                                                                                    Budget, double, OptionalType,
                                                                                    std::array<bool, 3>);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const CrossEntropyOutputGrads&, const Operands&,
                                                                     const CrossEntropyOptions&, Budget, double,
                                                                     std::array<bool, 4>);
constexpr auto composite = op_of<Signature, "regfast::composite_linear_cross_entropy">;
constexpr auto forward_kernels = kernels_of<ForwardSignature, "regfast::linear_cross_entropy_forward">;
constexpr auto forward_backward =
    kernels_of<ForwardBackwardSignature, "regfast::linear_cross_entropy_forward_backward">;
constexpr auto backward_kernels = op_of<BackwardSignature, "regfast::linear_cross_entropy_backward">;

std::vector<Tensor> forward(const Operands& t, const Options& o) {
  return forward_kernels(t, o, o.outputs, o.memory_budget, o.loss_dtype);
}

// Whether forward computes the gradients: of a number alone, and none of the size of the logits, which a target's is.
bool grads_in_forward(const Tensor& target, const Options& o) {
  return (o.outputs & kOutputLoss) && !(o.outputs & ~(kOutputLoss | kOutputArgmax)) &&
         o.reduction != at::Reduction::None && !target.requires_grad() && !saved_tensors_are_packed();
}

struct LinearCrossEntropyBackward {
  using Options = rf::Options;
  // Input, weight, bias and target; these, the classes' weights and three gradients.
  static constexpr int kInputs = 4, kSaved = 8;

  static variable_list backward(const Recorded<LinearCrossEntropyBackward>& op, const variable_list& upstream) {
    const Options& o = op.options;
    const Tensor &x = op.saved[0], &w = op.saved[1], &b = op.saved[2], &target = op.saved[3], &weight = op.saved[4];
    if (backward_takes_composite("linear_cross_entropy_backward", {&x, &w, &target, &b, &weight}))
      return composite_gradients({x, w, b, target}, upstream, [&](const std::vector<Tensor>& in) {
        return composite({in[0], in[1], in[3], optional(in[2]), optional(weight)}, o);
      });
    const auto gradients = at::ArrayRef<Tensor>(op.saved).slice(5);
    if (auto taken = take_saved_gradients(upstream[0], gradients, {&x, &w, &b}, op.needs)) return *taken;
    const auto up = o.by_output(upstream);
    const auto [dx, dw, db, dt] =
        backward_kernels({up[0], up[1], up[2], up[3]}, {x, w, target, optional(b), optional(weight)}, o,
                         o.memory_budget, o.filter_eps, op.needs);
    return op.wanted({&dx, &dw, &db, &dt});
  }
};

std::vector<Tensor> recorded(const Operands& t, const Options& o) {
  const Tensor &x = t.input, &w = t.linear_weight, &b = value_or_undefined(t.linear_bias);
  std::vector<Tensor> results;
  Tensor dx, dw, db;
  if (grads_in_forward(t.target, o)) {
    const std::array<bool, 3> mask = {x.requires_grad(), w.requires_grad(), b.defined() && b.requires_grad()};
    Tensor loss, argmax;
    std::tie(loss, argmax, dx, dw, db) =
        forward_backward(t, o, o.outputs & kOutputArgmax, o.memory_budget, o.filter_eps, o.loss_dtype, mask);
    results.push_back(loss);
    if (o.outputs & kOutputArgmax) results.push_back(argmax);
    keep_wanted({&dx, &dw, &db}, mask);
  } else {
    results = forward(t, o);
  }
  record<LinearCrossEntropyBackward>(results, {&x, &w, &b, &t.target},
                                     {&x, &w, &b, &t.target, &value_or_undefined(t.weight), &dx, &dw, &db}, o);
  return results;
}

// Probabilities where floating, as they have to be then where the target's shape is that of the logits.
bool holds_probabilities(const Operands& t) { return at::isFloatingType(t.target.scalar_type()); }

// With results as if the logits were of type `count_as`. Arguments have been checked.
std::vector<Tensor> linear_cross_entropy_as(at::ScalarType count_as, const Operands& t, Options o) {
  const Tensor &b = value_or_undefined(t.linear_bias), &c = value_or_undefined(t.weight);
  const bool probabilities = holds_probabilities(t);
  const CrossEntropyTypes types(count_as, t.target, c, probabilities);
  const bool typed = !o.loss_dtype && types.loss != t.input.scalar_type();
  if (typed) o.loss_dtype = types.loss;
  const auto finish = [&](std::vector<Tensor> results) {
    return typed ? types.give(std::move(results), o.outputs) : results;
  };
  // Without classes (of sizes that only a run will tell there are some), and with a differentiated class weight, it is
  // torch's, or its refusal.
  const char* const special = t.linear_weight.sym_size(0).maybe_as_int() == 0 ? "no classes"
                              : c.defined() && c.requires_grad()              ? "a weight that requires grad"
                                                                              : nullptr;
  if (takes_composite("linear_cross_entropy", {&t.input, &t.linear_weight, &t.target, &b, &c}, special))
    return finish(composite(t, o));
  // One float64 number makes all of them float64; otherwise probabilities may have the type that logits have here.
  const bool wide =
      probabilities && (t.target.scalar_type() == at::kDouble || (c.defined() && c.scalar_type() == at::kDouble));
  const auto type = wide ? at::kDouble : t.input.scalar_type();
  const bool widens = probabilities && t.target.scalar_type() != type;
  const Tensor x = as_type(t.input, type), w = as_type(t.linear_weight, type),
               target = widens ? as_type(t.target, acc_type(type)) : t.target;
  const OptionalTensor bias = b.defined() ? OptionalTensor(as_type(b, type)) : t.linear_bias;
  const Operands converted = {x, w, target, bias, t.weight};
  return finish(any_requires_grad({&x, &w, &target, &value_or_undefined(bias)}) ? recorded(converted, o)
                                                                                : forward(converted, o));
}

bool any_unusual(const Operands& t) {
  return rf::any_unusual("linear_cross_entropy", {&t.input, &t.linear_weight, &t.target,
                                                  &value_or_undefined(t.linear_bias), &value_or_undefined(t.weight)});
}

std::vector<Tensor> linear_cross_entropy(const Operands& t, const CrossEntropyOptions& options, int64_t outputs,
                                         Budget memory_budget, double filter_eps, OptionalType loss_dtype) {
  const Options o = {{options, outputs, loss_dtype}, memory_budget, filter_eps};
  if (any_unusual(t)) return composite(t, o);
  check_linear_cross_entropy("linear_cross_entropy", t, o, memory_budget, filter_eps);
  check_class_weight_type("linear_cross_entropy", t.input.scalar_type(), t.weight, holds_probabilities(t));
  return linear_cross_entropy_as(t.input.scalar_type(), t, o);
}

std::vector<Tensor> batched(const Operands& t, const CrossEntropyOptions& options, int64_t outputs, Budget, double,
                            OptionalType loss_dtype) {
  if (!at::autocast::is_autocast_enabled(t.input.device().type()))
    check_class_weight_type("linear_cross_entropy", t.input.scalar_type(), t.weight, holds_probabilities(t));
  return composite(t, {options, outputs, loss_dtype});
}

// As F.linear followed by F.cross_entropy: products of autocast's type, a float32 loss, and nothing else rounded.
std::vector<Tensor> autocast(const Operands& given, const CrossEntropyOptions& options, int64_t outputs,
                             Budget memory_budget, double filter_eps, OptionalType loss_dtype) {
  const Options o = {{options, outputs, loss_dtype}, memory_budget, filter_eps};
  if (any_unusual(given)) return composite(given, o);
  const Autocast cast(given.input);
  const Tensor x = cast(given.input), w = cast(given.linear_weight), &c = value_or_undefined(given.weight);
  const OptionalTensor bias = cast(given.linear_bias);
  const Operands t = {x, w, given.target, bias, given.weight};
  check_linear_cross_entropy("linear_cross_entropy", t, o, memory_budget, filter_eps);
  const auto logits = autocast_loss_type(x.scalar_type());
  if (c.defined() && logits != autocast_loss_type(c.scalar_type()))
    check_class_weight_type("linear_cross_entropy", logits, t.weight, holds_probabilities(t));
  return linear_cross_entropy_as(logits, t, o);
}

std::vector<Tensor> forward_meta(const Operands& t, const CrossEntropyOptions& o, int64_t outputs, Budget memory_budget,
                                 OptionalType loss_dtype) {
  check_linear_cross_entropy_forward(t, o, outputs, memory_budget, loss_dtype);
  const Tensor& x = t.input;
  const auto shape = symbolic_loss_shape(x, t.linear_weight);
  const auto type = loss_type(x, t.target, loss_dtype), other = loss_dtype.value_or(x.scalar_type());
  std::vector<Tensor> results;
  if (outputs & kOutputLoss)
    results.push_back(o.reduction == at::Reduction::None ? at::empty_symint(shape, x.options().dtype(type))
                                                         : at::empty({}, x.options().dtype(type)));
  for (const int64_t bit : {kOutputLse, kOutputEntropy})
    if (outputs & bit) results.push_back(at::empty_symint(shape, x.options().dtype(other)));
  if (outputs & kOutputLogprob) results.push_back(at::empty_symint(shape, x.options().dtype(type)));
  if (outputs & kOutputArgmax) results.push_back(at::empty_symint(shape, x.options().dtype(at::kLong)));
  return results;
}

// Gradients in a type of their own (but target's), or in that of what they belong to.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_meta(const Operands& t, std::array<bool, 4> mask,
                                                          OptionalType type) {
  const auto like = [&](bool wanted, c10::SymIntArrayRef sizes, const Tensor& of, bool own) {
    const auto options = wanted && own && type ? of.options().dtype(*type) : of.options();
    return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const Tensor& w = t.linear_weight;
  return {like(mask[0], t.input.sym_sizes(), t.input, true), like(mask[1], w.sym_sizes(), w, true),
          like(mask[2], w.sym_sizes().slice(0, w.dim() - 1), w, true),
          like(mask[3], t.target.sym_sizes(), t.target, false)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_meta(const Operands& t,
                                                                         const CrossEntropyOptions& o, bool argmax,
                                                                         Budget memory_budget, double filter_eps,
                                                                         OptionalType loss_dtype,
                                                                         std::array<bool, 3> mask) {
  check_linear_cross_entropy_forward(t, o, kOutputLoss, memory_budget, loss_dtype, filter_eps);
  check_reduced("linear_cross_entropy_forward_backward", o.reduction);
  const Tensor& x = t.input;
  auto [dx, dw, db, none] = gradients_meta(t, {mask[0], mask[1], mask[2], false}, acc_type(x.scalar_type()));
  const auto classes = x.options().dtype(at::kLong);
  return {at::empty({}, x.options().dtype(loss_type(x, t.target, loss_dtype))),
          argmax ? at::empty_symint(symbolic_loss_shape(x, t.linear_weight), classes) : at::empty({0}, classes), dx, dw,
          db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const CrossEntropyOutputGrads& grads, const Operands& t,
                                                         const CrossEntropyOptions& o, Budget memory_budget,
                                                         double filter_eps, std::array<bool, 4> mask) {
  check_linear_cross_entropy_backward(grads, t, o, memory_budget, filter_eps, mask[3]);
  return gradients_meta(t, mask, std::nullopt);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<linear_cross_entropy, batched, autocast>(m, "linear_cross_entropy");
  register_meta<forward_meta>(m, "linear_cross_entropy_forward");
  register_meta<forward_backward_meta>(m, "linear_cross_entropy_forward_backward");
  register_meta<backward_meta>(m, "linear_cross_entropy_backward");
}

}  // namespace rf
