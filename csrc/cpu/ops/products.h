// Products of two-dimensional tensors inside of other operations, whose partial results may keep the accumulator's
// type.
#pragma once
#include "cpu/drivers/drivers.h"
#include "cpu/ops/traced.h"
#include "shared/torch_api.h"

namespace rf {

inline MatrixView view_of(const Tensor& t) { return {t.const_data_ptr(), 1, t.stride(0), 0, t.stride(1)}; }

// Whether a factor or a result of a product has the accumulator's type beside a half type's. Nothing but these two is
// multiplied.
inline bool is_wide(const Tensor& t, at::ScalarType type) {
  TORCH_INTERNAL_ASSERT(t.scalar_type() == type || t.scalar_type() == acc_type(type), "regfast: a product of ", type,
                        " with a tensor of ", t.scalar_type());
  return t.scalar_type() != type;
}

// c = a b + bias, or c += a b, by whichever GEMM the table names. a may have the accumulator's type beside a b of a
// half type, and so may c.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const DType dtype = dtype_of(b.scalar_type());
  const int64_t m = c.size(0), n = c.size(1), k = b.size(0);
  const bool wide_a = is_wide(a, b.scalar_type()), wide_c = is_wide(c, b.scalar_type());
  TORCH_INTERNAL_ASSERT(a.size(0) == m && a.size(1) == k && b.size(1) == n && (n <= 1 || c.stride(1) == 1) &&
                        (!bias.defined() || (bias.scalar_type() == c.scalar_type() && bias.dim() == 1 &&
                                             bias.size(0) == n && bias.is_contiguous())));
  if (!wide_a && !wide_c && product_by_aten(b.scalar_type(), m, n, k)) {
    Tensor out = c;
    if (accumulate)
      out.addmm_(a, b);
    else if (bias.defined())
      at::addmm_out(out, bias, a, b);
    else
      at::mm_out(out, a, b);
    return;
  }
  Gemm g = {};
  g.m = m;
  g.n = n;
  g.k = k;
  // A matrix whose rows are adjacent down its columns is the transpose of one that is stored by rows.
  g.a_transposed = a.stride(1) != 1 && a.stride(0) == 1;
  g.a = view_of(g.a_transposed ? a.t() : a);
  g.b_transposed = b.stride(1) != 1 && b.stride(0) == 1;
  g.b = view_of(g.b_transposed ? b.t() : b);
  g.wide_a = wide_a;
  g.wide_c = wide_c;
  g.accumulate = accumulate;
  g.epilogue.c = c.mutable_data_ptr();
  g.epilogue.c_stride = c.stride(0);
  g.epilogue.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  gemm(dtype, g);
}

}  // namespace rf
