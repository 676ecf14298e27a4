// Activations, which the GEMM's epilogue applies or which run on their own, and their derivatives with the bias
// gradient's column sums.
#pragma once
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh(x) = x (1 + tanh(half of it)) / 2 = x sigmoid(it).
constexpr double kGeluTanhLinear = 1.5957691216057308, kGeluTanhCubic = 0.044715 * kGeluTanhLinear;
template <class V>
inline V gelu_tanh_argument(V x) {
  using A = typename V::scalar;
  return x * fma(x * x, set1(A(kGeluTanhCubic)), set1(A(kGeluTanhLinear)));
}

template <Activation act, class V>
inline V activate(V x) {
  using A = typename V::scalar;
  if constexpr (act == Activation::relu)
    return max(set1(A(0)), x);  // in this order NaN gets through
  else if constexpr (act == Activation::gelu)
    return x * normal_cdf(x, gaussian(x));
  else if constexpr (act == Activation::gelu_tanh)
    return x * sigmoid(gelu_tanh_argument(x));
  else if constexpr (act == Activation::silu)
    return x * sigmoid(x);
  else if constexpr (act == Activation::sigmoid)
    return sigmoid(x);
  else if constexpr (act == Activation::tanh)
    return tanh(x);
  else
    return x;
}

template <class T, Activation act>
inline void activate_all(const T* z, T* y, int64_t n) {
  using V = vec_t<T>;
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(y + j, activate<act>(load(z + j)));
  if (j < n) store_n(y + j, activate<act>(load_n(z + j, n - j)), n - j);
}

template <class T>
inline void activation_forward(const void* z, void* y, int64_t n, Activation activation) {
  switch (activation) {
#define RF_CASE(act, saved) \
  case Activation::act:     \
    return activate_all<T, Activation::act>((const T*)z, (T*)y, n);
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}

// g act'(z) from what was saved: the output (relu, sigmoid, tanh) or z itself. relu chooses instead of multiplying: as
// torch's, it passes the gradient where the output is NaN, and gives 0 where it is 0, even for an infinite gradient.
// The others tend to 0 or g at both ends, where z may be infinite: what multiplies z is 0 or 1 well before its bounds.
template <Activation act, class V>
inline V through_activation(V g, V s) {
  using A = typename V::scalar;
  const V one = set1(A(1)), zero = set1(A(0));
  if constexpr (act == Activation::relu)
    return select_lt(zero, s, g, select_lt(s, one, zero, g));
  else if constexpr (act == Activation::sigmoid)
    return g * (s * (one - s));
  else if constexpr (act == Activation::tanh)
    return g * (one - s * s);
  else if constexpr (act == Activation::silu) {
    // Beyond it y or rest is 0 or 1 already, and infinity times 0 is avoided.
    const V bound = set1(A(1000));
    V z = min(bound, max(zero - bound, s)), y, rest;
    sigmoid_and_rest(z, &y, &rest);
    return g * (y * (one + z * rest));
  } else if constexpr (act == Activation::gelu) {
    // exp(-z^2 / 2) is 0 long before the bounds.
    V gauss = gaussian(s), z = min(set1(A(40)), max(set1(A(-40)), s));
    return g * (normal_cdf(s, gauss) + z * gauss * set1(A(0.39894228040143267794)));
  } else if constexpr (act == Activation::gelu_tanh) {
    V z = min(set1(A(40)), max(set1(A(-40)), s)), zz = z * z;
    V y, rest;
    sigmoid_and_rest(gelu_tanh_argument(z), &y, &rest);
    V du = fma(zz, set1(A(3 * kGeluTanhCubic)), set1(A(kGeluTanhLinear)));
    return g * (y * (one + z * rest * du));
  } else
    return g;
}

template <class T, Activation act>
inline void activation_backward_rows(const ActivationBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  // Sums of a range of rows, in L1 beside them; the caller adds ranges up in order.
  A* sums = (A*)a.column_sums;
  if (sums)
    for (int64_t j = 0; j < a.columns; ++j) sums[j] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* g = (const T*)a.grad + a.grad_layout.offset(r);
    // Without an activation nothing was saved, and null has no rows.
    const T* s = (const T*)a.saved + (act == Activation::none ? 0 : r * a.columns);
    T* out = a.output ? (T*)a.output + r * a.columns : nullptr;
    for (int64_t j = 0; j < a.columns; j += V::size) {
      const int64_t n = std::min<int64_t>(V::size, a.columns - j);
      // Whole vectors without masks; the branch goes the same way until the end of a row.
      const bool full = n == V::size;
      V d = full ? load(g + j) : load_n(g + j, n);
      if constexpr (act != Activation::none) d = through_activation<act>(d, full ? load(s + j) : load_n(s + j, n));
      if (full) {
        if (out) store(out + j, d);
        if (sums) store(sums + j, load(sums + j) + d);
      } else {
        if (out) store_n(out + j, d, n);
        if (sums) store_n(sums + j, load_n(sums + j, n) + d, n);
      }
    }
  }
}

// Few columns: a lane to a row.
template <class T, Activation act>
inline void activation_backward_lanes(const ActivationBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size;
  const RowLayout rows_of_it = {1, a.columns, 0, 1};  // of what is contiguous
  // A column's sums in lanes; across lanes once in the end.
  V sums[tuning::kFewColumns];
  for (int64_t j = 0; j < a.columns; ++j) sums[j] = set1(A(0));
  ColumnTile<A> g, s;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.grad, a.grad_layout, row, rows, a.columns, g);
    if (act != Activation::none) load_tile((const T*)a.saved, rows_of_it, row, rows, a.columns, s);
    for (int64_t j = 0; j < a.columns; ++j) {
      V part[2] = {set1(A(0)), set1(A(0))};  // with one lane, 32 additions each
      for (int64_t r = 0; r < rows; r += W) {
        V d = load(g.at + j * R + r);
        if constexpr (act != Activation::none) {
          d = through_activation<act>(d, load(s.at + j * R + r));
          store(g.at + j * R + r, d);
        }
        // Of lanes beyond the rows, which may hold a gradient at zero.
        part[r / W % 2] = part[r / W % 2] + (rows - r < W ? first_n(d, rows - r, set1(A(0))) : d);
      }
      sums[j] = sums[j] + (part[0] + part[1]);
    }
    // Rounded after it has been summed: the bias's gradient is that of what was not rounded.
    if (a.output) store_tile(g, (T*)a.output, rows_of_it, row, rows, a.columns);
  }
  for (int64_t j = 0; a.column_sums && j < a.columns; ++j) ((A*)a.column_sums)[j] = reduce_add(sums[j]);
}

template <class T>
inline void activation_backward(const ActivationBackwardArgs& a, int64_t begin, int64_t end) {
  switch (a.activation) {
#define RF_CASE(act, saved)                                                                  \
  case Activation::act:                                                                      \
    return are_few(a.columns) ? activation_backward_lanes<T, Activation::act>(a, begin, end) \
                              : activation_backward_rows<T, Activation::act>(a, begin, end);
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}
