// See checks.h. Compiled once, as op_checks.cpp is.
#include "shared/torch_api.h"

#include "shared/checks.h"

namespace rf {

std::string listed(at::ArrayRef<const char*> names, const char* last, bool numbered) {
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) {
    all += i == 0 ? "" : i + 1 < names.size() ? ", " : last;
    all += numbered ? c10::str(i, " (", names[i], ")") : names[i];
  }
  return all;
}

Activation parse_activation(string_view name, const char* op) {
  for (size_t i = 0; i < std::size(kActivationNames); ++i)
    if (name == kActivationNames[i]) return (Activation)i;
  RF_CHECK(TORCH_CHECK_VALUE, false, op, "activation", "one of " + listed(kActivationNames, ", "), std::string(name));
}

int64_t checked_dim(const char* op, const Tensor& x, int64_t dim) {
  const int64_t dims = std::max<int64_t>(1, x.dim());
  RF_CHECK(TORCH_CHECK_INDEX, -dims <= dim && dim < dims, op, "dim", c10::str("from ", -dims, " to ", dims - 1), dim);
  return dim < 0 ? dim + dims : dim;
}

void check_floating(const char* op, const Tensor& x) {
  RF_CHECK(TORCH_CHECK_NOT_IMPLEMENTED, at::isFloatingType(x.scalar_type()), op, "input", "a floating point type",
           x.scalar_type());
}

namespace {

enum class Type { as_input, floating, any };

// A tensor beside the input, on its device; nothing is wrong with one that is absent.
void check_beside(const char* op, const char* name, const Tensor& t, const Tensor& x, Type kind) {
  if (!t.defined()) return;
  const auto type = t.scalar_type();
  RF_CHECK(TORCH_CHECK, x.device() == t.device(), op, name, c10::str(x.device(), " as input is on"), t.device());
  RF_CHECK(TORCH_CHECK, kind != Type::as_input || type == x.scalar_type(), op, name,
           c10::str(x.scalar_type(), " as input has"), type);
  RF_CHECK(TORCH_CHECK, kind != Type::floating || at::isFloatingType(type), op, name, "a floating point type", type);
}

void check_last_dimension(const char* op, const Tensor& x, const c10::SymInt& size, const char* of,
                          const Tensor& like) {
  RF_CHECK(TORCH_CHECK, x.dim() >= 1 && x.sym_size(-1) == size, op, "input",
           c10::str("last dimension ", size, " as ", of, " of shape ", like.sym_sizes(), " has it"), x.sym_sizes());
}

// A weight and its input's rows.
void check_weight(const char* op, const Tensor& x, const Tensor& w) {
  RF_CHECK(TORCH_CHECK, w.dim() == 2, op, "weight", "2 dimensions (out_features, in_features)", w.sym_sizes());
  check_last_dimension(op, x, w.sym_size(1), "weight", w);
}

void check_bias(const char* op, const Tensor& b, const c10::SymInt& outputs) {
  RF_CHECK(TORCH_CHECK, !b.defined() || (b.dim() == 1 && b.sym_size(0) == outputs), op, "bias",
           c10::str("shape [", outputs, "]"), b.sym_sizes());
}

// What cross_entropy and linear_cross_entropy check alike; torch's own looks at the same things in the same order.
void check_label_smoothing(const char* op, double label_smoothing) {
  RF_CHECK(TORCH_CHECK, label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing", "a number from 0 to 1",
           label_smoothing);
}

void check_probabilities(const char* op, const Tensor& target, int64_t ignore_index, const char* expected) {
  RF_CHECK(TORCH_CHECK, at::isFloatingType(target.scalar_type()), op, "target", expected, target.scalar_type());
  RF_CHECK(TORCH_CHECK, ignore_index < 0, op, "ignore_index", "none with probability targets", ignore_index);
}

void check_class_weights(const char* op, const Tensor& w, const c10::SymInt& classes) {
  RF_CHECK(TORCH_CHECK, !w.defined() || (w.dim() == 1 && w.sym_size(0) == classes), op, "weight",
           c10::str("one number for each of the ", classes, " classes"), w.sym_sizes());
}

// Classes of as many rows as there are; of their further dimensions the caller knows.
void check_class_rows(const char* op, const Tensor& x, const Tensor& target) {
  RF_CHECK(TORCH_CHECK_VALUE, x.dim() == 1 || (target.dim() >= 1 && x.sym_size(0) == target.sym_size(0)), op, "target",
           c10::str("batch size ", x.sym_size(0), " as input has"), target.sym_sizes());
  if (x.dim() != 1) return;
  check_class_type(op, target);
  RF_CHECK(TORCH_CHECK_VALUE, target.dim() != 1, op, "target", "one class for one row of logits", target.sym_sizes());
}

}  // namespace

void check_linear(const Tensor& x, const Tensor& w, const Tensor& b) {
  check_weight("linear", x, w);
  check_beside("linear", "weight", w, x, Type::as_input);
  check_bias("linear", b, w.sym_size(0));
  check_beside("linear", "bias", b, x, Type::as_input);
}

void check_phm_operands(const char* op, const Tensor& a, const Tensor& s) {
  const bool cube = a.dim() == 3 && a.sym_size(0) == a.sym_size(1) && a.sym_size(1) == a.sym_size(2);
  RF_CHECK(TORCH_CHECK, cube && a.sym_size(0) >= 1, op, "a", "shape (n, n, n)", a.sym_sizes());
  RF_CHECK(TORCH_CHECK, s.dim() == 3 && s.sym_size(0) == a.sym_size(0), op, "s",
           c10::str("shape (n, out_features / n, in_features / n) with n = ", a.sym_size(0), " as a has it"),
           s.sym_sizes());
}

void check_phm_linear(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& b) {
  constexpr auto op = "phm_linear";
  check_phm_operands(op, a, s);
  check_last_dimension(op, x, a.sym_size(0) * s.sym_size(2), "s", s);
  check_bias(op, b, a.sym_size(0) * s.sym_size(1));
  check_beside(op, "a", a, x, Type::as_input);
  check_beside(op, "s", s, x, Type::as_input);
  check_beside(op, "bias", b, x, Type::as_input);
}

void check_class_type(const char* op, const Tensor& t) {
  RF_CHECK(TORCH_CHECK, at::isIntegralType(t.scalar_type(), /*includeBool=*/false), op, "target", "Long class indices",
           t.scalar_type());
}

void check_softcap(const char* op, std::optional<double> softcap) {
  RF_CHECK(TORCH_CHECK_VALUE, !softcap || *softcap > 0, op, "softcap", "a positive number or None", *softcap);
}

void check_cross_entropy(const char* op, const CrossEntropyOperands& t, const CrossEntropyOptions& o) {
  const Tensor &x = t.input, &target = t.target, &w = value_or_undefined(t.weight);
  // torch looks for the classes' dimension, or, where target has input's shape, at its type first.
  const bool by_type = target.dim() == 0 && !at::isFloatingType(target.scalar_type());
  RF_CHECK(TORCH_CHECK_INDEX, x.dim() >= 1 || by_type, op, "input", "1 or more dimensions", x.dim());
  RF_CHECK(TORCH_CHECK, x.dim() >= 1, op, "input", "1 or more dimensions", x.dim());
  check_label_smoothing(op, o.label_smoothing);
  check_beside(op, "target", target, x, Type::any);
  if (is_probability_target(x, target)) {
    check_probabilities(op, target, o.ignore_index, "floating point probabilities, its shape being input's");
    check_beside(op, "target", target, x, Type::as_input);
  } else {
    check_class_rows(op, x, target);
    bool fits = target.dim() == x.dim() - 1;
    for (int64_t d = 1; fits && d < target.dim(); ++d) fits = target.sym_size(d) == x.sym_size(d + 1);
    RF_CHECK(TORCH_CHECK, fits, op, "target", c10::str("input's shape ", x.sym_sizes(), " without its classes"),
             target.sym_sizes());
    check_class_type(op, target);
  }
  check_class_weights(op, w, x.sym_size(class_dim(x)));
  check_beside(op, "weight", w, x, Type::floating);
}

void check_linear_cross_entropy(const char* op, const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o,
                                std::optional<int64_t> memory_budget, double filter_eps) {
  const Tensor &x = t.input, &w = t.linear_weight, &target = t.target, &b = value_or_undefined(t.linear_bias),
               &c = value_or_undefined(t.weight);
  RF_CHECK(TORCH_CHECK, x.dim() == 1 || x.dim() == 2, op, "input", "1 or 2 dimensions", x.dim());
  check_floating(op, x);
  RF_CHECK(TORCH_CHECK, w.dim() >= 2, op, "linear_weight", "2 or more dimensions (classes, ..., in_features)", w.dim());
  RF_CHECK(TORCH_CHECK, x.sym_size(-1) == w.sym_size(-1), op, "linear_weight",
           c10::str("last dimension ", x.sym_size(-1), " as input has it"), w.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.dim() == 2 || w.dim() == 2, op, "input", "2 dimensions for a K-dimensional loss",
           x.sym_sizes());
  check_label_smoothing(op, o.label_smoothing);
  check_softcap(op, o.softcap);
  RF_CHECK(TORCH_CHECK_VALUE, !memory_budget || *memory_budget > 0, op, "memory_budget",
           "a positive number of bytes or None", *memory_budget);
  RF_CHECK(TORCH_CHECK_VALUE, filter_eps >= 0, op, "filter_eps", "a number of at least 0", filter_eps);
  const auto is = [](const Tensor& tensor, c10::SymIntArrayRef sizes) { return tensor.sym_sizes() == sizes; };
  const auto outputs = w.sym_sizes().slice(0, w.dim() - 1);
  check_beside(op, "linear_weight", w, x, Type::as_input);
  check_beside(op, "linear_bias", b, x, Type::as_input);
  check_beside(op, "weight", c, x, Type::floating);
  check_beside(op, "target", target, x, Type::any);
  RF_CHECK(TORCH_CHECK, !b.defined() || is(b, outputs), op, "linear_bias", c10::str("shape ", outputs), b.sym_sizes());
  check_class_weights(op, c, w.sym_size(0));
  const auto losses = symbolic_loss_shape(x, w);
  auto logits = losses;
  logits.insert(logits.begin() + (x.dim() - 1), w.sym_size(0));
  if (is(target, logits))
    return check_probabilities(op, target, o.ignore_index,
                               "floating point probabilities, its shape being that of the logits");
  check_class_rows(op, x, target);
  RF_CHECK(TORCH_CHECK, is(target, losses), op, "target",
           c10::str("shape ", c10::SymIntArrayRef(losses), ", or probabilities of shape ", c10::SymIntArrayRef(logits)),
           target.sym_sizes());
  check_class_type(op, target);
}

void check_linear_nll(const char* op, const LinearNllOperands& t, bool scale_is_variance) {
  const Tensor &x = t.input, &w = t.weight, &target = t.target, &b = value_or_undefined(t.bias),
               &scale = value_or_undefined(t.scale), &sample_weight = value_or_undefined(t.sample_weight);
  const char* scale_name = scale_is_variance ? "sigma" : "pos_weight";
  check_floating(op, x);
  check_weight(op, x, w);
  const auto rows = x.sym_sizes().slice(0, x.dim() - 1);
  auto predictions = rows.vec();
  predictions.push_back(w.sym_size(0));
  check_beside(op, "weight", w, x, Type::as_input);
  check_beside(op, "bias", b, x, Type::as_input);
  check_beside(op, scale_name, scale, x, Type::floating);
  check_beside(op, "sample_weight", sample_weight, x, Type::floating);
  check_beside(op, "target", target, x, Type::any);
  RF_CHECK(TORCH_CHECK, !at::isComplexType(target.scalar_type()), op, "target", "real numbers", target.scalar_type());
  // Not what broadcasts: (N) beside (N, 1) would be N^2 residuals, which nobody means.
  RF_CHECK(TORCH_CHECK, target.sym_sizes() == c10::SymIntArrayRef(predictions), op, "target",
           c10::str("the predictions' shape ", c10::SymIntArrayRef(predictions)), target.sym_sizes());
  check_bias(op, b, w.sym_size(0));
  if (scale.defined())
    RF_CHECK(TORCH_CHECK, scale.dim() == 0 || (scale.dim() == 1 && scale.sym_size(0) == w.sym_size(0)), op, scale_name,
             c10::str("shape [] or [", w.sym_size(0), "]"), scale.sym_sizes());
  RF_CHECK(TORCH_CHECK, !sample_weight.defined() || sample_weight.sym_sizes() == rows, op, "sample_weight",
           c10::str("one number for each row, shape ", rows), sample_weight.sym_sizes());
}

}  // namespace rf
