// linear_cross_entropy's tensors on the CPU: where some rows have no loss at all, those that take part are listed, and
// the others cost nothing.
#pragma once
#include <cstring>

#include "cpu/kernels/arguments.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/checks.h"
#include "shared/chunked_linear.h"
#include "shared/compensated_sum.h"
#include "shared/linear_cross_entropy_tensors.h"

namespace rf {

struct LinearCrossEntropyProblem : LinearCrossEntropyTensors<CrossEntropyArgs> {
  std::vector<int64_t> list;  // rows that take part, if `listed`
  bool listed = false;
  double denominator;  // of a mean

  LinearCrossEntropyProblem(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o, bool every_row)
      : LinearCrossEntropyTensors(t, o, /*wide_panel=*/true) {
    const bool smoothed = t.weight.has_value() && o.label_smoothing != 0;
    loss.class_weight_sum = smoothed ? ordered_sum(class_weight) : (double)classes;
    if (probabilities.defined())
      denominator = (double)(rows * positions);
    else
      list_rows(o.ignore_index, every_row);
  }

  // Numbers per loss in the order of the rows that take part; and back, with 0 for the others.
  Tensor of_rows(const Tensor& t) const {
    const Tensor numbers = as_type(t, acc).reshape({all_rows, positions});
    return listed ? numbers.index_select(0, indices()) : numbers.contiguous();
  }
  Tensor of_all(const Tensor& t) const {
    if (!listed) return t;
    return at::zeros({all_rows, positions}, t.options()).index_copy_(0, indices(), t.view({rows, positions}));
  }

  // Rows of a chunk gathered from, or scattered to, where the list says they lie.
  void copy_rows(const Chunk& c, const Tensor& chunk, const Tensor& whole, bool gather) const {
    const int64_t bytes = features * (int64_t)whole.element_size(), stride = whole.stride(0) * whole.element_size();
    char *packed = (char*)chunk.mutable_data_ptr(), *spread = (char*)whole.data_ptr();
    parallel_for(c.rows, tuning::kParallelElements / std::max<int64_t>(1, features) + 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        char *a = packed + i * bytes, *b = spread + list[c.begin + i] * stride;
        std::memcpy(gather ? a : b, gather ? b : a, (size_t)bytes);
      }
    });
  }

 private:
  Tensor indices() const { return at::from_blob((void*)list.data(), {(int64_t)list.size()}, at::kLong); }

  // Checks the classes, sums their weights, and lists rows if some may be left out.
  void list_rows(int64_t ignore_index, bool every_row) {
    const int64_t* y = classes_of_rows.const_data_ptr<int64_t>();
    const Tensor weights = class_weight.defined() ? class_weight.to(at::kDouble) : Tensor();
    const double* w = class_weight.defined() ? weights.const_data_ptr<double>() : nullptr;
    CompensatedSum sum;
    for (int64_t r = 0; r < rows; ++r) {
      bool any = false;
      for (int64_t i = r * positions; i < (r + 1) * positions; ++i) {
        if (y[i] == ignore_index) continue;
        RF_CHECK(TORCH_CHECK_INDEX, y[i] >= 0 && y[i] < classes, "linear_cross_entropy", "target",
                 c10::str("classes from 0 to ", classes - 1), y[i]);
        sum.add(w ? w[y[i]] : 1);
        any = true;
      }
      if (any) list.push_back(r);
    }
    denominator = sum.value();
    listed = !every_row && (int64_t)list.size() < rows;
    if (!listed) return;
    if (x.stride(1) != 1) x = x.contiguous();
    classes_of_rows = classes_of_rows.view({rows, positions}).index_select(0, indices());
    rows = (int64_t)list.size();
  }
};

}  // namespace rf
