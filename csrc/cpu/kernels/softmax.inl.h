// Softmax, log-softmax and log-sum-exp of ranges of rows in any layout: taken one by one, by lanes where they lie, by
// lanes of transposed tiles, or gathered. The bounds between these ways are tuning.h's, with what was measured.
#pragma once
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"
#include "cpu/kernels/softmax_lanes.inl.h"
#include "cpu/kernels/softmax_rows.inl.h"

// Adjacent classes up to which rows are worth a lane each: none where most lanes would be idle.
template <class T>
inline int64_t most_in_lanes(const SoftmaxArgs& a, int64_t classes) {
  return 2 * a.rows < vec_t<T>::size && fit_registers<T>(a.classes) ? 0 : classes;
}

template <class T>
inline void softmax_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  T* y = (T*)a.output;
  // Adjacent classes row by row, but for those so few that a vector of them were mostly empty.
  const int64_t lanes_up_to = fit_registers<T>(a.classes) ? tuning::kLaneForward : tuning::kLaneLonger;
  if (a.classes > most_in_lanes<T>(a, lanes_up_to) && a.in.class_stride == 1 && a.out.class_stride == 1)
    return softmax_rows(a.log, x, a.in, y, a.out, begin, end, a.classes, (A*)a.scratch);
  if (lie_in_lanes<T>(a.in, a.classes) && lie_in_lanes<T>(a.out, a.classes)) {
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      const int64_t again = rows_again<T>(a.in, begin, r, lanes), at = r - again;
      const auto softmax = a.log ? softmax_lanes<true, T, T> : softmax_lanes<false, T, T>;
      softmax(x + a.in.offset(at), a.in.class_stride, y + a.out.offset(at), a.out.class_stride, a.classes,
              lanes + again);
    }
    return;
  }
  // A whole row of any layout fits a tile.
  if (are_few(a.classes)) return softmax_few_classes<T>(a, begin, end);
  // More classes than a tile has, across which rows lie: two reads, both along memory.
  if (lie_by_columns(a.in) && lie_by_columns(a.out)) return softmax_columns<T>(a, begin, end);
  // What is left: rows gathered into scratch of their own length, and the row kernel there.
  A* tile = (A*)a.scratch;
  for (int64_t r = begin, rows; r < end; r += rows) {
    // Never across a step of the outer dimension.
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    const RowLayout by_rows = {rows, 0, a.classes, 1};
    softmax_rows(a.log, tile, by_rows, tile, by_rows, 0, rows, a.classes, tile);
    scatter_tile(tile, y, a.out, r, rows, a.classes);
  }
}

template <class T>
inline void softmax_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T *y = (const T*)a.input, *g = (const T*)a.grad;
  T* dx = (T*)a.output;
  // The same ways as forward's, of three operands: all of them have to lie so. But a gradient that is one number for
  // all classes of a row, as that of a sum, is written where it lies as the others do.
  const bool one = a.grad_in.class_stride == 0;
  if (a.classes > most_in_lanes<T>(a, tuning::kLaneBackward) && a.in.class_stride == 1 && a.out.class_stride == 1 &&
      (a.grad_in.class_stride == 1 || one)) {
    T* const filled = (T*)a.scratch;
    const T* filled_with = nullptr;
    for (int64_t r = begin; r < end; ++r) {
      const T* of_row = g + a.grad_in.offset(r);
      if (one && of_row != filled_with) fill(load_one(filled_with = of_row), a.classes, filled);
      softmax_backward_row(one ? filled : of_row, y + a.in.offset(r), dx + a.out.offset(r), a.classes, a.log);
    }
    return;
  }
  const bool one_for_lanes = one && a.grad_in.inner_stride == 0;
  if (lie_in_lanes<T>(a.in, a.classes) && (one_for_lanes || lie_in_lanes<T>(a.grad_in, a.classes)) &&
      lie_in_lanes<T>(a.out, a.classes)) {
    T filled[vec_t<T>::size];
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      const int64_t again = rows_again<T>(a.in, begin, r, lanes), at = r - again;
      const T* of_lanes = g + a.grad_in.offset(at);
      if (one_for_lanes) fill(load_one(of_lanes), vec_t<T>::size, filled), of_lanes = filled;
      const auto backward = a.log ? softmax_backward_lanes<true, T> : softmax_backward_lanes<false, T>;
      backward(of_lanes, a.grad_in.class_stride, y + a.in.offset(at), a.in.class_stride, dx + a.out.offset(at),
               a.out.class_stride, a.classes, lanes + again);
    }
    return;
  }
  if (are_few(a.classes)) return softmax_backward_few_classes<T>(a, begin, end);
  if (lie_by_columns(a.in) && (one || lie_by_columns(a.grad_in)) && lie_by_columns(a.out))
    return softmax_backward_columns<T>(a, begin, end);
  // dx takes the place of the gradient in its tile.
  A *y_tile = (A*)a.scratch, *g_tile = y_tile + tuning::kTileRows * a.classes;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(y, a.in, r, rows, a.classes, y_tile);
    gather_tile(g, a.grad_in, r, rows, a.classes, g_tile);
    for (int64_t i = 0; i < rows; ++i)
      softmax_backward_row(g_tile + i * a.classes, y_tile + i * a.classes, g_tile + i * a.classes, a.classes, a.log);
    scatter_tile(g_tile, dx, a.out, r, rows, a.classes);
  }
}

template <class T>
inline void logsumexp_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  // Of rows alone there is a result: lanes store it side by side.
  if (are_few(a.classes)) return logsumexp_few_classes<T>(a, begin, end);
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  A *result = (A*)a.row_result, *tile = (A*)a.scratch;
  // Rows that lie together are read where they are.
  if (a.in.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r) result[r] = row_logsumexp(x + a.in.offset(r), a.classes);
    return;
  }
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i) result[r + i] = row_logsumexp(tile + i * a.classes, a.classes);
  }
}

template <class T>
inline void logsumexp_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  // Both gradients need one look at x, since the forward's result was saved.
  if (are_few(a.classes)) return logsumexp_backward_few_classes<T>(a, begin, end);
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  T* dx = (T*)a.output;
  const A *lse = (const A*)a.row_result, *g = (const A*)a.row_grad;
  if (a.in.class_stride == 1 && a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r)
      logsumexp_backward_row(x + a.in.offset(r), dx + a.out.offset(r), a.classes, g[r], lse[r]);
    return;
  }
  A* tile = (A*)a.scratch;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i)
      logsumexp_backward_row(tile + i * a.classes, tile + i * a.classes, a.classes, g[r + i], lse[r + i]);
    scatter_tile(tile, dx, a.out, r, rows, a.classes);
  }
}
