// Cross-entropy's tensors as plain structs, for every device: Args is its arguments' struct, a CrossEntropyProblem with
// what the device wants besides (the sum of the class weights), which it adds.
#pragma once
#include <limits>

#include "shared/checks.h"
#include "shared/layouts.h"
#include "shared/problems.h"

namespace rf {

// A mean over rows whose weights are all zero is NaN, whatever a smoothed loss or z_loss add up to beside them: PyTorch
// divides each part of a loss by itself, and one of them is 0 / 0.
inline double mean_of(double sum, double weights) {
  return weights == 0 ? std::numeric_limits<double>::quiet_NaN() : sum / weights;
}

inline void set_options(CrossEntropyProblem& a, const CrossEntropyOptions& o) {
  a.ignore_index = o.ignore_index;
  a.label_smoothing = o.label_smoothing;
  a.z_loss = o.z_loss;
  a.softcap = o.softcap.value_or(0.0);
  a.logit_scale = o.logit_scale.value_or(1.0);
}

// The tensors that `args` points into.
template <class Args>
struct CrossEntropyTensors {
  Tensor x, target, probabilities, weight;
  Args args = {};
  int64_t rows = 0;
  DType dtype;
};

template <class Args>
CrossEntropyTensors<Args> cross_entropy_tensors(const CrossEntropyOperands& given, const CrossEntropyOptions& o) {
  CrossEntropyTensors<Args> t;
  const Tensor &input = given.input, &target = given.target;
  const int64_t dim = class_dim(input);
  t.x = as_strided_rows(input, dim);
  t.rows = rows_without(input, dim);
  t.dtype = dtype_of(input.scalar_type());
  Args& a = t.args;
  a.logits = t.x.const_data_ptr();
  a.layout = *row_layout(t.x, dim);
  a.classes = input.size(dim);
  if (given.weight.has_value()) {
    t.weight = given.weight->to(acc_type(input.scalar_type())).contiguous();
    a.class_weight = t.weight.const_data_ptr();
  }
  if (is_probability_target(input, target)) {
    t.probabilities = as_strided_rows(target, dim);
    a.probabilities = t.probabilities.const_data_ptr();
    a.probability_layout = *row_layout(t.probabilities, dim);
  } else {
    t.target = target.to(at::kLong).contiguous();
    a.target = t.target.template const_data_ptr<int64_t>();
  }
  set_options(a, o);
  return t;
}

// Where each row's statistics lie in the tensor that is saved for backward.
inline void point_to_stats(CrossEntropyProblem& a, const Tensor& stats) {
  const auto row = [&](CrossEntropyStat s) -> void* {
    return s < stats.size(0) ? (char*)stats.data_ptr() + s * stats.size(1) * (int64_t)stats.element_size() : nullptr;
  };
  a.row_max = row(kMax);
  a.row_log_sum = row(kLogSum);
  a.row_entropy = row(kEntropy);
  a.row_mass = row(kMass);
  a.row_target_mass = row(kTargetMass);
}

// Upstream gradients as arguments have them, one number for each row in order, in memory that lives as long as this.
struct CrossEntropyRowGrads {
  Tensor loss, lse, entropy, logprob;

  CrossEntropyRowGrads(const CrossEntropyOutputGrads& grads, at::ScalarType acc) {
    const auto rows = [&](const OptionalTensor& t) { return t.has_value() ? t->to(acc).contiguous() : Tensor(); };
    loss = rows(grads.loss);
    lse = rows(grads.lse);
    entropy = rows(grads.entropy);
    logprob = rows(grads.logprob);
  }
  void point_to(CrossEntropyBackward& a) const {
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
    a.loss = data(loss);
    a.lse = data(lse);
    a.entropy = data(entropy);
    a.logprob = data(logprob);
  }
};

}  // namespace rf
