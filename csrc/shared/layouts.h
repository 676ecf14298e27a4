// How the kernels see tensors: rows, classes and matrices as strides, copied only where no strides describe them.
#pragma once
#include "shared/torch_api.h"

namespace rf {

// Dimensions [from, to) as one: their common stride, or none when they do not collapse.
inline std::optional<int64_t> collapsed_stride(const Tensor& t, int64_t from, int64_t to) {
  int64_t stride = 1, expected = -1;
  for (int64_t d = to - 1; d >= from; --d) {
    if (t.size(d) == 1) continue;
    if (expected < 0)
      stride = t.stride(d);
    else if (t.stride(d) != expected)
      return std::nullopt;
    expected = t.stride(d) * t.size(d);
  }
  return stride;
}

inline int64_t product(at::IntArrayRef sizes, int64_t from, int64_t to) {
  return from < to ? c10::multiply_integers(sizes.begin() + from, sizes.begin() + to) : 1;
}

// Rows of a matrix with leading dimensions, and of a tensor whose dimension `dim` they run along.
inline int64_t rows_of(const Tensor& t) { return product(t.sizes(), 0, t.dim() - 1); }
inline int64_t rows_without(const Tensor& t, int64_t dim) {
  return product(t.sizes(), 0, dim) * product(t.sizes(), dim + 1, t.dim());
}

// A tensor as a matrix; itself, without a dispatch, where it is one.
inline Tensor as_rows(const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 ? t : t.reshape({rows, columns});
}

// The shape that reducing a dimension leaves.
inline std::vector<int64_t> reduced_sizes(const Tensor& t, int64_t dim, bool keepdim) {
  auto sizes = t.sizes().vec();
  if (t.dim() == 0) return sizes;
  if (keepdim)
    sizes[dim] = 1;
  else
    sizes.erase(sizes.begin() + dim);
  return sizes;
}

// None where no strides describe the rows. An empty tensor has rows wherever the reduced dimension alone is empty, and
// nothing in them to find: any layout is right, whatever its strides say.
inline std::optional<RowLayout> row_layout(const Tensor& t, int64_t dim) {
  if (t.numel() == 0) return RowLayout{1, 0, 0, 1};
  if (t.dim() > 0 && t.is_contiguous()) {
    const int64_t classes = t.size(dim), inner = product(t.sizes(), dim + 1, t.dim());
    return RowLayout{inner, classes * inner, 1, classes == 1 ? 1 : inner};
  }
  const auto outer = collapsed_stride(t, 0, dim), inner = collapsed_stride(t, dim + 1, t.dim());
  if (!outer || !inner) return std::nullopt;
  const int64_t classes = t.dim() ? t.size(dim) : 1;
  return RowLayout{std::max<int64_t>(1, product(t.sizes(), dim + 1, t.dim())), *outer, *inner,
                   classes == 1 ? 1 : t.stride(dim)};
}

// The tensor itself where strides describe its rows, else a contiguous copy.
inline Tensor as_strided_rows(const Tensor& t, int64_t dim) { return row_layout(t, dim) ? t : t.contiguous(); }

// For operations on elements, which may be in any order: a tensor whose memory has no gaps, with the strides that
// empty_like gives a result, and another one in the same order.
inline Tensor without_gaps(const Tensor& t) {
  return t.is_non_overlapping_and_dense() ? t : at::empty_like(t).copy_(t);
}
inline bool is_in_order_of(const Tensor& other, const Tensor& t) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == other.stride(d);
  return same;
}
inline Tensor in_order_of(const Tensor& other, const Tensor& t) {
  return is_in_order_of(other, t) ? t : at::empty_like(other, t.options()).copy_(t);
}

// With null for its data where no strides describe the matrix, and where it is empty.
inline MatrixView matrix_view(const Tensor& t) {
  if (t.numel() == 0) return {nullptr, 1, 0, 0, 1};
  const int64_t last = t.dim() - 1;
  for (int64_t split = last; split >= 0; --split) {
    const auto outer = collapsed_stride(t, 0, split), inner = collapsed_stride(t, split, last);
    if (!outer || !inner) continue;
    const int64_t columns = t.size(last) == 1 ? 1 : t.stride(last);
    return {t.const_data_ptr(), std::max<int64_t>(1, product(t.sizes(), split, last)), *outer, *inner, columns};
  }
  return {nullptr, 1, 0, 0, 1};
}

struct Operand {
  Tensor keep;  // holds the memory that view points to
  MatrixView view;
};
inline Operand operand(const Tensor& t) {
  MatrixView v = matrix_view(t);
  if (v.data || t.numel() == 0) return {t, v};
  Tensor copy = t.contiguous();
  return {copy, matrix_view(copy)};
}

}  // namespace rf
