// A linear model with up to kFewOutputs outputs and its likelihood in one pass over x: predictions, losses, slopes and
// the gradients of weight, bias and x, some rows at a time while they are in registers or L1. The product is bound by
// reading x, which F.linear and the gradient of its weight would read twice. Lanes go along rows in all but the dot
// products.
#pragma once
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/gemm_small.inl.h"
#include "cpu/kernels/linear_nll.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

constexpr int64_t kPassRows = tuning::kPassRows;

// Output j of n rows, 1 where there is nothing.
template <class A>
[[gnu::always_inline]] inline vec_t<A> gather(const void* from, int64_t outputs, int64_t row, int64_t n, int64_t j) {
  using V = vec_t<A>;
  if (!from) return set1(A(1));
  const A* at = (const A*)from + row * outputs + j;
  if (outputs == 1) return load_up_to(at, n);
  // Outputs of neighbouring rows lie apart.
  alignas(64) A lanes[V::size] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = at[i * outputs];
  return load(lanes);
}

// Outputs of a block of rows, each in kPassRows lanes; 1 where there is nothing. A vector of lanes gathered just before
// it is loaded would be waited for: the targets of a block are spread before its predictions are computed.
template <class A>
inline void spread(const void* from, int64_t outputs, int64_t row, int64_t rows, A* to) {
  const A* at = (const A*)from + row * outputs;
  for (int64_t j = 0; j < outputs; ++j) {
    for (int64_t r = 0; r < rows; ++r) to[j * kPassRows + r] = from ? at[r * outputs + j] : A(1);
    // Finite in the lanes beyond the last row, whose slopes are made 0 afterwards.
    for (int64_t r = rows; r < kPassRows; ++r) to[j * kPassRows + r] = 0;
  }
}

// Part of a row of x's gradient, in x's type or the accumulator's.
template <class T>
inline void store_gradient(const FewOutputsArgs& a, int64_t row, int64_t c, vec_t<T> d, int64_t n) {
  const int64_t at = row * a.features + c;
  a.wide_grad_x ? store_up_to((acc_t<T>*)a.grad_x + at, d, n) : store_up_to((T*)a.grad_x + at, d, n);
}

// ---- few features, or up to a vector's that lie apart: rows are transposed -----------------------------------------

template <class T, int F, Family family, bool value, bool slope>
inline void few_features(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const int64_t outputs = a.likelihood.outputs, features = a.features;
  const A* bias = (const A*)a.bias;
  // Padded to F features with zeros: the loops below have constant bounds and no rest.
  A weight[tuning::kFewOutputs * F];
  V outer[tuning::kFewOutputs * F];  // weight's gradient, of which each lane has the part of some rows
  for (int64_t i = 0; i < outputs * F; ++i) {
    weight[i] = i % F < features ? load_one((const T*)a.weight + i / F * features + i % F) : A(0);
    outer[i] = set1(A(0));
  }
  LaneSums<V> lanes;
  constexpr int64_t R = tuning::kLaneRows;
  ColumnTile<A> x, grad_x;
  for (int64_t tile = begin; tile < end; tile += R) {
    const int64_t rows = std::min(R, end - tile);
    load_tile((const T*)a.x, {1, a.x_stride, 0, a.feature_stride}, tile, rows, features, x);
    for (int64_t i = 0; i < rows; i += V::size) {
      const int64_t row = tile + i, n = std::min<int64_t>(V::size, rows - i);
      // A vector of rows, feature by feature, in registers.
      V columns[F], dx[F];
#pragma GCC unroll 16
      for (int c = 0; c < F; ++c) {
        columns[c] = c < features ? load(x.at + c * R + i) : set1(A(0));
        dx[c] = set1(A(0));
      }
      for (int64_t j = 0; j < outputs; ++j) {
        const A* w = weight + j * F;
        // Two chains of additions: one alone would be waited for.
        V even = set1(bias ? bias[j] : A(0)), odd = set1(A(0));
#pragma GCC unroll 8
        for (int c = 0; c < F; c += 2) {
          even = fma(set1(w[c]), columns[c], even);
          odd = fma(set1(w[c + 1]), columns[c + 1], odd);
        }
        const V y = gather<A>(a.likelihood.target, outputs, row, n, j),
                g = gather<A>(a.likelihood.grad, outputs, row, n, j);
        V d = lanes_loss_and_slope<A, family, value, slope>(a.likelihood, row, n, j, even + odd, y, g, &lanes);
        if constexpr (slope) {
          // The weight's gradient grows in lanes beside the predictions: x is not read again for it.
          V* to = outer + j * F;
#pragma GCC unroll 16
          for (int c = 0; c < F; ++c) to[c] = fma(d, columns[c], to[c]);
          if (a.grad_x)
#pragma GCC unroll 16
            for (int c = 0; c < F; ++c) dx[c] = fma(d, set1(w[c]), dx[c]);
        }
      }
      lanes.count(1, outputs);
      if (slope && a.grad_x)
        for (int64_t c = 0; c < features; ++c) store(grad_x.at + c * R + i, dx[c]);
    }
    if (slope && a.grad_x) {
      // x's gradient is contiguous, however x lies.
      const RowLayout to = {1, features, 0, 1};
      a.wide_grad_x ? store_tile(grad_x, (A*)a.grad_x, to, tile, rows, features)
                    : store_tile(grad_x, (T*)a.grad_x, to, tile, rows, features);
    }
  }
  if (slope && a.grad_weight)
    for (int64_t i = 0; i < outputs * features; ++i)
      // Across lanes once for all rows of the range.
      ((A*)a.grad_weight)[i] = reduce_add(outer[i / features * F + i % features]);
  lanes.write(outputs, sums);
}

// ---- more features: dot products -----------------------------------------------------------------------------------

// Predictions without bias: dot products of R rows at a time with all of weight's, as gemm_dot has them. Results of a
// block have lanes along rows: element (r, j) at j * kPassRows + r.
template <class T, int R>
inline void predict_rows(const T* const* x, int64_t rows, const T* const* weight, int64_t outputs, int64_t features,
                         bool far, acc_t<T>* to) {
  // R rows side by side use each vector of the weight R times.
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    if (far) read_in_order(x + r, R, features);
    dot_rows<T, vec_t<T>, R>(x + r, weight, outputs, features, false, to + r, 1, kPassRows);
  }
  for (; r < rows; ++r) dot_rows<T, vec_t<T>, 1>(x + r, weight, outputs, features, false, to + r, 1, kPassRows);
}
template <class T>
inline void predict_block(const T* x, int64_t stride, int64_t rows, int64_t readable, const T* const* weight,
                          int64_t outputs, int64_t features, bool far, acc_t<T>* to) {
  constexpr int64_t W = vec_t<T>::size;
  if (outputs <= tuning::kShortDots && 0 < features && features <= 4 * W && rows % W == 0) {
    for (int64_t j = 0; j < outputs; ++j)
      dot_short_rows<T, vec_t<T>>(x, stride, rows, readable, weight[j], features, to + j * kPassRows);
    return;
  }
  // Many outputs, or long rows: as gemm_dot, with as many rows at a time as sums fit registers.
  const T* each[kPassRows];
  for (int64_t r = 0; r < rows; ++r) each[r] = x + r * stride;
  outputs == 1   ? predict_rows<T, 8>(each, rows, weight, outputs, features, far, to)
  : outputs == 2 ? predict_rows<T, 4>(each, rows, weight, outputs, features, far, to)
                 : predict_rows<T, kTile.dot_rows>(each, rows, weight, outputs, features, far, to);
}

// sums[j][c] += over rows of slopes[j][row] * x[row][c], for Q outputs and, from column c on, N vectors.
template <class T, int Q, int N>
inline void add_outer(const T* x, int64_t stride, int64_t rows, const acc_t<T>* slopes, int64_t n, acc_t<T>* sums,
                      int64_t features) {
  using V = vec_t<T>;
  // Q x N sums of kPassRows rows each; a range's sums are in L1.
  V acc[Q][N];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) acc[q][v] = set1(acc_t<T>(0));
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    V columns[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) columns[v] = N > 1 ? load(x + v * V::size) : load_up_to(x, n);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      // x comes from L1, where predict_block has just read it.
      V slope = set1(slopes[q * kPassRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) acc[q][v] = fma(slope, columns[v], acc[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      acc_t<T>* to = sums + q * features + v * V::size;
      const int64_t width = N > 1 ? V::size : n;
      store_up_to(to, load_up_to(to, width) + acc[q][v], width);
    }
}
template <class T, int Q>
inline void add_outer_products(const T* x, int64_t stride, int64_t rows, const acc_t<T>* slopes, int64_t features,
                               acc_t<T>* sums) {
  constexpr int64_t W = vec_t<T>::size;
  // Up to eight sums, which hide the latency of fma.
  constexpr int N = Q <= 2 ? 4 : 2;
  int64_t c = 0;
  for (; c + N * W <= features; c += N * W) add_outer<T, Q, N>(x + c, stride, rows, slopes, W, sums + c, features);
  for (; c < features; c += W)
    add_outer<T, Q, 1>(x + c, stride, rows, slopes, std::min(W, features - c), sums + c, features);
}
template <class T>
inline void add_weight_gradient(const T* x, int64_t stride, int64_t rows, const acc_t<T>* slopes, int64_t outputs,
                                int64_t features, acc_t<T>* sums) {
  for (; outputs >= 4; outputs -= 4, slopes += 4 * kPassRows, sums += 4 * features)
    add_outer_products<T, 4>(x, stride, rows, slopes, features, sums);
  switch (outputs) {
    case 3:
      return add_outer_products<T, 3>(x, stride, rows, slopes, features, sums);
    case 2:
      return add_outer_products<T, 2>(x, stride, rows, slopes, features, sums);
    case 1:
      return add_outer_products<T, 1>(x, stride, rows, slopes, features, sums);
  }
}

template <class T>
inline void write_x_gradient(const FewOutputsArgs& a, const T* const* weight, int64_t row, int64_t rows,
                             const acc_t<T>* slopes) {
  using V = vec_t<T>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.features; c += V::size) {
      const int64_t n = std::min<int64_t>(V::size, a.features - c);
      // dx = slopes W, row by row: outputs are few, so W stays in L1.
      V d = set1(acc_t<T>(0));
      for (int64_t j = 0; j < a.likelihood.outputs; ++j)
        d = fma(set1(slopes[j * kPassRows + r]), load_up_to(weight[j] + c, n), d);
      store_gradient<T>(a, row + r, c, d, n);
    }
}

template <class T, Family family, bool value, bool slope>
inline void many_features(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const int64_t outputs = a.likelihood.outputs, features = a.features;
  const T* weight[tuning::kFewOutputs];
  for (int64_t j = 0; j < outputs; ++j) weight[j] = (const T*)a.weight + j * features;
  A* grad_weight = (A*)a.grad_weight;
  // This range's own: ranges are added up in order.
  for (int64_t i = 0; grad_weight && i < outputs * features; ++i) grad_weight[i] = 0;
  constexpr int64_t kRoom = tuning::kFewOutputs * kPassRows;
  alignas(64) A slopes[kRoom], targets[kRoom], grads[kRoom];
  LaneSums<V> lanes;
  for (int64_t row = begin; row < end; row += kPassRows) {
    const int64_t rows = std::min(kPassRows, end - row);
    const T* x = (const T*)a.x + row * a.x_stride;
    spread(a.likelihood.target, outputs, row, rows, targets);
    // Without upstream gradients they are ones, written once.
    if (a.likelihood.grad || row == begin) spread(a.likelihood.grad, outputs, row, rows, grads);
    const int64_t readable = readable_rows(end - row, a.x_stride, features, round_up(features, V::size));
    predict_block(x, a.x_stride, rows, readable, weight, outputs, features, a.x_is_far, slopes);
    for (int64_t j = 0; j < outputs; ++j)
      for (int64_t r = 0; r < rows; r += V::size) {
        const int64_t n = std::min<int64_t>(V::size, rows - r);
        A* at = slopes + j * kPassRows + r;
        // Slopes take the predictions' place.
        V eta = load_up_to(at, n);
        if (a.bias) eta = eta + set1(((const A*)a.bias)[j]);
        const V y = load(targets + j * kPassRows + r), g = load(grads + j * kPassRows + r);
        store(at, lanes_loss_and_slope<A, family, value, slope>(a.likelihood, row + r, n, j, eta, y, g, &lanes));
      }
    lanes.count(kPassRows / V::size, outputs);
    if (slope && grad_weight) add_weight_gradient(x, a.x_stride, rows, slopes, outputs, features, grad_weight);
    if (slope && a.grad_x) write_x_gradient(a, weight, row, rows, slopes);
  }
  lanes.write(outputs, sums);
}

template <class T, Family family, bool value, bool slope>
inline void few_outputs_rows(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  using V = vec_t<T>;
  // So few features leave most lanes of a dot product idle.
  constexpr int kShort = (int)std::min<int64_t>(V::size, tuning::kShortDotBytes / sizeof(acc_t<T>));
  if constexpr (V::size > 1) {
    if (a.features <= kShort) return few_features<T, kShort, family, value, slope>(a, begin, end, sums);
    // Half types are widened once for all outputs.
    const bool many_uses = sizeof(T) == 2 && a.likelihood.outputs > 2;
    if (a.features <= V::size && (a.feature_stride != 1 || many_uses))
      return few_features<T, V::size, family, value, slope>(a, begin, end, sums);
  }
  many_features<T, family, value, slope>(a, begin, end, sums);
}

template <class T>
inline void few_outputs(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  RF_EACH_LIKELIHOOD(few_outputs_rows, T, a.likelihood, sums, a, begin, end, sums)
}
#undef RF_EACH_LIKELIHOOD
#undef RF_DISPATCH_SUMS
