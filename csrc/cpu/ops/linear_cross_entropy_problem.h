// linear_cross_entropy's tensors as the loop over chunks wants them: rows, the classes or probabilities of each, and
// the list of the rows that take part.
#pragma once
#include <cstring>

#include "cpu/kernels/arguments.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/checks.h"
#include "shared/compensated_sum.h"
#include "shared/cross_entropy_tensors.h"
#include "shared/linear_cross_entropy_tensors.h"
#include "shared/torch_api.h"

namespace rf {

// A call's tensors as the loop over chunks wants them. A "row" is one of input's; it has `positions` losses, one after
// another, each over `classes` logits that lie `positions` apart.
struct LinearCrossEntropyProblem {
  Tensor x, w;                // N x D, and classes * positions x D
  Tensor bias, class_weight;  // acc
  Tensor classes_of_rows;     // int64, positions for each row that takes part
  Tensor probabilities;       // N x classes (x positions), as row_layout can walk it
  std::vector<int64_t> list;  // rows that take part, where some have no loss at all
  bool listed = false;
  int64_t all_rows, rows, features, classes, positions, outputs;  // rows: those that take part
  double denominator;
  DType dtype;
  at::ScalarType acc;
  CrossEntropyArgs loss = {};
};

inline LinearCrossEntropyProblem linear_cross_entropy_problem(const LinearCrossEntropyOperands& t,
                                                              const CrossEntropyOptions& o, bool every_row) {
  LinearCrossEntropyProblem p;
  const Tensor &input = t.input, &linear_weight = t.linear_weight, &target = t.target;
  p.dtype = dtype_of(input.scalar_type());
  p.acc = acc_type(input.scalar_type());
  p.x = as_matrix(input);
  p.w =
      linear_weight.dim() == 2
          ? linear_weight
          : linear_weight.reshape({product(linear_weight.sizes(), 0, linear_weight.dim() - 1), linear_weight.size(-1)});
  p.all_rows = p.rows = p.x.size(0);
  p.features = p.x.size(1);
  p.classes = linear_weight.size(0);
  p.outputs = p.w.size(0);
  p.positions = positions_of(linear_weight);
  if (t.linear_bias.has_value()) p.bias = as_type(*t.linear_bias, p.acc).reshape({p.outputs}).contiguous();
  CrossEntropyArgs& a = p.loss;
  a.classes = p.classes;
  a.layout = {p.positions, p.outputs, p.positions == 1 ? 0 : 1, p.positions};
  a.class_weight_sum = (double)p.classes;
  if (t.weight.has_value()) {
    p.class_weight = as_type(*t.weight, p.acc).contiguous();
    a.class_weight = p.class_weight.const_data_ptr();
    if (o.label_smoothing != 0) a.class_weight_sum = ordered_sum(p.class_weight);
  }
  set_options(a, o);

  if (at::isFloatingType(target.scalar_type())) {
    p.probabilities = as_strided_rows(input.dim() == 1 ? target.unsqueeze(0) : target, 1);
    p.denominator = (double)(p.rows * p.positions);
    return p;
  }
  p.classes_of_rows = as_type(target, at::kLong).contiguous();
  const int64_t* y = p.classes_of_rows.const_data_ptr<int64_t>();
  const Tensor weights = t.weight.has_value() ? p.class_weight.to(at::kDouble) : Tensor();
  const double* w = t.weight.has_value() ? weights.const_data_ptr<double>() : nullptr;
  CompensatedSum denominator;
  for (int64_t r = 0; r < p.rows; ++r) {
    bool any = false;
    for (int64_t i = r * p.positions; i < (r + 1) * p.positions; ++i) {
      if (y[i] == o.ignore_index) continue;
      RF_CHECK(TORCH_CHECK_INDEX, y[i] >= 0 && y[i] < p.classes, "linear_cross_entropy", "target",
               c10::str("classes from 0 to ", p.classes - 1), c10::str("Target ", y[i], " is out of bounds."));
      denominator.add(w ? w[y[i]] : 1);
      any = true;
    }
    if (any) p.list.push_back(r);
  }
  p.denominator = denominator.value();
  p.listed = !every_row && (int64_t)p.list.size() < p.rows;
  if (p.listed) {
    if (p.x.stride(1) != 1) p.x = p.x.contiguous();
    const Tensor rows = at::from_blob(p.list.data(), {(int64_t)p.list.size()}, at::kLong);
    p.classes_of_rows = p.classes_of_rows.view({p.rows, p.positions}).index_select(0, rows);
    p.rows = (int64_t)p.list.size();
  }
  return p;
}

// Numbers per loss in the order of the rows that take part; and back, with 0 for the others.
inline Tensor of_listed(const LinearCrossEntropyProblem& p, const Tensor& t) {
  const Tensor rows = as_type(t, p.acc).reshape({p.all_rows, p.positions});
  return p.listed ? rows.index_select(0, at::from_blob((void*)p.list.data(), {p.rows}, at::kLong)) : rows.contiguous();
}
inline Tensor of_all(const LinearCrossEntropyProblem& p, const Tensor& t, int64_t all_rows) {
  if (!p.listed) return t;
  return at::zeros({all_rows, p.positions}, t.options())
      .index_copy_(0, at::from_blob((void*)p.list.data(), {p.rows}, at::kLong), t.view({p.rows, p.positions}));
}

// Rows of a chunk gathered from, or scattered to, where the list says they lie.
inline void copy_rows(const LinearCrossEntropyProblem& p, int64_t begin, const Tensor& chunk, const Tensor& whole,
                      bool gather) {
  const int64_t bytes = p.features * (int64_t)whole.element_size(), stride = whole.stride(0) * whole.element_size();
  char *packed = (char*)chunk.mutable_data_ptr(), *spread = (char*)whole.data_ptr();
  parallel_for(chunk.size(0), tuning::kParallelElements / std::max<int64_t>(1, p.features) + 1,
               [&](int64_t from, int64_t to) {
                 for (int64_t i = from; i < to; ++i) {
                   char *a = packed + i * bytes, *b = spread + p.list[begin + i] * stride;
                   std::memcpy(gather ? a : b, gather ? b : a, (size_t)bytes);
                 }
               });
}

}  // namespace rf
