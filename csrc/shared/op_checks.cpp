// See op_checks.h. Compiled once: the words of the messages take longer to compile than the ops.
#include "shared/torch_api.h"

#include "shared/op_checks.h"
#include "shared/product.h"

namespace rf {
// ---- any op's arguments --------------------------------------------------------------------------------------------

namespace {

// Whether a tensor's elements lie in its storage, which others may have resized.
bool has_memory(const Tensor& t) {
  const auto* impl = t.unsafeGetTensorImpl();
  if (impl->is_python_dispatch() || t.is_meta() || impl->has_symbolic_sizes_strides() || t.numel() == 0) return true;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return impl->has_storage() && (size_t)(last + 1) * t.element_size() <= t.storage().nbytes();
}

// A tensor that kernels can read, on the device of `like`.
void check_readable(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  RF_CHECK(TORCH_CHECK_TYPE, t.defined(), op, name, "a tensor", "none");
  RF_CHECK(TORCH_CHECK, t.device() == like.device(), op, name, c10::str("a tensor on ", like.device()), t.device());
  RF_CHECK(TORCH_CHECK_NOT_IMPLEMENTED, t.layout() == at::kStrided, op, name, "a strided tensor", t.layout());
  RF_CHECK(TORCH_CHECK, has_memory(t), op, name, c10::str("memory for shape ", t.sizes()),
           c10::str(t.storage().nbytes(), " bytes"));
}

// The same of one that may be absent; whether it is there.
bool check_optional(const char* op, const char* name, const OptionalTensor& t, const Tensor& like) {
  if (t.has_value()) check_readable(op, name, *t, like);
  return t.has_value();
}

// The argument that the others are compared with: readable, and of a type that has kernels.
void check_first(const char* op, const char* name, const Tensor& t) {
  RF_CHECK(TORCH_CHECK_TYPE, t.defined(), op, name, "a tensor", "none");
  check_readable(op, name, t, t);
  RF_CHECK(TORCH_CHECK_NOT_IMPLEMENTED, has_kernel(t.scalar_type()), op, name, listed(kDTypeNames), t.scalar_type());
}

void check_type(const char* op, const char* name, const Tensor& t, at::ScalarType type) {
  RF_CHECK(TORCH_CHECK, t.scalar_type() == type, op, name, type, t.scalar_type());
}

void check_sizes(const char* op, const char* name, const Tensor& t, c10::SymIntArrayRef sizes) {
  RF_CHECK(TORCH_CHECK, t.sym_sizes() == sizes, op, name, c10::str("shape ", sizes), t.sym_sizes());
}

// An upstream gradient, which kernels convert to the accumulator's type: of each result, or one number.
void check_upstream(const char* op, const char* name, const Tensor& t, const Tensor& like, bool one,
                    c10::SymIntArrayRef each) {
  check_readable(op, name, t, like);
  RF_CHECK(TORCH_CHECK, at::isFloatingType(t.scalar_type()), op, name, "a floating point type", t.scalar_type());
  if (!one) return check_sizes(op, name, t, each);
  RF_CHECK(TORCH_CHECK, t.sym_numel() == 1, op, name, "one number", t.sym_sizes());
}

// An argument that may be absent where nothing that is asked for needs it.
const Tensor& needed(const char* op, const char* name, const OptionalTensor& t, const Tensor& like) {
  RF_CHECK(TORCH_CHECK, t.has_value(), op, name, "a tensor, which the gradients that are asked for need", "none");
  check_readable(op, name, *t, like);
  return *t;
}

void check_reduction(const char* op, int64_t reduction) {
  RF_CHECK(TORCH_CHECK_VALUE, at::Reduction::None <= reduction && reduction <= at::Reduction::Sum, op, "reduction",
           "0 (none), 1 (mean) or 2 (sum)", reduction);
}

void check_outputs(const char* op, int64_t outputs) {
  RF_CHECK(TORCH_CHECK_VALUE, 0 < outputs && outputs < 2 * kOutputArgmax, op, "outputs", "bits from 1 to 31", outputs);
}

void check_loss_dtype(const char* op, OptionalType type) {
  RF_CHECK(TORCH_CHECK, !type || has_kernel(*type), op, "loss_dtype", listed(kDTypeNames, ", ") + " or none", *type);
}

// Pointers to classes, or to probabilities of them, are null where there are none.
void check_classes(const char* op, const char* name, const Tensor& t, int64_t dim) {
  RF_CHECK(TORCH_CHECK, t.sym_size(dim).maybe_as_int() != 0, op, name, "one class or more", t.sym_sizes());
}

// Rows of `outputs` numbers whose bytes, in panels of any type, can be counted.
void check_countable(const char* op, const char* name, const c10::SymInt& rows, const c10::SymInt& outputs) {
  const auto r = rows.maybe_as_int(), o = outputs.maybe_as_int();
  int64_t bytes;
  RF_CHECK(TORCH_CHECK,
           !r || !o || !(__builtin_mul_overflow(*r, *o, &bytes) || __builtin_mul_overflow(bytes, 64, &bytes)), op, name,
           "sizes whose product is a number of bytes", c10::str(rows, " rows of ", outputs));
}

}  // namespace

void check_reduced(const char* op, int64_t reduction) {
  RF_CHECK(TORCH_CHECK_VALUE, reduction != at::Reduction::None, op, "reduction", "1 (mean) or 2 (sum)", reduction);
}

// ---- linear --------------------------------------------------------------------------------------------------------

Activation check_linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, string_view activation) {
  check_first("linear", "input", x);
  check_readable("linear", "weight", w, x);
  check_optional("linear", "bias", bias, x);
  check_linear(x, w, value_or_undefined(bias));
  return parse_activation(activation, "linear");
}

namespace {

// The upstream gradient of an activation's results, and what its derivative is computed from.
Activation check_activation_gradient(const char* op, const Tensor& grad, const OptionalTensor& saved,
                                     string_view name) {
  check_first(op, "grad", grad);
  RF_CHECK(TORCH_CHECK, grad.dim() >= 1, op, "grad", "1 or more dimensions", grad.dim());
  const Activation activation = parse_activation(name, op);
  if (saved_for(activation) == Saved::nothing) return activation;
  RF_CHECK(TORCH_CHECK, saved.has_value(), op, "saved", c10::str("what ", name, " saves"), "none");
  check_readable(op, "saved", *saved, grad);
  check_type(op, "saved", *saved, grad.scalar_type());
  check_sizes(op, "saved", *saved, grad.sym_sizes());
  return activation;
}

// The input of a layer whose results have the gradient `grad`.
void check_layer_input(const char* op, const Tensor& x, const Tensor& grad) {
  check_type(op, "input", x, grad.scalar_type());
  const int64_t last = grad.dim() - 1;
  RF_CHECK(TORCH_CHECK, x.dim() == last + 1 && x.sym_sizes().slice(0, last) == grad.sym_sizes().slice(0, last), op,
           "input", c10::str("the shape of grad ", grad.sym_sizes(), " but for the last dimension"), x.sym_sizes());
}

}  // namespace

Activation check_linear_backward(const Tensor& grad, const OptionalTensor& input, const OptionalTensor& weight,
                                 const OptionalTensor& saved, string_view name, std::array<bool, 3> mask) {
  constexpr auto op = "linear_backward";
  const Activation activation = check_activation_gradient(op, grad, saved, name);
  if (mask[0]) {
    const Tensor& w = needed(op, "weight", weight, grad);
    check_type(op, "weight", w, grad.scalar_type());
    RF_CHECK(TORCH_CHECK, w.dim() == 2 && w.sym_size(0) == grad.sym_size(-1), op, "weight",
             c10::str("shape (", grad.sym_size(-1), ", in_features)"), w.sym_sizes());
  }
  if (mask[1]) check_layer_input(op, needed(op, "input", input, grad), grad);
  return activation;
}

at::ScalarType check_product(const char* op, const Tensor& a, const Tensor& b) {
  check_first(op, "a", a);
  check_readable(op, "b", b, a);
  RF_CHECK(TORCH_CHECK_NOT_IMPLEMENTED, has_kernel(b.scalar_type()), op, "b", listed(kDTypeNames), b.scalar_type());
  const auto type = product_type(a, b), acc = acc_type(type);
  const auto check_factor = [&](const char* name, const Tensor& t) {
    RF_CHECK(TORCH_CHECK, t.dim() == 2, op, name, "a matrix", t.sym_sizes());
    RF_CHECK(TORCH_CHECK, t.scalar_type() == type || t.scalar_type() == acc, op, name,
             type == acc ? c10::str(type) : c10::str(type, " or ", acc), t.scalar_type());
  };
  check_factor("a", a);
  check_factor("b", b);
  RF_CHECK(TORCH_CHECK, b.sym_size(0) == a.sym_size(1), op, "b", c10::str(a.sym_size(1), " rows"), b.sym_sizes());
  return acc;
}

void check_product_bias(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  constexpr auto op = "_product";
  if (!check_optional(op, "bias", bias, a)) return;
  RF_CHECK(TORCH_CHECK_NOT_IMPLEMENTED, has_kernel(bias->scalar_type()), op, "bias", listed(kDTypeNames),
           bias->scalar_type());
  check_sizes(op, "bias", *bias, {b.sym_size(1)});
}

void check_add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  constexpr auto op = "_add_product_";
  const auto acc = check_product(op, a, b);
  check_readable(op, "sum", sum, a);
  check_type(op, "sum", sum, acc);
  check_sizes(op, "sum", sum, {a.sym_size(0), b.sym_size(1)});
  RF_CHECK(TORCH_CHECK, sum.is_contiguous(), op, "sum", "a contiguous tensor", c10::str("strides ", sum.sym_strides()));
  RF_CHECK(TORCH_CHECK, !sum.requires_grad(), op, "sum", "a tensor without a gradient", "one that requires it");
  for (const Tensor* factor : {&a, &b})
    RF_CHECK(TORCH_CHECK, !sum.is_alias_of(*factor), op, "sum", "memory of its own", "that of a factor");
}

// ---- phm_linear ----------------------------------------------------------------------------------------------------

Activation check_phm_linear_forward(const Tensor& x, const Tensor& a, const Tensor& s, const OptionalTensor& bias,
                                    string_view activation) {
  check_first("phm_linear", "input", x);
  check_readable("phm_linear", "a", a, x);
  check_readable("phm_linear", "s", s, x);
  check_optional("phm_linear", "bias", bias, x);
  check_phm_linear(x, a, s, value_or_undefined(bias));
  return parse_activation(activation, "phm_linear");
}

Activation check_phm_linear_backward(const Tensor& grad, const OptionalTensor& input, const Tensor& a, const Tensor& s,
                                     const OptionalTensor& saved, string_view name, std::array<bool, 4> mask) {
  constexpr auto op = "phm_linear_backward";
  const Activation activation = check_activation_gradient(op, grad, saved, name);
  check_readable(op, "a", a, grad);
  check_readable(op, "s", s, grad);
  check_phm_operands(op, a, s);
  check_type(op, "a", a, grad.scalar_type());
  check_type(op, "s", s, grad.scalar_type());
  const auto n = a.sym_size(0);
  RF_CHECK(TORCH_CHECK, grad.sym_size(-1) == n * s.sym_size(1), op, "grad",
           c10::str("last dimension ", n * s.sym_size(1), " as s of shape ", s.sym_sizes(), " has it"),
           grad.sym_sizes());
  if (!mask[1] && !mask[2]) return activation;
  const Tensor& x = needed(op, "input", input, grad);
  check_layer_input(op, x, grad);
  RF_CHECK(TORCH_CHECK, x.sym_size(-1) == n * s.sym_size(2), op, "input",
           c10::str("last dimension ", n * s.sym_size(2), " as s of shape ", s.sym_sizes(), " has it"), x.sym_sizes());
  return activation;
}

// ---- softmax family: the dimension, counted from 0 -----------------------------------------------------------------

int64_t check_softmax_forward(const char* op, const Tensor& x, int64_t dim) {
  check_first(op, "input", x);
  return checked_dim(op, x, dim);
}

int64_t check_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim) {
  constexpr auto op = "softmax_backward";
  check_first(op, "output", output);
  check_readable(op, "grad", grad, output);
  check_type(op, "grad", grad, output.scalar_type());
  check_sizes(op, "grad", grad, output.sym_sizes());
  return checked_dim(op, output, dim);
}

namespace {

// Whether a tensor has the shape of `x` without its dimension `dim`.
bool has_rows_of(const Tensor& t, const Tensor& x, int64_t dim) {
  if (x.dim() == 0) return t.dim() == 0;
  const auto sizes = t.sym_sizes(), of = x.sym_sizes();
  return t.dim() == x.dim() - 1 && sizes.slice(0, dim) == of.slice(0, dim) && sizes.slice(dim) == of.slice(dim + 1);
}

bool has_rows_of_keeping(const Tensor& t, const Tensor& x, int64_t dim) {
  const auto sizes = t.sym_sizes(), of = x.sym_sizes();
  return t.dim() == x.dim() && t.dim() > 0 && sizes[dim] == 1 && sizes.slice(0, dim) == of.slice(0, dim) &&
         sizes.slice(dim + 1) == of.slice(dim + 1);
}

}  // namespace

int64_t check_logsumexp_backward(const Tensor& grad, const Tensor& x, const Tensor& lse, int64_t dim) {
  constexpr auto op = "logsumexp_backward";
  check_first(op, "input", x);
  dim = checked_dim(op, x, dim);
  for (const auto& [name, t] : {std::pair("grad", &grad), std::pair("lse", &lse)}) {
    check_readable(op, name, *t, x);
    RF_CHECK(TORCH_CHECK, at::isFloatingType(t->scalar_type()), op, name, "a floating point type", t->scalar_type());
    RF_CHECK(TORCH_CHECK, has_rows_of(*t, x, dim) || has_rows_of_keeping(*t, x, dim), op, name,
             c10::str("input's shape ", x.sym_sizes(), " without dimension ", dim, ", or with size 1 there"),
             t->sym_sizes());
  }
  return dim;
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

namespace {

void check_cross_entropy_inputs(const char* op, const CrossEntropyOperands& t, const CrossEntropyOptions& o) {
  check_first(op, "input", t.input);
  check_readable(op, "target", t.target, t.input);
  check_optional(op, "weight", t.weight, t.input);
  check_reduction(op, o.reduction);
  check_softcap(op, o.softcap);
  check_cross_entropy(op, t, o);
  check_classes(op, "input", t.input, class_dim(t.input));
}

}  // namespace

void check_cross_entropy_forward(const CrossEntropyOperands& t, const CrossEntropyOptions& o, int64_t outputs,
                                 OptionalType loss_dtype) {
  check_cross_entropy_inputs("cross_entropy", t, o);
  check_outputs("cross_entropy", outputs);
  check_loss_dtype("cross_entropy", loss_dtype);
}

namespace {

// Checks each upstream gradient that is there: what it is called, and whether it is one number for all losses.
template <class Check>
void for_upstream(const CrossEntropyOutputGrads& upstream, const CrossEntropyOptions& o, Check&& check) {
  if (upstream.loss.has_value()) check("grad_loss", *upstream.loss, o.reduction != at::Reduction::None);
  if (upstream.lse.has_value()) check("grad_lse", *upstream.lse, false);
  if (upstream.entropy.has_value()) check("grad_entropy", *upstream.entropy, false);
  if (upstream.logprob.has_value()) check("grad_logprob", *upstream.logprob, false);
}

}  // namespace

void check_cross_entropy_backward(const char* op, const CrossEntropyOutputGrads& upstream,
                                  const CrossEntropyOperands& t, const Tensor& stats, const Tensor& weight_sum,
                                  const CrossEntropyOptions& o, bool grad_target, const Tensor* grad) {
  check_cross_entropy_inputs(op, t, o);
  const Tensor& x = t.input;
  const int64_t dim = class_dim(x);
  for_upstream(upstream, o, [&](const char* name, const Tensor& grad, bool one) {
    check_upstream(op, name, grad, x, one, grad.defined() ? grad.sym_sizes() : c10::SymIntArrayRef());
    RF_CHECK(TORCH_CHECK, one || has_rows_of(grad, x, dim), op, name,
             c10::str("input's shape ", x.sym_sizes(), " without its classes"), grad.sym_sizes());
  });
  const bool probabilities = is_probability_target(x, t.target), entropy = upstream.entropy.has_value();
  RF_CHECK(TORCH_CHECK, !grad_target || probabilities, op, "output_mask", "no gradient of class indices", "one");

  c10::SymInt rows = 1;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != dim) rows = rows * x.sym_size(d);
  const int64_t fewest = cross_entropy_stat_rows(probabilities, entropy),
                most = cross_entropy_stat_rows(probabilities, true);
  check_readable(op, "stats", stats, x);
  check_type(op, "stats", stats, acc_type(x.scalar_type()));
  RF_CHECK(TORCH_CHECK,
           stats.dim() == 2 && stats.sym_size(0) >= fewest && stats.sym_size(0) <= most && stats.sym_size(1) == rows &&
               stats.is_contiguous(),
           op, "stats", c10::str(fewest, " or ", most, " contiguous rows of ", rows, " numbers"), stats.sym_sizes());
  check_readable(op, "weight_sum", weight_sum, x);
  check_type(op, "weight_sum", weight_sum, at::kDouble);
  RF_CHECK(TORCH_CHECK, weight_sum.sym_numel() == 1, op, "weight_sum", "one number", weight_sum.sym_sizes());
  if (!grad) return;
  const char* name = grad == &x ? "input" : "grad";
  check_readable(op, name, *grad, x);
  check_type(op, name, *grad, x.scalar_type());
  check_sizes(op, name, *grad, x.sym_sizes());
  RF_CHECK(TORCH_CHECK, at::has_internal_overlap(*grad) != at::MemOverlap::Yes, op, name,
           "elements that have memory of their own", "overlapping ones (expanded?)");
}

void check_cross_entropy_unless(const Tensor& grad_loss, const CrossEntropyOperands& t, const Tensor& stats,
                                const Tensor& weight_sum, const CrossEntropyOptions& o, const Tensor& grad, double) {
  constexpr auto op = "cross_entropy_backward_unless_";
  check_cross_entropy_backward(op, {grad_loss, {}, {}, {}}, t, stats, weight_sum, o, false, &grad);
  check_reduced(op, o.reduction);
}

// ---- linear_cross_entropy ------------------------------------------------------------------------------------------

namespace {

void check_linear_cross_entropy_inputs(const char* op, const LinearCrossEntropyOperands& t,
                                       const CrossEntropyOptions& o, std::optional<int64_t> memory_budget,
                                       double filter_eps) {
  const Tensor &x = t.input, &w = t.linear_weight, &target = t.target;
  check_first(op, "input", x);
  check_readable(op, "linear_weight", w, x);
  check_readable(op, "target", target, x);
  check_optional(op, "linear_bias", t.linear_bias, x);
  check_optional(op, "weight", t.weight, x);
  check_reduction(op, o.reduction);
  check_linear_cross_entropy(op, t, o, memory_budget, filter_eps);
  const auto type = target.scalar_type();
  RF_CHECK(TORCH_CHECK, !at::isFloatingType(type) || type == x.scalar_type() || type == acc_type(x.scalar_type()), op,
           "target", c10::str(x.scalar_type(), " or ", acc_type(x.scalar_type()), " probabilities"), type);
  check_classes(op, "linear_weight", w, 0);
  c10::SymInt outputs = 1;
  for (int64_t d = 0; d + 1 < w.dim(); ++d) outputs = outputs * w.sym_size(d);
  check_countable(op, "linear_weight", x.dim() == 1 ? c10::SymInt(1) : x.sym_size(0), outputs);
}

}  // namespace

void check_linear_cross_entropy_forward(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o,
                                        int64_t outputs, std::optional<int64_t> memory_budget, OptionalType loss_dtype,
                                        double filter_eps) {
  constexpr auto op = "linear_cross_entropy";
  check_linear_cross_entropy_inputs(op, t, o, memory_budget, filter_eps);
  check_outputs(op, outputs);
  check_loss_dtype(op, loss_dtype);
}

void check_linear_cross_entropy_backward(const CrossEntropyOutputGrads& upstream, const LinearCrossEntropyOperands& t,
                                         const CrossEntropyOptions& o, std::optional<int64_t> memory_budget,
                                         double filter_eps, bool grad_target) {
  constexpr auto op = "linear_cross_entropy_backward";
  check_linear_cross_entropy_inputs(op, t, o, memory_budget, filter_eps);
  const auto shape = symbolic_loss_shape(t.input, t.linear_weight);
  for_upstream(upstream, o, [&](const char* name, const Tensor& grad, bool one) {
    check_upstream(op, name, grad, t.input, one, shape);
  });
  RF_CHECK(TORCH_CHECK, !grad_target || at::isFloatingType(t.target.scalar_type()), op, "output_mask",
           "no gradient of class indices", "one");
}

// ---- linear_nll ----------------------------------------------------------------------------------------------------

namespace {

void check_linear_nll_inputs(const char* op, const LinearNllOperands& t, const LinearNllOptions& o, bool grad_scale) {
  const Tensor& x = t.input;
  check_first(op, "input", x);
  check_readable(op, "weight", t.weight, x);
  check_readable(op, "target", t.target, x);
  check_optional(op, "bias", t.bias, x);
  check_optional(op, "scale", t.scale, x);
  check_optional(op, "sample_weight", t.sample_weight, x);
  check_reduction(op, o.reduction);
  RF_CHECK(TORCH_CHECK_VALUE, 0 <= o.family && o.family < (int64_t)std::size(kFamilyNames), op, "family",
           listed(kFamilyNames, " or ", /*numbered=*/true), o.family);
  const bool gaussian = (Family)o.family == Family::gaussian;
  check_linear_nll(op, t, gaussian);
  const auto type = t.target.scalar_type(), acc = acc_type(x.scalar_type());
  RF_CHECK(TORCH_CHECK, !at::isFloatingType(type) || c10::promoteTypes(type, acc) == acc, op, "target",
           c10::str("a type that fits ", acc), type);
  RF_CHECK(TORCH_CHECK, !grad_scale || (gaussian && t.scale.has_value()), op, "output_mask",
           "no gradient of a scale but a gaussian's variance", "one");
}

}  // namespace

void check_linear_nll_forward(const LinearNllOperands& t, const LinearNllOptions& o, OptionalType loss_dtype,
                              bool grad_scale) {
  check_linear_nll_inputs("linear_nll", t, o, grad_scale);
  check_loss_dtype("linear_nll", loss_dtype);
}

void check_linear_nll_backward(const Tensor& grad, const LinearNllOperands& t, const LinearNllOptions& o,
                               bool grad_scale) {
  constexpr auto op = "linear_nll_backward";
  check_linear_nll_inputs(op, t, o, grad_scale);
  check_upstream(op, "grad", grad, t.input, o.reduction != at::Reduction::None, t.target.sym_sizes());
}

// ---- mse_loss ------------------------------------------------------------------------------------------------------

void check_mse_loss(const char* op, const Tensor& x, const Tensor& target, int64_t reduction) {
  check_first(op, "input", x);
  check_readable(op, "target", target, x);
  check_type(op, "target", target, x.scalar_type());
  check_sizes(op, "target", target, x.sym_sizes());
  check_reduction(op, reduction);
}

void check_mse_loss_backward(const Tensor& grad, const Tensor& x, const Tensor& target, int64_t reduction) {
  constexpr auto op = "mse_loss_backward";
  check_mse_loss(op, x, target, reduction);
  check_upstream(op, "grad", grad, x, reduction != at::Reduction::None, x.sym_sizes());
  check_type(op, "grad", grad, x.scalar_type());
}

}  // namespace rf
