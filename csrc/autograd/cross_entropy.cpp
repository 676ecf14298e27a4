// regfast::cross_entropy: saves input, target, class weights and two to five numbers per row, never probabilities, and
// of a reduced loss the gradient itself, which the pass that gives the loss can write.
#include "shared/torch_api.h"

#include <atomic>

#include "autograd/cross_entropy_options.h"
#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "autograd/saved_gradients.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Operands = CrossEntropyOperands;
using Options = CrossEntropyRequest;

using ForwardSignature = std::vector<Tensor>(const Operands&, const Options&);
template <class Result, class Mask>
using BackwardSignature = Result(const CrossEntropyOutputGrads&, const Operands&, const Tensor&, const Tensor&,
                                 const CrossEntropyOptions&, Mask);
using ForwardBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Operands&, const CrossEntropyOptions&,
                                                                            OptionalType, double);
using UnlessSignature = void(const Tensor&, const Operands&, const Tensor&, const Tensor&, const CrossEntropyOptions&,
                             const Tensor&, double);

constexpr auto composite = op_of<ForwardSignature, "regfast::composite_cross_entropy">;
// The outputs asked for, then the rows' statistics and the mean's denominator.
constexpr auto forward = kernels_of<ForwardSignature, "regfast::cross_entropy_forward">;
constexpr auto backward_unless = op_of<UnlessSignature, "regfast::cross_entropy_backward_unless_">;
constexpr auto backward_inplace = op_of<BackwardSignature<Tensor, bool>, "regfast::cross_entropy_backward_">;
constexpr auto backward_kernels =
    op_of<BackwardSignature<std::tuple<Tensor, Tensor>, std::array<bool, 2>>, "regfast::cross_entropy_backward">;

const auto& forward_backward_op() {
  static const auto op = find_op<ForwardBackwardSignature>("regfast::cross_entropy_forward_backward");
  return op;
}

// Which pass writes the gradient: backward, into memory of its own or over the input, or forward, for the upstream
// gradient that is expected.
enum class Writer { backward, backward_in_place, forward };

// The upstream gradient that the next backward on the CPU will have: the last one's, which is 1, or the factor by which
// losses are scaled or gradients accumulated. A gradient written for a wrong one costs a write in vain, so that after
// two of them forward leaves it to backward until the same one has come twice. Results do not depend on any of this.
class Expected {
 public:
  double upstream() const { return value.load(std::memory_order_relaxed); }
  bool likely() const { return trust.load(std::memory_order_relaxed) > 0; }
  void learn(double came) {
    const bool right = came == upstream();
    const int so_far = trust.load(std::memory_order_relaxed);
    trust.store(right ? std::min(so_far + 1, 2) : std::max(so_far - 1, -1), std::memory_order_relaxed);
    if (!right) value.store(came, std::memory_order_relaxed);
  }

 private:
  std::atomic<double> value{1};
  std::atomic<int> trust{2};
} expected;

// Whether forward may write the gradient: a number as its only output, whose upstream gradient is one number, and a
// device that can. A compiler that traces decides by itself what to compute when, and so does who packs what is saved.
bool may_write_in_forward(const Operands& t, const Options& o) {
  return (!t.input.is_cpu() || expected.likely()) && o.outputs == kOutputLoss && o.reduction != at::Reduction::None &&
         !any_requires_grad({&t.target}) && !values_are_hidden(t.input) && !saved_tensors_are_packed() &&
         forward_backward_op().hasKernelForDispatchKey(t.input.is_cuda() ? c10::DispatchKey::CUDA
                                                                         : c10::DispatchKey::CPU);
}

struct CrossEntropyBackward {
  struct Options : CrossEntropyRequest {
    bool in_place;
    double upstream;  // for which forward has written the gradient, if it has

    auto members() const { return std::tuple_cat(CrossEntropyRequest::members(), std::tie(in_place, upstream)); }
  };
  static constexpr int kInputs = 2, kSaved = 6;  // input and target

  static variable_list backward(const Recorded<CrossEntropyBackward>& op, const variable_list& grads) {
    const Options& o = op.options;
    const Tensor &x = op.saved[0], &t = op.saved[1], &w = op.saved[2], &stats = op.saved[3], &weight_sum = op.saved[4];
    if (backward_takes_composite("cross_entropy_backward", {&x, &t, &w}))
      return composite_gradients(
          {x, t}, grads, [&](const std::vector<Tensor>& in) { return composite({in[0], in[1], optional(w)}, o); });
    const auto by_output = o.by_output(grads);
    const CrossEntropyOutputGrads up = {by_output[0], by_output[1], by_output[2], by_output[3]};
    const OptionalTensor weight = optional(w);
    const Operands operands = {x, t, weight};
    const auto [need_x, need_t] = op.needs;
    variable_list result(kInputs);
    const bool hidden = std::any_of(grads.begin(), grads.end(), values_are_hidden);
    std::optional<double> came;
    if (up.loss.has_value() && up.loss->is_cpu() && !hidden && o.reduction != at::Reduction::None)
      expected.learn(*(came = up.loss->item<double>()));
    if (const Tensor& dx = op.saved[5]; dx.defined() && !hidden && may_give_away(dx)) {
      if (came != o.upstream) backward_unless(*up.loss, operands, stats, weight_sum, o, dx, o.upstream);
      result[0] = dx;
      return result;
    }
    if (o.in_place && need_x && !hidden) {
      Tensor dt = backward_inplace(up, operands, stats, weight_sum, o, need_t);
      result[0] = x.detach();
      if (need_t) result[1] = dt;
      return result;
    }
    const auto [dx, dt] = backward_kernels(up, operands, stats, weight_sum, o, op.needs);
    return op.wanted({&dx, &dt});
  }
};

std::vector<Tensor> recorded(const Operands& t, const Options& o, Writer writer) {
  std::vector<Tensor> results;
  Tensor stats, weight_sum, written;
  const double upstream = t.input.is_cpu() ? expected.upstream() : 1;
  if (writer == Writer::forward) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, s, sum, grad] = forward_backward_op().call(t, o, o.loss_dtype, upstream);
    results = {loss};
    stats = s;
    weight_sum = sum;
    written = grad;
  } else {
    results = forward(t, o);
    weight_sum = results.back();
    results.pop_back();
    stats = results.back();
    results.pop_back();
  }
  record<CrossEntropyBackward>(results, {&t.input, &t.target},
                               {&t.input, &t.target, &value_or_undefined(t.weight), &stats, &weight_sum, &written},
                               {o, writer == Writer::backward_in_place, upstream});
  return results;
}

// By the kernels, for logits and probabilities of one type and class weights of any.
std::vector<Tensor> by_kernels(const Operands& t, const Options& o, bool inplace_backward) {
  const Tensor& x = t.input;
  if (any_requires_grad({&x, &t.target})) {
    Writer writer = may_write_in_forward(t, o) ? Writer::forward : Writer::backward;
    if (inplace_backward && x.requires_grad()) {
      TORCH_CHECK(!x.is_leaf(),
                  "regfast.cross_entropy: inplace_backward: expected an input that is not a leaf, got a leaf "
                  "that requires grad, whose data its gradient would replace");
      TORCH_CHECK(at::has_internal_overlap(x) != at::MemOverlap::Yes,
                  "regfast.cross_entropy: inplace_backward: expected "
                  "an input whose elements have memory of their own, got overlapping ones (expanded?)");
      // While tracing, buffers are the compiler's to reuse.
      writer =
          x.unsafeGetTensorImpl()->is_python_dispatch() || x.is_neg() ? Writer::backward : Writer::backward_in_place;
    }
    return recorded(t, o, writer);
  }
  auto results = forward(t, o);
  results.resize(results.size() - 2);
  return results;
}

bool holds_probabilities(const Operands& t) {
  return t.input.dim() >= 1 && is_probability_target(t.input, t.target) && at::isFloatingType(t.target.scalar_type());
}

// With results as if the logits were of type `counts_as`.
std::vector<Tensor> cross_entropy_as(at::ScalarType counts_as, const Operands& given, Options o,
                                     bool inplace_backward) {
  const Tensor &x = given.input, &w = value_or_undefined(given.weight);
  // torch takes a target of one element for a single row of logits.
  const bool single = x.dim() == 1 && given.target.dim() == 1 && given.target.sym_size(0) == 1 && x.sym_size(0) != 1;
  const Tensor target = single ? given.target.squeeze(0) : given.target;
  const Operands t = {x, target, given.weight};
  check_softcap("cross_entropy", o.softcap);
  const bool probabilities = holds_probabilities(t);
  const CrossEntropyTypes types(counts_as, target, w, probabilities);
  const bool typed = !o.loss_dtype && types.loss != x.scalar_type();
  if (typed) o.loss_dtype = types.loss;
  const auto finish = [&](std::vector<Tensor> results) {
    return typed ? types.give(std::move(results), o.outputs) : results;
  };
  // Without classes (of sizes that only a run will tell there are some), and with a differentiated class weight, it is
  // torch's, or its refusal.
  const bool empty = x.dim() >= 1 && x.sym_size(class_dim(x)).maybe_as_int() == 0;
  const char* const special = empty                                          ? "no classes"
                              : w.defined() && w.requires_grad()             ? "a weight that requires grad"
                              : w.defined() && probabilities && w.dim() != 1 ? "a weight that broadcasts"
                                                                             : nullptr;
  if (takes_composite("cross_entropy", {&x, &target, &w}, special)) return finish(composite(t, o));
  // What PyTorch's own has, it may be faster at.
  const bool plain =
      o.outputs == kOutputLoss && !inplace_backward && o.z_loss == 0 && !o.softcap && !o.logit_scale && !o.loss_dtype;
  if (plain && (probabilities || target.scalar_type() == at::kLong) && rows_by_aten("cross_entropy", x, class_dim(x)))
    return {at::cross_entropy_loss(x, target, t.weight, o.reduction, o.ignore_index, o.label_smoothing)};
  if (!probabilities) return finish(by_kernels(t, o, inplace_backward));
  // Both in the wider type, and in float64 if the weights are; autograd rounds their gradients.
  auto computed = c10::promoteTypes(x.scalar_type(), target.scalar_type());
  if (w.defined() && w.scalar_type() == at::kDouble) computed = at::kDouble;
  return finish(by_kernels({x.to(computed), target.to(computed), t.weight}, o, inplace_backward));
}

std::vector<Tensor> cross_entropy(const Operands& t, const CrossEntropyOptions& options, int64_t outputs,
                                  bool inplace_backward, OptionalType loss_dtype) {
  const Options o = {options, outputs, loss_dtype};
  if (any_unusual("cross_entropy", {&t.input, &t.target, &value_or_undefined(t.weight)})) return composite(t, o);
  check_class_weight_type("cross_entropy", t.input.scalar_type(), t.weight, holds_probabilities(t));
  return cross_entropy_as(t.input.scalar_type(), t, o, inplace_backward);
}

std::vector<Tensor> cross_entropy_batched(const Operands& t, const CrossEntropyOptions& options, int64_t outputs, bool,
                                          OptionalType loss_dtype) {
  if (!at::autocast::is_autocast_enabled(t.input.device().type()))
    check_class_weight_type("cross_entropy", t.input.scalar_type(), t.weight, holds_probabilities(t));
  return composite(t, {options, outputs, loss_dtype});
}

// Under autocast F.cross_entropy takes half types for float32 and returns it. The logits stay as they are, all
// arithmetic being in float32 anyway, and nothing else is rounded.
std::vector<Tensor> cross_entropy_autocast(const Operands& t, const CrossEntropyOptions& options, int64_t outputs,
                                           bool inplace_backward, OptionalType loss_dtype) {
  const Options o = {options, outputs, loss_dtype};
  const Tensor& weight = value_or_undefined(t.weight);
  if (any_unusual("cross_entropy", {&t.input, &t.target, &weight})) return composite(t, o);
  const Autocast off(t.input, at::kFloat);
  const auto logits = autocast_loss_type(t.input.scalar_type());
  if (weight.defined() && logits != autocast_loss_type(weight.scalar_type()))
    check_class_weight_type("cross_entropy", logits, t.weight, holds_probabilities(t));
  return cross_entropy_as(logits, t, o, inplace_backward);
}

std::vector<Tensor> cross_entropy_forward_meta(const Operands& t, const CrossEntropyOptions& o, int64_t outputs,
                                               OptionalType loss_dtype) {
  check_cross_entropy_forward(t, o, outputs, loss_dtype);
  const Tensor& x = t.input;
  auto row_shape = x.sym_sizes().vec();
  row_shape.erase(row_shape.begin() + class_dim(x));
  c10::SymInt rows = 1;
  for (const auto& size : row_shape) rows = rows * size;
  const auto options = x.options().dtype(loss_dtype.value_or(x.scalar_type()));
  std::vector<Tensor> results;
  if (outputs & kOutputLoss)
    results.push_back(o.reduction == at::Reduction::None ? at::empty_symint(row_shape, options)
                                                         : at::empty({}, options));
  for (const int64_t bit : {kOutputLse, kOutputEntropy, kOutputLogprob})
    if (outputs & bit) results.push_back(at::empty_symint(row_shape, options));
  if (outputs & kOutputArgmax) results.push_back(at::empty_symint(row_shape, x.options().dtype(at::kLong)));
  const int64_t stats = cross_entropy_stat_rows(is_probability_target(x, t.target), outputs & kOutputEntropy);
  results.push_back(at::empty_symint({stats, rows}, x.options().dtype(acc_type(x.scalar_type()))));
  results.push_back(at::empty({}, x.options().dtype(at::kDouble)));
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward_meta(const Operands& t,
                                                                               const CrossEntropyOptions& o,
                                                                               OptionalType loss_dtype, double) {
  check_reduced("cross_entropy_forward_backward", o.reduction);
  const auto r = cross_entropy_forward_meta(t, o, kOutputLoss, loss_dtype);
  return {r[0], r[1], r[2], at::empty_like(t.input)};
}

Tensor target_gradient_meta(const Operands& t, bool wanted) {
  return wanted ? at::empty_symint(t.target.sym_sizes(), t.target.options()) : at::empty({0}, t.input.options());
}

std::tuple<Tensor, Tensor> cross_entropy_backward_meta(const CrossEntropyOutputGrads& grads, const Operands& t,
                                                       const Tensor& stats, const Tensor& weight_sum,
                                                       const CrossEntropyOptions& o, std::array<bool, 2> mask) {
  check_cross_entropy_backward("cross_entropy_backward", grads, t, stats, weight_sum, o, mask[1]);
  return {mask[0] ? at::empty_like(t.input) : at::empty({0}, t.input.options()), target_gradient_meta(t, mask[1])};
}

Tensor cross_entropy_backward_inplace_meta(const CrossEntropyOutputGrads& grads, const Operands& t, const Tensor& stats,
                                           const Tensor& weight_sum, const CrossEntropyOptions& o, bool grad_target) {
  check_cross_entropy_backward("cross_entropy_backward_", grads, t, stats, weight_sum, o, grad_target, &t.input);
  return target_gradient_meta(t, grad_target);
}

// Views whose sign is pending are made into tensors, but for what is written over. torch's own fallback takes it that
// an op returns what it writes over, and reads the stack below its results otherwise.
template <c10::DispatchKey key>
void resolved(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor t = value.toTensor();
    if (!t.is_neg() && !t.is_conj()) continue;
    const auto* alias = arguments[i].alias_info();
    RF_CHECK(TORCH_CHECK, !alias || !alias->isWrite(), op.schema().name().substr(sizeof("regfast::") - 1),
             arguments[i].name(), "a tensor to write over", "a negative or conjugate view");
    value = t.resolve_conj().resolve_neg();
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, key), stack);
}

template <c10::DispatchKey key>
void register_resolved(torch::Library& m) {
  for (const char* name : {"cross_entropy_backward_", "cross_entropy_backward_unless_"})
    m.impl(name, torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&resolved<key>>()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<cross_entropy, cross_entropy_batched, cross_entropy_autocast>(m, "cross_entropy");
  register_meta<cross_entropy_forward_meta>(m, "cross_entropy_forward");
  register_meta<cross_entropy_forward_backward_meta>(m, "cross_entropy_forward_backward");
  register_meta<check_cross_entropy_unless>(m, "cross_entropy_backward_unless_");
  register_meta<cross_entropy_backward_meta>(m, "cross_entropy_backward");
  register_meta<cross_entropy_backward_inplace_meta>(m, "cross_entropy_backward_");
  register_resolved<c10::DispatchKey::Negative>(m);
  register_resolved<c10::DispatchKey::Conjugate>(m);
}

}  // namespace rf
