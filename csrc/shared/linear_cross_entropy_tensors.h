// linear_cross_entropy's tensors as matrices, for every device: Args is its arguments' struct, a CrossEntropyProblem
// with what the device wants besides (the sum of the class weights), which it adds.
#pragma once
#include "shared/cross_entropy_tensors.h"

namespace rf {

inline Tensor as_matrix(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t; }

// A call's tensors as the loop over chunks wants them. A "row" is one of input's; it has `positions` losses, one after
// another, each over `classes` logits that lie `positions` apart.
template <class Args>
struct LinearCrossEntropyTensors {
  Tensor x, w, bias;       // N x D, classes * positions x D, and as many; bias of the panel's type
  Tensor class_weight;     // acc
  Tensor classes_of_rows;  // int64, positions for each row that takes part
  Tensor probabilities;    // N x classes (x positions), as row_layout can walk it
  int64_t all_rows, rows, features, classes, positions, outputs;  // rows: those that take part
  DType dtype;
  at::ScalarType acc;
  Args loss = {};

  LinearCrossEntropyTensors(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o, bool wide_panel) {
    const Tensor &input = t.input, &linear_weight = t.linear_weight, &target = t.target;
    dtype = dtype_of(input.scalar_type());
    acc = acc_type(input.scalar_type());
    x = as_matrix(input);
    all_rows = rows = x.size(0);
    features = x.size(1);
    classes = linear_weight.size(0);
    // Losses of a row: the product of a K-dimensional weight's further dimensions.
    positions = product(linear_weight.sizes(), 1, linear_weight.dim() - 1);
    outputs = classes * positions;
    w = linear_weight.dim() == 2 ? linear_weight : linear_weight.reshape({outputs, features});
    if (t.linear_bias.has_value())
      bias = as_type(*t.linear_bias, wide_panel ? acc : input.scalar_type()).reshape({outputs}).contiguous();
    loss.classes = classes;
    loss.layout = {positions, outputs, positions == 1 ? 0 : 1, positions};
    if (t.weight.has_value()) {
      class_weight = as_type(*t.weight, acc).contiguous();
      loss.class_weight = class_weight.const_data_ptr();
    }
    set_options(loss, o);
    if (at::isFloatingType(target.scalar_type()))
      probabilities = as_strided_rows(input.dim() == 1 ? target.unsqueeze(0) : target, 1);
    else
      classes_of_rows = as_type(target, at::kLong).contiguous();
  }
};

// Numbers per loss in the order of the rows that take part, acc but for argmax; undefined where not wanted.
struct LinearCrossEntropyOutputs {
  Tensor loss, lse, entropy, logprob, argmax;
  bool total = false;  // the losses' sum or mean
};

// Undefined where not wanted; of matrices, w and bias in the accumulator's type, target in its own.
struct LinearCrossEntropyGradients {
  Tensor x, w, bias, target;
};

// Upstream gradients, acc: of each loss, or of the reduced one a single number.
struct LinearCrossEntropyUpstream {
  bool is_one = false;  // of the reduced loss, then the only one that there is
  Tensor loss, lse, entropy, logprob;
};

// Advances a pointer to a number per loss.
inline void* at_loss(const Tensor& t, int64_t index) {
  return t.defined() ? (char*)t.data_ptr() + index * (int64_t)t.element_size() : nullptr;
}

}  // namespace rf
