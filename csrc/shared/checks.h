// The user's mistakes: each is one message that names the op, the argument, what was expected and what came. Called
// where users' calls arrive, in autograd/, and by op_checks.h, for who calls an op as it stands. Sizes are symbolic, so
// that the checks hold while tracing.
#pragma once
#include "shared/op_arguments.h"

// A macro: the words are put together only if they are needed.
#define RF_CHECK(kind, condition, op, argument, expected, ...) \
  kind(condition, "regfast.", op, ": ", argument, ": expected ", expected, ", got ", __VA_ARGS__)

namespace rf {

// Names as a sentence has them: "a, b, c or d"; or "0 (a), 1 (b), 2 (c) or 3 (d)".
std::string listed(at::ArrayRef<const char*> names, const char* last = " or ", bool numbered = false);

Activation parse_activation(string_view name, const char* op);

// As torch: IndexError for a dimension that is not there; a scalar has one.
int64_t checked_dim(const char* op, const Tensor& x, int64_t dim);

void check_floating(const char* op, const Tensor& x);

void check_linear(const Tensor& x, const Tensor& w, const Tensor& b);

void check_phm_operands(const char* op, const Tensor& a, const Tensor& s);

void check_phm_linear(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& b);

inline int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

inline bool is_probability_target(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

// Class indices of any integer type, where torch's own is Long or Byte.
void check_class_type(const char* op, const Tensor& t);

void check_softcap(const char* op, std::optional<double> softcap);

// Types of exception as torch.nn.functional.cross_entropy raises them.
void check_cross_entropy(const char* op, const CrossEntropyOperands& t, const CrossEntropyOptions& o);

// torch multiplies losses of classes by weights of the logits' type alone, losses of probabilities by any.
inline void check_class_weight_type(const char* op, at::ScalarType logits, const OptionalTensor& weight,
                                    bool probabilities) {
  const Tensor& w = value_or_undefined(weight);
  RF_CHECK(TORCH_CHECK, !w.defined() || probabilities || w.scalar_type() == logits, op, "weight",
           c10::str(logits, " as input has"), w.scalar_type());
}

// linear_cross_entropy's losses: of each row, and of each position of a K-dimensional weight.
inline std::vector<c10::SymInt> symbolic_loss_shape(const Tensor& input, const Tensor& linear_weight) {
  std::vector<c10::SymInt> shape;
  if (input.dim() == 2) shape.push_back(input.sym_size(0));
  for (int64_t d = 1; d + 1 < linear_weight.dim(); ++d) shape.push_back(linear_weight.sym_size(d));
  return shape;
}

// Types of exception as torch.nn.functional.linear_cross_entropy raises them. `target` holds probabilities where it is
// floating, as it has to be then where its shape is that of the logits.
void check_linear_cross_entropy(const char* op, const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o,
                                std::optional<int64_t> memory_budget, double filter_eps);

// `op` is the function that the user called. Values of scale and sample_weight are not looked at: a device would have
// to be waited for.
void check_linear_nll(const char* op, const LinearNllOperands& t, bool scale_is_variance);

}  // namespace rf
