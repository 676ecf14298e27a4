// What the ops of a loss take, as structs beneath their schemas (see flat.h): operands and upstream gradients, which
// are references and live no longer than a call, and options. A new option is a line here.
#pragma once
#include "shared/torch_api.h"

namespace rf {

// ---- cross_entropy, linear_cross_entropy ---------------------------------------------------------------------------

struct CrossEntropyOptions {
  int64_t ignore_index, reduction;
  double label_smoothing, z_loss;
  std::optional<double> softcap, logit_scale;

  auto members() const { return std::tie(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale); }
};

struct CrossEntropyOperands {
  const Tensor &input, &target;
  const OptionalTensor& weight;

  auto members() const { return std::tie(input, target, weight); }
};

struct LinearCrossEntropyOperands {
  const Tensor &input, &linear_weight, &target;
  const OptionalTensor &linear_bias, &weight;

  auto members() const { return std::tie(input, linear_weight, target, linear_bias, weight); }
};

// Of the differentiable outputs; absent where an output was not asked for or not used.
struct CrossEntropyOutputGrads {
  const OptionalTensor &loss, &lse, &entropy, &logprob;

  auto members() const { return std::tie(loss, lse, entropy, logprob); }
};

// ---- linear_nll ----------------------------------------------------------------------------------------------------

struct LinearNllOptions {
  int64_t family;
  double variance;
  bool full;
  int64_t reduction;

  auto members() const { return std::tie(family, variance, full, reduction); }
};

struct LinearNllOperands {
  const Tensor &input, &weight, &target;
  const OptionalTensor &bias, &scale, &sample_weight;

  auto members() const { return std::tie(input, weight, target, bias, scale, sample_weight); }
};

}  // namespace rf
