// Tensors that ops return: large ones on huge pages, and numbers.
#pragma once
#include "cpu/platform.h"
#include "shared/torch_api.h"

namespace rf {

// Fresh memory that a kernel is about to fill.
inline Tensor on_huge_pages(Tensor t) {
  advise_huge_pages(t.mutable_data_ptr(), (int64_t)t.nbytes());
  return t;
}

// A tensor of one number, without the dispatch of a fill.
inline Tensor number(double value, at::ScalarType type) {
  Tensor t = at::empty({}, at::TensorOptions(type));
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
