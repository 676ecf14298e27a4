// Softmax, log-softmax and log-sum-exp of rows whose classes are adjacent in memory. Rows of a few vectors are held in
// registers. Longer ones are read in blocks that fit L1: first a block's maximum, then its sum of exponentials, the
// running sum being rescaled when the maximum grows (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018). So a row longer than the caches is read from memory once.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

// Maximum of a row, and the sum of exp(z - maximum). They are kept apart because max + log(sum) loses the digits of the
// logarithm when the maximum is large.
template <class A>
struct RowSum {
  A max;
  double sum;
};

template <class T>
inline RowSum<acc_t<T>> row_sum(const T* x, int64_t n) {
  using A = acc_t<T>;
  // A block's maximum first and then its sum: both reads are of L1, and the exponential is taken once.
  A m = minus_infinity<A>();
  double sum = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, n - j);
    const A bm = block_max(x + j, count);
    if (bm > m) {
      // 0 before there was a maximum, whose -inf would make it NaN.
      sum = sum == 0 ? 0 : sum * std::exp((double)m - (double)bm);
      m = bm;
    }
    // With a maximum of -inf the block holds only -inf, which adds nothing, or NaN, which must be seen.
    sum += block_exp_sum<T>(x + j, count, m == minus_infinity<A>() ? A(0) : m, x + j + kBlock);
  }
  return {m, sum};
}

// ---- a row in registers --------------------------------------------------------------------------------------------

// Whether a row of adjacent classes is held in registers, up to four vectors of them: softmax_rows has a case for each.
// Like lanes, that keeps the digits of confident rows.
template <class T>
inline bool fit_registers(int64_t classes) {
  return classes <= 4 * vec_t<T>::size;
}

// The n classes of a row in N vectors, -inf in the lanes beyond the last; returns their maximum.
template <int N, class T, class V>
[[gnu::always_inline]] inline scalar_t<V> load_row(const T* x, int64_t n, V (&z)[N]) {
  const int64_t last = n - (N - 1) * V::size;
  z[N - 1] = set1(minus_infinity<scalar_t<V>>());
  z[N - 1] = first_n(load_up_to(x + (N - 1) * V::size, last), last, z[N - 1]);
  V m = z[N - 1];
#pragma GCC unroll 4
  for (int i = 0; i < N - 1; ++i) {
    z[i] = load(x + i * V::size);
    m = max(z[i], m);
  }
  return reduce_max(m);
}
template <int N, class T, class V>
[[gnu::always_inline]] inline void store_row(T* y, int64_t n, const V (&z)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N - 1; ++i) store(y + i * V::size, z[i]);
  store_up_to(y + (N - 1) * V::size, z[N - 1], n - (N - 1) * V::size);
}

template <int N, class T>
[[gnu::always_inline]] inline void softmax_row(const T* x, T* y, int64_t n) {
  using V = vec_t<T>;
  V z[N];
  const V m = set1(load_row(x, n, z));
  // N is a constant: the row never leaves registers.
  V sum = set1(acc_t<T>(0));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum = sum + (z[i] = exp_for<T>(z[i] - m));
  const V scale = set1(acc_t<T>(1)) / set1(reduce_add(sum));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) z[i] = z[i] * scale;
  store_row(y, n, z);
}

// A row's maximum and sum as above; and the sum without the exponentials that are 1, of which a confident row's
// logarithm is about that rest.
template <class A>
struct ShortRowSum {
  A max, sum, rest;
};
template <int N, class T>
[[gnu::always_inline]] inline ShortRowSum<acc_t<T>> short_row_sum(const T* x, int64_t n) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const V zero = set1(A(0));
  V z[N], sum = zero, rest = zero;
  const A max = load_row(x, n, z);
  const V m = set1(max);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const V e = exp_for<T>(z[i] - m);
    sum = sum + e;
    rest = rest + select_eq(z[i], m, zero, e);
  }
  return {max, reduce_add(sum), reduce_add(rest)};
}

// ---- a longer row --------------------------------------------------------------------------------------------------

// y = exp(x - max) / sum. The exponentials of a row that stays in L2 are kept, in y itself where that is of their type,
// and scaled; of a longer row they are cheaper to compute again than to read back (kCachedRowBytes).
template <class T>
inline void softmax_row(const T* x, T* y, int64_t n, acc_t<T>* exponentials) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  int64_t j = 0;
  if (!exponentials) {
    // Read twice, and each exponential computed twice.
    const RowSum<A> row = row_sum(x, n);
    const V m = set1(row.max), scale = set1(A(1 / row.sum));
    for (; j + V::size <= n; j += V::size) store(y + j, exp_for<T>(load(x + j) - m) * scale);
    if (j < n) store_n(y + j, exp_for<T>(load_n(x + j, n - j) - m) * scale, n - j);
    return;
  }
  const A m = block_max(x, n);
  double sum = 0;
  for (; j < n; j += kBlock)
    sum += block_exp_sum<T, true>(x + j, std::min<int64_t>(kBlock, n - j), m, x + j + kBlock, exponentials + j);
  const V scale = set1(A(1 / sum));
  for (j = 0; j + V::size <= n; j += V::size) store(y + j, load(exponentials + j) * scale);
  if (j < n) store_n(y + j, load_n(exponentials + j, n - j) * scale, n - j);
}

template <class T>
inline void log_softmax_row(const T* x, T* y, int64_t n, acc_t<T> max, acc_t<T> log_sum) {
  using V = vec_t<T>;
  const V m = set1(max), l = set1(log_sum);
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(y + j, load(x + j) - m - l);
  if (j < n) store_n(y + j, load_n(x + j, n - j) - m - l, n - j);
}

// softmax: dx = y (g - sum g y); log-softmax: dx = g - exp(y) sum g.
template <class T>
inline void softmax_backward_row(const T* g, const T* y, T* dx, int64_t n, bool log) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  // Blocks' sums in double precision, as row_sum's.
  double total = 0;
  int64_t j = 0;
  for (int64_t end = 0; end < n;) {
    end = std::min(n, end + kBlock);
    V s = set1(A(0));
    for (; j + V::size <= end; j += V::size) s = log ? s + load(g + j) : fma(load(g + j), load(y + j), s);
    if (j < end) s = log ? s + load_n(g + j, end - j) : fma(load_n(g + j, end - j), load_n(y + j, end - j), s);
    total += reduce_add(s);
    j = end;
  }
  // A second read of g and y, which rows up to the cache's size find there.
  V sum = set1(A(total));
  for (j = 0; j + V::size <= n; j += V::size) {
    V gv = load(g + j), yv = load(y + j);
    store(dx + j, log ? gv - exp(yv) * sum : yv * (gv - sum));
  }
  if (j < n) {
    V gv = load_n(g + j, n - j), yv = load_n(y + j, n - j);
    store_n(dx + j, log ? gv - exp(yv) * sum : yv * (gv - sum), n - j);
  }
}

// Log-sum-exp: dx = g exp(x - lse); NaN for a row of -inf, as torch's.
template <class T>
inline void logsumexp_backward_row(const T* x, T* dx, int64_t n, acc_t<T> g, acc_t<T> lse) {
  using V = vec_t<T>;
  V gv = set1(g), lv = set1(lse);
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(dx + j, gv * exp(load(x + j) - lv));
  if (j < n) store_n(dx + j, gv * exp(load_n(x + j, n - j) - lv), n - j);
}

// +inf dominates any finite value, as the limit does; a NaN dominates both.
template <class T>
inline acc_t<T> row_logsumexp(const T* x, int64_t n) {
  using A = acc_t<T>;
  const RowSum<A> row = row_sum(x, n);
  if (row.max != -minus_infinity<A>()) return A(row.max + std::log(row.sum));
  for (int64_t j = 0; j < n; ++j) {
    A v = load_one(x + j);
    if (v != v) return v;
  }
  return row.max;
}

// ---- several rows --------------------------------------------------------------------------------------------------

// Rows of x and y where their layouts tell, of N vectors, or of any length where N is 0.
template <int N, class T>
inline void softmax_rows(const T* x, const RowLayout& in, T* y, const RowLayout& out, int64_t begin, int64_t end,
                         int64_t n, acc_t<T>* exponentials) {
  for (int64_t r = begin; r < end; ++r) {
    const T* from = x + in.offset(r);
    T* to = y + out.offset(r);
    if constexpr (N > 0)
      softmax_row<N>(from, to, n);
    else if constexpr (std::is_same_v<T, acc_t<T>>)
      softmax_row(from, to, n, n * (int64_t)sizeof(T) <= tuning::kCachedRowBytes ? to : nullptr);
    else
      softmax_row(from, to, n, exponentials);
  }
}
template <int N, class T>
inline void log_softmax_rows(const T* x, const RowLayout& in, T* y, const RowLayout& out, int64_t begin, int64_t end,
                             int64_t n) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  // The logarithms of a vector of rows are taken at a time, if those rows stay in L1 until they are read again.
  const int64_t group = std::clamp<int64_t>(tuning::kRowGroupBytes / ((int64_t)sizeof(T) * n), 1, V::size);
  // Rows' numbers side by side, for one vector of logarithms.
  A max[V::size], sum[V::size], rest[V::size], log_sum[V::size];
  store(sum, set1(A(1)));
  store(rest, set1(A(0)));
  for (int64_t r = begin; r < end; r += group) {
    const int64_t rows = std::min(group, end - r);
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x + in.offset(r + i);
      if constexpr (N > 0) {
        const ShortRowSum<A> row = short_row_sum<N>(from, n);
        max[i] = row.max;
        sum[i] = row.sum;
        rest[i] = row.rest;
      } else {
        const RowSum<A> row = row_sum(from, n);
        max[i] = row.max;
        sum[i] = A(row.sum);
      }
    }
    const V s = load(sum);
    V l = log(s);
    if constexpr (N > 0) {
      const V t = load(rest), ones = round_even(s - t);
      l = l + (t - (s - ones)) / s;
    }
    store(log_sum, l);
    for (int64_t i = 0; i < rows; ++i)
      log_softmax_row(x + in.offset(r + i), y + out.offset(r + i), n, max[i], log_sum[i]);
  }
}

template <int N, class T>
inline void any_softmax_rows(bool log, const T* x, const RowLayout& in, T* y, const RowLayout& out, int64_t begin,
                             int64_t end, int64_t n, acc_t<T>* exponentials) {
  log ? log_softmax_rows<N>(x, in, y, out, begin, end, n) : softmax_rows<N>(x, in, y, out, begin, end, n, exponentials);
}
// exponentials: room for a row of them, or null where rows are too long to be kept.
template <class T>
inline void softmax_rows(bool log, const T* x, const RowLayout& in, T* y, const RowLayout& out, int64_t begin,
                         int64_t end, int64_t n, acc_t<T>* exponentials) {
  switch (ceil_div(n, vec_t<T>::size)) {
    case 1:
      return any_softmax_rows<1>(log, x, in, y, out, begin, end, n, exponentials);
    case 2:
      return any_softmax_rows<2>(log, x, in, y, out, begin, end, n, exponentials);
    case 3:
      return any_softmax_rows<3>(log, x, in, y, out, begin, end, n, exponentials);
    case 4:
      return any_softmax_rows<4>(log, x, in, y, out, begin, end, n, exponentials);
    default:
      return any_softmax_rows<0>(log, x, in, y, out, begin, end, n, exponentials);
  }
}
