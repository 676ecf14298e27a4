// Products of two-dimensional tensors inside of other operations, whose partial results may keep the accumulator's
// type.
#pragma once
#include "cpu/drivers/drivers.h"
#include "cpu/ops/traced.h"
#include "shared/torch_api.h"

namespace rf {

inline MatrixView view_of(const Tensor& t) { return {t.const_data_ptr(), 1, t.stride(0), 0, t.stride(1)}; }

// The type of a product: its factors', of which one may have the accumulator's type beside a half type.
inline at::ScalarType product_type(const Tensor& a, const Tensor& b) {
  return a.element_size() < b.element_size() ? a.scalar_type() : b.scalar_type();
}
// Whether a factor or a result of a product has the accumulator's type beside a half type's. Nothing but these two is
// multiplied.
inline bool is_wide(const Tensor& t, at::ScalarType type) {
  TORCH_INTERNAL_ASSERT(t.scalar_type() == type || t.scalar_type() == acc_type(type), "regfast: a product of ", type,
                        " with a tensor of ", t.scalar_type());
  return t.scalar_type() != type;
}

// A factor of a product: a matrix, or its transpose without a tensor of its own.
struct Factor {
  Factor(const Tensor& t, bool transposed = false) : t(t), transposed(transposed) {}

  const Tensor& t;
  const bool transposed;

  int64_t size(int d) const { return t.size(transposed ? 1 - d : d); }
  int64_t stride(int d) const { return t.stride(transposed ? 1 - d : d); }
  Tensor tensor() const { return transposed ? t.t() : t; }
  // A matrix whose rows are adjacent down its columns is the transpose of one that is stored by rows.
  bool stored_by_columns() const { return stride(1) != 1 && stride(0) == 1; }
  MatrixView view() const {
    const bool columns = stored_by_columns();
    return {t.const_data_ptr(), 1, stride(columns), 0, stride(!columns)};
  }
};
inline Factor transpose(const Tensor& t) { return {t, true}; }

// c = a b by our GEMM, of matrices that fit.
inline Gemm gemm_of(const Factor& a, const Factor& b, const Tensor& c) {
  const auto type = product_type(a.t, b.t);
  Gemm g = {};
  g.m = c.size(0);
  g.n = c.size(1);
  g.k = b.size(0);
  g.a_transposed = a.stored_by_columns();
  g.a = a.view();
  g.b_transposed = b.stored_by_columns();
  g.b = b.view();
  g.wide_a = is_wide(a.t, type);
  g.wide_b = is_wide(b.t, type);
  g.wide_c = is_wide(c, type);
  g.epilogue.c = c.mutable_data_ptr();
  g.epilogue.c_stride = c.stride(0);
  return g;
}

// c = a b + bias, or c += a b, by whichever GEMM the table names. One factor may have the accumulator's type beside one
// of a half type, and so may c.
inline void multiply(const Factor& a, const Factor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const auto type = product_type(a.t, b.t);
  const int64_t m = c.size(0), n = c.size(1), k = b.size(0);
  TORCH_INTERNAL_ASSERT(a.size(0) == m && a.size(1) == k && b.size(1) == n && (n <= 1 || c.stride(1) == 1) &&
                        (!bias.defined() || (bias.scalar_type() == c.scalar_type() && bias.dim() == 1 &&
                                             bias.size(0) == n && bias.is_contiguous())));
  if (a.t.scalar_type() == b.t.scalar_type() && !is_wide(c, type) && product_by_aten(type, m, n, k)) {
    Tensor out = c;
    if (accumulate)
      out.addmm_(a.tensor(), b.tensor());
    else if (bias.defined())
      at::addmm_out(out, bias, a.tensor(), b.tensor());
    else
      at::mm_out(out, a.tensor(), b.tensor());
    return;
  }
  Gemm g = gemm_of(a, b, c);
  g.accumulate = accumulate;
  g.epilogue.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  gemm(dtype_of(type), g);
}

}  // namespace rf
