// phm_linear's tensors as its kernels see them, for every device.
#pragma once
#include "shared/layouts.h"

namespace rf {

struct PhmTensors {
  int64_t n, rows, inputs, outputs, from_part, to_part;  // the last two: d / n, q / n
  DType dtype;
  at::ScalarType acc;
  Tensor x, a, s;  // x by rows, a in acc, s as q / n rows of d

  PhmTensors(const Tensor& like, const Tensor& its_a, const Tensor& its_s) {
    n = its_a.size(0);
    rows = rows_of(like);
    from_part = its_s.size(2);
    to_part = its_s.size(1);
    inputs = n * from_part;
    outputs = n * to_part;
    dtype = dtype_of(like.scalar_type());
    acc = acc_type(like.scalar_type());
    a = its_a.to(acc);
    // In place where PHMLinear laid its parameter out so; else a copy of an n-th of what W would take.
    s = its_s.permute({1, 0, 2}).reshape({to_part, inputs});
    if (s.stride(1) != 1 && inputs > 1) s = s.contiguous();
  }
  void set_input(const Tensor& input) {
    x = input.reshape({rows, inputs});
    if (x.stride(1) != 1 && inputs > 1) x = x.contiguous();
  }
  Tensor mixing() const { return a.permute({1, 0, 2}).contiguous(); }    // (u, m) x p
  Tensor unmixing() const { return a.permute({2, 1, 0}).contiguous(); }  // p x (u, m)
};

}  // namespace rf
