// Tensors that ops return.
#pragma once
#include "shared/torch_api.h"

namespace rf {

// Tensors that a kernel is about to fill: large ones in memory that is kept (platform.h).
Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);
// Of another's sizes and, where its elements lie without gaps, strides.
Tensor empty_result_like(const Tensor& t);

// A tensor of one number, without the dispatch of a fill.
inline Tensor number(double value, at::ScalarType type) {
  Tensor t = empty_result({}, at::TensorOptions(type));
  switch (type) {
    case at::kDouble:
      *t.mutable_data_ptr<double>() = value;
      break;
    case at::kFloat:
      *t.mutable_data_ptr<float>() = (float)value;
      break;
    default:
      t.fill_(value);
  }
  return t;
}

}  // namespace rf
