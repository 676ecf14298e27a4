// The options that both cross-entropies have with what is asked of them, and what goes with their outputs.
#pragma once
#include "shared/op_arguments.h"

namespace rf {

struct CrossEntropyRequest : CrossEntropyOptions {
  int64_t outputs;
  OptionalType loss_dtype;

  auto members() const { return std::tuple_cat(CrossEntropyOptions::members(), std::tie(outputs, loss_dtype)); }

  // Upstream gradients of loss, lse, entropy and logprob: they come for the outputs alone, in the order of the bits.
  std::array<OptionalTensor, 4> by_output(const torch::autograd::variable_list& upstream) const {
    std::array<OptionalTensor, 4> result;
    size_t next = 0;
    for (int64_t bit = 0; bit < 4; ++bit)
      if (outputs & (int64_t(1) << bit)) result[bit] = optional(upstream[next++]);
    return result;
  }
};

// What the results are of, where nothing is asked for: `row` is the type that logits count as, input's own or, under
// autocast, float32 for half types; a loss of probabilities is of what it promotes to with them and their weights.
struct CrossEntropyTypes {
  at::ScalarType row, loss;

  CrossEntropyTypes(at::ScalarType logits, const Tensor& target, const Tensor& weight, bool probabilities)
      : row(logits), loss(logits) {
    if (!probabilities) return;
    loss = c10::promoteTypes(loss, target.scalar_type());
    if (weight.defined()) loss = c10::promoteTypes(loss, weight.scalar_type());
  }

  // Results that were computed in the loss's type; the rows' own numbers have theirs.
  std::vector<Tensor> give(std::vector<Tensor> results, int64_t outputs) const {
    size_t next = outputs & kOutputLoss ? 1 : 0;
    for (const int64_t bit : {kOutputLse, kOutputEntropy})
      if (outputs & bit) {
        results[next] = results[next].to(row);
        ++next;
      }
    return results;
  }
};

// A half type under autocast: torch's losses are float32 there, whatever they are given.
inline at::ScalarType autocast_loss_type(at::ScalarType t) {
  return t == at::kBFloat16 || t == at::kHalf ? at::kFloat : t;
}

}  // namespace rf
