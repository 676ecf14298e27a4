// Products of matrices on every device, and the one decision who multiplies: regfast's GEMM, with all that follows a
// product in its epilogue, or ATen's. Whoever needs to know before asks by_aten; multiply asks it itself. Device has
//   why_aten(size)          why ATen multiplies, by the device's table of measurements, or null
//   gemm(dtype, problem)    regfast's GEMM
//   wide_product(...)       ATen's of half types into the accumulator's, if why_aten leaves such to ATen
#pragma once
#include "shared/layouts.h"
#include "shared/problems.h"

namespace rf {

// Whether c is one product or the sum of several, and then which one of them.
enum class Sum { none, first, next };

struct ProductSize {
  at::ScalarType type;  // of the factors; of the narrower one
  int64_t m, n, k;
  bool wide = false;  // a factor or the result has the accumulator's type beside a half type's
  Sum sum = Sum::none;
  bool a_across = false;  // the first factor's memory has rows across K
};

// Whether ATen multiplies, which is on record then; the caller follows the answer.
template <class Device>
bool by_aten(const Device& device, const ProductSize& size) {
  const char* const why = device.why_aten(size);
  if (why && trace::on()) trace::product_by_aten(size.type, size.m, size.n, size.k, why);
  return why;
}

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

inline void* data_or_null(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

inline MatrixView view_of(const Tensor& t) { return {t.const_data_ptr(), 1, t.stride(0), 0, t.stride(1)}; }

// A matrix whose rows are adjacent down its columns is the transpose of one that is stored by rows.
inline bool is_by_columns(int64_t row_stride, int64_t column_stride) { return column_stride != 1 && row_stride == 1; }

// A factor of a product: a matrix, or its transpose without a tensor of its own.
struct Factor {
  Factor(const Tensor& t, bool transposed = false) : t(t), transposed(transposed) {}

  const Tensor& t;
  const bool transposed;

  int64_t size(int d) const { return t.size(transposed ? 1 - d : d); }
  int64_t stride(int d) const { return t.stride(transposed ? 1 - d : d); }
  Tensor tensor() const { return transposed ? t.t() : t; }
  bool stored_by_columns() const { return is_by_columns(stride(0), stride(1)); }
  MatrixView view() const {
    const bool columns = stored_by_columns();
    return {t.const_data_ptr(), 1, stride(columns), 0, stride(!columns)};
  }
};
inline Factor transpose(const Tensor& t) { return {t, true}; }

// c = a b by our GEMM, of matrices that fit.
inline GemmProblem gemm_problem(const Factor& a, const Factor& b, const Tensor& c) {
  const auto type = product_type(a.t, b.t);
  return {.m = c.size(0),
          .n = c.size(1),
          .k = b.size(0),
          .a = a.view(),
          .a_transposed = a.stored_by_columns(),
          .b = b.view(),
          .b_transposed = b.stored_by_columns(),
          .c = c.mutable_data_ptr(),
          .c_stride = c.stride(0),
          .wide_a = is_wide(a.t, type),
          .wide_b = is_wide(b.t, type),
          .wide_c = is_wide(c, type)};
}

// c = a b + bias, or c += a b, by whoever is to multiply. One factor may have the accumulator's type beside one of a
// half type, and so may c; bias has c's.
template <class Device>
void multiply(const Device& device, const Factor& a, const Factor& b, const Tensor& c, const Tensor& bias = {},
              Sum sum = Sum::none) {
  GemmProblem g = gemm_problem(a, b, c);
  TORCH_INTERNAL_ASSERT(a.size(0) == g.m && a.size(1) == g.k && b.size(1) == g.n && (g.n <= 1 || c.stride(1) == 1) &&
                        (!bias.defined() || (bias.scalar_type() == c.scalar_type() && bias.dim() == 1 &&
                                             bias.size(0) == g.n && bias.is_contiguous())));
  const auto type = product_type(a.t, b.t);
  const bool wide = g.wide_a || g.wide_b || g.wide_c;
  if (!by_aten(device, {type, g.m, g.n, g.k, wide, sum, g.a_transposed})) {
    g.accumulate = sum == Sum::next;
    g.bias = data_or_null(bias);
    return device.gemm(dtype_of(type), g);
  }
  Tensor out = c;
  if constexpr (requires { device.wide_product(out, out, out, true); })
    if (wide) {
      device.wide_product(out, a.tensor(), b.tensor(), sum == Sum::next);
      if (bias.defined()) out.add_(bias);
      return;
    }
  if (sum == Sum::next)
    at::addmm_out(out, out, a.tensor(), b.tensor());
  else if (bias.defined())
    at::addmm_out(out, bias, a.tensor(), b.tensor());
  else
    at::mm_out(out, a.tensor(), b.tensor());
}

}  // namespace rf
