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

void check_linear(const Tensor& x, const Tensor& w, const Tensor& b) {
  RF_CHECK(TORCH_CHECK, w.dim() == 2, "linear", "weight", "2 dimensions (out_features, in_features)", w.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.dim() >= 1 && x.sym_size(-1) == w.sym_size(1), "linear", "input",
           c10::str("last dimension ", w.sym_size(1), " as weight of shape ", w.sym_sizes(), " has it"), x.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.scalar_type() == w.scalar_type(), "linear", "weight",
           c10::str(x.scalar_type(), " as input has"), w.scalar_type());
  RF_CHECK(TORCH_CHECK, x.device() == w.device(), "linear", "weight", c10::str(x.device(), " as input is on"),
           w.device());
  if (!b.defined()) return;
  RF_CHECK(TORCH_CHECK, b.dim() == 1 && b.sym_size(0) == w.sym_size(0), "linear", "bias",
           c10::str("shape [", w.sym_size(0), "]"), b.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.scalar_type() == b.scalar_type(), "linear", "bias",
           c10::str(x.scalar_type(), " as input has"), b.scalar_type());
  RF_CHECK(TORCH_CHECK, x.device() == b.device(), "linear", "bias", c10::str(x.device(), " as input is on"),
           b.device());
}

void check_phm_operands(const char* op, const Tensor& a, const Tensor& s) {
  const bool cube = a.dim() == 3 && a.sym_size(0) == a.sym_size(1) && a.sym_size(1) == a.sym_size(2);
  RF_CHECK(TORCH_CHECK, cube && a.sym_size(0) >= 1, op, "a", "shape (n, n, n)", a.sym_sizes());
  RF_CHECK(TORCH_CHECK, s.dim() == 3 && s.sym_size(0) == a.sym_size(0), op, "s",
           c10::str("shape (n, out_features / n, in_features / n) with n = ", a.sym_size(0), " as a has it"),
           s.sym_sizes());
}

void check_phm_linear(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& b) {
  check_phm_operands("phm_linear", a, s);
  const auto n = a.sym_size(0);
  RF_CHECK(TORCH_CHECK, x.dim() >= 1 && x.sym_size(-1) == n * s.sym_size(2), "phm_linear", "input",
           c10::str("last dimension ", n * s.sym_size(2), " as s of shape ", s.sym_sizes(), " has it"), x.sym_sizes());
  if (b.defined())
    RF_CHECK(TORCH_CHECK, b.dim() == 1 && b.sym_size(0) == n * s.sym_size(1), "phm_linear", "bias",
             c10::str("shape [", n * s.sym_size(1), "]"), b.sym_sizes());
  const auto same = [&](const char* name, const Tensor& tensor) {
    if (!tensor.defined()) return;
    RF_CHECK(TORCH_CHECK, x.scalar_type() == tensor.scalar_type(), "phm_linear", name,
             c10::str(x.scalar_type(), " as input has"), tensor.scalar_type());
    RF_CHECK(TORCH_CHECK, x.device() == tensor.device(), "phm_linear", name, c10::str(x.device(), " as input is on"),
             tensor.device());
  };
  same("a", a);
  same("s", s);
  same("bias", b);
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
  RF_CHECK(TORCH_CHECK, o.label_smoothing >= 0 && o.label_smoothing <= 1, op, "label_smoothing", "a number from 0 to 1",
           o.label_smoothing);
  RF_CHECK(TORCH_CHECK, x.device() == target.device(), op, "target", c10::str(x.device(), " as input is on"),
           target.device());
  const auto classes = x.sym_size(class_dim(x));
  if (is_probability_target(x, target)) {
    RF_CHECK(TORCH_CHECK, at::isFloatingType(target.scalar_type()), op, "target",
             "floating point probabilities, its shape being input's", target.scalar_type());
    RF_CHECK(TORCH_CHECK, target.scalar_type() == x.scalar_type(), op, "target",
             c10::str(x.scalar_type(), " as input has"), target.scalar_type());
    RF_CHECK(TORCH_CHECK, o.ignore_index < 0, op, "ignore_index", "none with probability targets", o.ignore_index);
  } else {
    RF_CHECK(TORCH_CHECK_VALUE, x.dim() == 1 || (target.dim() >= 1 && x.sym_size(0) == target.sym_size(0)), op,
             "target", c10::str("batch size ", x.sym_size(0), " as input has"), target.sym_sizes());
    if (x.dim() == 1) check_class_type(op, target);
    RF_CHECK(TORCH_CHECK_VALUE, x.dim() != 1 || target.dim() != 1, op, "target", "one class for one row of logits",
             target.sym_sizes());
    bool fits = target.dim() == x.dim() - 1;
    for (int64_t d = 1; fits && d < target.dim(); ++d) fits = target.sym_size(d) == x.sym_size(d + 1);
    RF_CHECK(TORCH_CHECK, fits, op, "target", c10::str("input's shape ", x.sym_sizes(), " without its classes"),
             target.sym_sizes());
    check_class_type(op, target);
  }
  if (!w.defined()) return;
  RF_CHECK(TORCH_CHECK, w.dim() == 1 && w.sym_size(0) == classes, op, "weight",
           c10::str("one number for each of the ", classes, " classes"), w.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.device() == w.device(), op, "weight", c10::str(x.device(), " as input is on"), w.device());
  RF_CHECK(TORCH_CHECK, at::isFloatingType(w.scalar_type()), op, "weight", "a floating point type", w.scalar_type());
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
  RF_CHECK(TORCH_CHECK, o.label_smoothing >= 0 && o.label_smoothing <= 1, op, "label_smoothing", "a number from 0 to 1",
           o.label_smoothing);
  check_softcap(op, o.softcap);
  RF_CHECK(TORCH_CHECK_VALUE, !memory_budget || *memory_budget > 0, op, "memory_budget",
           "a positive number of bytes or None", *memory_budget);
  RF_CHECK(TORCH_CHECK_VALUE, filter_eps >= 0, op, "filter_eps", "a number of at least 0", filter_eps);
  const auto losses = symbolic_loss_shape(x, w);
  auto logits = losses;
  logits.insert(logits.begin() + (x.dim() - 1), w.sym_size(0));
  const auto is = [](const Tensor& tensor, c10::SymIntArrayRef sizes) { return tensor.sym_sizes() == sizes; };
  const auto same = [&](const char* name, const Tensor& tensor, bool dtype) {
    if (!tensor.defined()) return;
    RF_CHECK(TORCH_CHECK, x.device() == tensor.device(), op, name, c10::str(x.device(), " as input is on"),
             tensor.device());
    RF_CHECK(TORCH_CHECK, !dtype || x.scalar_type() == tensor.scalar_type(), op, name,
             c10::str(x.scalar_type(), " as input has"), tensor.scalar_type());
  };
  same("linear_weight", w, true);
  same("linear_bias", b, true);
  same("weight", c, false);
  same("target", target, false);
  if (b.defined())
    RF_CHECK(TORCH_CHECK, is(b, w.sym_sizes().slice(0, w.dim() - 1)), op, "linear_bias",
             c10::str("shape ", w.sym_sizes().slice(0, w.dim() - 1)), b.sym_sizes());
  if (c.defined())
    RF_CHECK(TORCH_CHECK, c.dim() == 1 && c.sym_size(0) == w.sym_size(0), op, "weight",
             c10::str("one number for each of the ", w.sym_size(0), " classes"), c.sym_sizes());
  RF_CHECK(TORCH_CHECK, !c.defined() || at::isFloatingType(c.scalar_type()), op, "weight", "a floating point type",
           c.scalar_type());
  if (is(target, logits)) {
    RF_CHECK(TORCH_CHECK, at::isFloatingType(target.scalar_type()), op, "target",
             "floating point probabilities, its shape being that of the logits", target.scalar_type());
    RF_CHECK(TORCH_CHECK, o.ignore_index < 0, op, "ignore_index", "none with probability targets", o.ignore_index);
    return;
  }
  RF_CHECK(TORCH_CHECK_VALUE, x.dim() == 1 || (target.dim() >= 1 && x.sym_size(0) == target.sym_size(0)), op, "target",
           c10::str("batch size ", x.sym_size(0), " as input has"), target.sym_sizes());
  if (x.dim() == 1) check_class_type(op, target);
  RF_CHECK(TORCH_CHECK_VALUE, x.dim() != 1 || target.dim() != 1, op, "target", "one class for one row",
           target.sym_sizes());
  RF_CHECK(TORCH_CHECK, is(target, losses), op, "target",
           c10::str("shape ", c10::SymIntArrayRef(losses), ", or probabilities of shape ", c10::SymIntArrayRef(logits)),
           target.sym_sizes());
  check_class_type(op, target);
}

void check_linear_nll(const char* op, const LinearNllOperands& t, bool scale_is_variance) {
  const Tensor &x = t.input, &w = t.weight, &target = t.target, &b = value_or_undefined(t.bias),
               &scale = value_or_undefined(t.scale), &sample_weight = value_or_undefined(t.sample_weight);
  check_floating(op, x);
  RF_CHECK(TORCH_CHECK, w.dim() == 2, op, "weight", "2 dimensions (out_features, in_features)", w.sym_sizes());
  RF_CHECK(TORCH_CHECK, x.dim() >= 1 && x.sym_size(-1) == w.sym_size(1), op, "input",
           c10::str("last dimension ", w.sym_size(1), " as weight of shape ", w.sym_sizes(), " has it"), x.sym_sizes());
  auto predictions = x.sym_sizes().vec();
  predictions.pop_back();
  const auto rows = predictions;
  predictions.push_back(w.sym_size(0));
  const auto same = [&](const char* name, const Tensor& tensor, bool or_any) {
    if (!tensor.defined()) return;
    RF_CHECK(TORCH_CHECK, x.device() == tensor.device(), op, name, c10::str(x.device(), " as input is on"),
             tensor.device());
    const auto type = tensor.scalar_type();
    RF_CHECK(TORCH_CHECK, !or_any || at::isFloatingType(type), op, name, "a floating point type", type);
    RF_CHECK(TORCH_CHECK, or_any || type == x.scalar_type(), op, name, c10::str(x.scalar_type(), " as input has"),
             type);
  };
  same("weight", w, false);
  same("bias", b, false);
  const char* scale_name = scale_is_variance ? "sigma" : "pos_weight";
  same(scale_name, scale, true);
  same("sample_weight", sample_weight, true);
  RF_CHECK(TORCH_CHECK, x.device() == target.device(), op, "target", c10::str(x.device(), " as input is on"),
           target.device());
  RF_CHECK(TORCH_CHECK, !at::isComplexType(target.scalar_type()), op, "target", "real numbers", target.scalar_type());
  // Not what broadcasts: (N) beside (N, 1) would be N^2 residuals, which nobody means.
  RF_CHECK(TORCH_CHECK, target.sym_sizes() == c10::SymIntArrayRef(predictions), op, "target",
           c10::str("the predictions' shape ", c10::SymIntArrayRef(predictions)), target.sym_sizes());
  if (b.defined())
    RF_CHECK(TORCH_CHECK, b.dim() == 1 && b.sym_size(0) == w.sym_size(0), op, "bias",
             c10::str("shape [", w.sym_size(0), "]"), b.sym_sizes());
  if (scale.defined())
    RF_CHECK(TORCH_CHECK, scale.dim() == 0 || (scale.dim() == 1 && scale.sym_size(0) == w.sym_size(0)), op, scale_name,
             c10::str("shape [] or [", w.sym_size(0), "]"), scale.sym_sizes());
  if (sample_weight.defined())
    RF_CHECK(TORCH_CHECK, sample_weight.sym_sizes() == c10::SymIntArrayRef(rows), op, "sample_weight",
             c10::str("one number for each row, shape ", c10::SymIntArrayRef(rows)), sample_weight.sym_sizes());
}

}  // namespace rf
