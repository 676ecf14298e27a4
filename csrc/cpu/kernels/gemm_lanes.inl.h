// Products of many rows whose other two sides are short, as those of a regression and its gradients: a lane to a row,
// in tiles that are transposed in L1 once. Dot products would leave most of a vector's lanes idle, and packing would
// cost more than the product.
#pragma once
#include "cpu/kernels/activation.inl.h"
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// Q columns of C for a vector of rows, so that each element of A is loaded once for all of them.
template <class A, int Q>
inline void lane_columns(const A* x, const A* weight, const A* bias, int64_t k, A* y) {
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows;
  // Q chains of fma, since one alone would be waited for at each step of k.
  V sum[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) sum[q] = set1(bias[q]);
  for (int64_t h = 0; h < k; ++h) {
    const V xh = load(x + h * R);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) sum[q] = fma(xh, set1(weight[q * k + h]), sum[q]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) store(y + q * R, sum[q]);
}

// What is left to do with a tile of sums, to which the bias has been added.
template <class T>
inline void finish_lanes(ColumnTile<acc_t<T>>& y, int64_t row, int64_t rows, int64_t n, const Epilogue& e) {
  constexpr int64_t R = tuning::kLaneRows;
  const RowLayout c = {1, e.c_stride, 0, 1};
  // Before the activation takes its place.
  if (e.preactivation) store_tile(y, (T*)e.preactivation, c, row, rows, n);
  for (int64_t j = 0; e.activation != Activation::none && j < n; ++j)
    activation_forward<acc_t<T>>(y.at + j * R, y.at + j * R, rows, e.activation);
  store_tile(y, (T*)e.c, c, row, rows, n);
}

// C(m, n) = A(m, k) B(k, n) for a range of rows.
template <class T>
inline void gemm_lanes(const LanesArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size, kMost = tuning::kFewSides * tuning::kFewSides;
  const Epilogue& e = a.epilogue;
  // Widened once, and side by side: a broadcast from memory costs no more than a load.
  A weight[kMost], bias[tuning::kFewSides];
  for (int64_t j = 0; j < a.n; ++j) {
    for (int64_t h = 0; h < a.k; ++h)
      weight[j * a.k + h] = load_one((const T*)a.b + j * a.b_layout.outer_stride + h * a.b_layout.class_stride);
    bias[j] = e.bias ? load_one((const T*)e.bias + j) : A(0);
  }
  ColumnTile<A> x, y;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.a, a.a_layout, row, rows, a.k, x);
    for (int64_t i = 0; i < rows; i += W) {
      int64_t j = 0;
      for (; j + 4 <= a.n; j += 4) lane_columns<A, 4>(x.at + i, weight + j * a.k, bias + j, a.k, y.at + j * R + i);
      for (; j < a.n; ++j) lane_columns<A, 1>(x.at + i, weight + j * a.k, bias + j, a.k, y.at + j * R + i);
    }
    finish_lanes<T>(y, row, rows, a.n, e);
  }
}

// Sums over a tile's rows of I columns of A, in lanes, times vectors of rows of B, where they lie: sums[i * n + j]. Two
// rows at a time hide the latency of fma.
template <class T, int I, int N>
inline void add_rows(const acc_t<T>* a, const T* b, int64_t step, int64_t rows, int64_t whole, int64_t n,
                     acc_t<T>* sums, int64_t sums_step) {
  using V = vec_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size;
  // Sums of even and of odd rows.
  V sum[2][I][N];
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) sum[0][i][v] = sum[1][i][v] = set1(acc_t<T>(0));
  int64_t r = 0;
  for (; r + 2 <= whole; r += 2)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        const V x = load(b + (r + h) * step + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) sum[h][i][v] = fma(set1(a[i * R + r + h]), x, sum[h][i][v]);
      }
  for (; r < rows; ++r)
    for (int v = 0; v < N; ++v) {
      // The last rows of memory, beyond which no whole vector may be read, and an odd one.
      const V x = load_up_to(b + r * step + v * W, std::min(W, n - v * W));
      for (int i = 0; i < I; ++i) sum[0][i][v] = fma(set1(a[i * R + r]), x, sum[0][i][v]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) {
      const int64_t count = std::min(W, n - v * W);
      acc_t<T>* to = sums + i * sums_step + v * W;
      store_up_to(to, load_up_to(to, count) + (sum[0][i][v] + sum[1][i][v]), count);
    }
}

// The same for all columns of A and B, a vector of B's at least.
template <class T>
inline void add_row_products(const acc_t<T>* a, int64_t k, const T* b, int64_t step, int64_t rows, int64_t n,
                             acc_t<T>* sums) {
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  for (int64_t j = 0; j < n; j += 2 * W) {
    // Two vectors of B for each broadcast of A, where there are as many.
    const bool two = n - j > W;
    const int64_t whole = readable_rows(rows, step, n - j, two ? 2 * W : W);
    for (int64_t i = 0; i < k;) {
      const bool four = i + 4 <= k;
      const auto* left = a + i * R;
      if (four)
        two ? add_rows<T, 4, 2>(left, b + j, step, rows, whole, n - j, sums + i * n + j, n)
            : add_rows<T, 4, 1>(left, b + j, step, rows, whole, n - j, sums + i * n + j, n);
      else
        two ? add_rows<T, 1, 2>(left, b + j, step, rows, whole, n - j, sums + i * n + j, n)
            : add_rows<T, 1, 1>(left, b + j, step, rows, whole, n - j, sums + i * n + j, n);
      i += four ? 4 : 1;
    }
  }
}

// C(m, n) = sum over rows of A(row, m) B(row, n), of a range of them. A tile's products are added up before they join
// the sums, so that no chain of additions is long.
template <class T>
inline void gemm_lane_sums(const LanesArgs& a, int64_t begin, int64_t end, void* to) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size;
  A* sums = (A*)to;
  ColumnTile<A> left, right;
  // Rows of B of a vector's length and more are read where they lie.
  const RowLayout& l = a.b_layout;
  if (W > 1 && l.inner == 1 && l.class_stride == 1 && a.n >= W) {
    for (int64_t i = 0; i < a.k * a.n; ++i) sums[i] = 0;
    for (int64_t row = begin; row < end; row += R) {
      const int64_t rows = std::min(R, end - row);
      load_tile((const T*)a.a, a.a_layout, row, rows, a.k, left);
      add_row_products<T>(left.at, a.k, (const T*)a.b + l.offset(row), l.outer_stride, rows, a.n, sums);
    }
    return;
  }
  // B's rows shorter than a vector: both sides in lanes, which are added up once in the end.
  V sum[tuning::kFewSides * tuning::kFewSides];
  for (int64_t i = 0; i < a.k * a.n; ++i) sum[i] = set1(A(0));
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.a, a.a_layout, row, rows, a.k, left);
    load_tile((const T*)a.b, a.b_layout, row, rows, a.n, right);
    for (int64_t i = 0; i < a.k; ++i)
      for (int64_t j = 0; j < a.n; ++j) {
        // Of lanes beyond the last row both tiles have zeros.
        V part = load(left.at + i * R) * load(right.at + j * R);
        for (int64_t r = W; r < rows; r += W) part = fma(load(left.at + i * R + r), load(right.at + j * R + r), part);
        sum[i * a.n + j] = sum[i * a.n + j] + part;
      }
  }
  for (int64_t i = 0; i < a.k * a.n; ++i) sums[i] = reduce_add(sum[i]);
}
