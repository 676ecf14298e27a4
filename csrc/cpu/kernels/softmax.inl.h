// Softmax, log-softmax and log-sum-exp. A row is read in blocks that fit L1: first its maximum, then the sum of
// exponentials, the running sum being rescaled when the maximum grows (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018). So a row longer than the caches is read from memory once.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"
#include "cpu/kernels/softmax_lanes.inl.h"

// Maximum of a row, and the logarithm of the sum of exp(z - maximum). They are kept apart because max + log loses the
// digits of log when the maximum is large.
template <class A>
struct RowStats {
  A max;
  double log_sum;
};

template <class T>
inline RowStats<acc_t<T>> row_stats(const T* x, int64_t n) {
  using A = acc_t<T>;
  A buf[kBlock];
  A m = minus_infinity<A>();
  double sum = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    int64_t count = std::min<int64_t>(kBlock, n - j);
    const A* z = staged(x + j, count, buf);
    A bm = block_max(z, count);
    if (bm > m) {
      sum = sum == 0 ? 0 : sum * std::exp((double)m - (double)bm);
      m = bm;
    }
    // With a maximum of -inf the block holds only -inf, which adds nothing, or NaN, which must be seen.
    sum += block_exp_sum(z, count, m == minus_infinity<A>() ? A(0) : m, x + j + kBlock);
  }
  return {m, std::log(sum)};
}

// y = exp(x - max) / sum, or x - max - log(sum).
template <class T>
inline void softmax_row(const T* x, T* y, int64_t n, bool log) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  // A longer row is cheaper to exponentiate again than to read back (kCachedRowBytes).
  bool once = !log && std::is_same_v<T, A> && n * (int64_t)sizeof(A) <= tuning::kCachedRowBytes;
  if (once) {
    // Exponentiate into y, then scale y while it is still in cache.
    if constexpr (std::is_same_v<T, A>) {
      V vm = set1(block_max(x, n));
      double total = 0;
      int64_t j = 0;
      for (int64_t end = 0; end < n;) {
        end = std::min(n, end + kBlock);
        V sum = set1(A(0));
        for (; j + V::size <= end; j += V::size) {
          V e = exp(load(x + j) - vm);
          store(y + j, e);
          sum = sum + e;
        }
        if (j < end) {
          V e = exp(first_n(load_n(x + j, end - j) - vm, end - j, set1(minus_infinity<A>())));
          store_n(y + j, e, end - j);
          sum = sum + e;
        }
        total += reduce_add(sum);
      }
      V scale = set1(A(1 / total));
      for (j = 0; j + V::size <= n; j += V::size) store(y + j, load(y + j) * scale);
      if (j < n) store_n(y + j, load_n(y + j, n - j) * scale, n - j);
    }
    return;
  }
  RowStats<A> stats = row_stats(x, n);
  V m = set1(stats.max), log_sum = set1(A(stats.log_sum));
  int64_t j = 0;
  if (log) {
    for (; j + V::size <= n; j += V::size) store(y + j, load(x + j) - m - log_sum);
    if (j < n) store_n(y + j, load_n(x + j, n - j) - m - log_sum, n - j);
  } else {
    for (; j + V::size <= n; j += V::size) store(y + j, exp(load(x + j) - m - log_sum));
    if (j < n) store_n(y + j, exp(load_n(x + j, n - j) - m - log_sum), n - j);
  }
}

// softmax: dx = y (g - sum g y); log-softmax: dx = g - exp(y) sum g.
template <class T>
inline void softmax_backward_row(const T* g, const T* y, T* dx, int64_t n, bool log) {
  using A = acc_t<T>;
  using V = vec_t<A>;
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

// ---- ranges of rows ------------------------------------------------------------------------------------------------

// Rows are taken one by one, by lanes where they lie, by lanes of transposed tiles, or gathered: the bounds between
// these ways are tuning.h's, with what was measured (kLaneForward, kLaneBackward, kLaneClasses, kFewColumns).
template <class T>
inline void softmax_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  T* y = (T*)a.output;
  if (a.classes > tuning::kLaneForward && a.in.class_stride == 1 && a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r) softmax_row(x + a.in.offset(r), y + a.out.offset(r), a.classes, a.log);
    return;
  }
  if (lie_in_lanes<T>(a.in, a.classes) && lie_in_lanes<T>(a.out, a.classes)) {
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      softmax_lanes(x + a.in.offset(r), a.in.class_stride, y + a.out.offset(r), a.out.class_stride, a.classes, lanes,
                    a.log);
    }
    return;
  }
  if (are_few(a.classes)) return softmax_few_classes<T>(a, begin, end);
  A* tile = (A*)a.scratch;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i) softmax_row(tile + i * a.classes, tile + i * a.classes, a.classes, a.log);
    scatter_tile(tile, y, a.out, r, rows, a.classes);
  }
}

template <class T>
inline void softmax_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T *y = (const T*)a.input, *g = (const T*)a.grad;
  T* dx = (T*)a.output;
  if (a.classes > tuning::kLaneBackward && a.in.class_stride == 1 && a.grad_in.class_stride == 1 &&
      a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r)
      softmax_backward_row(g + a.grad_in.offset(r), y + a.in.offset(r), dx + a.out.offset(r), a.classes, a.log);
    return;
  }
  if (lie_in_lanes<T>(a.in, a.classes) && lie_in_lanes<T>(a.grad_in, a.classes) && lie_in_lanes<T>(a.out, a.classes)) {
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      softmax_backward_lanes(g + a.grad_in.offset(r), a.grad_in.class_stride, y + a.in.offset(r), a.in.class_stride,
                             dx + a.out.offset(r), a.out.class_stride, a.classes, lanes, a.log);
    }
    return;
  }
  if (are_few(a.classes)) return softmax_backward_few_classes<T>(a, begin, end);
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

// +inf dominates any finite value, as the limit does; a NaN dominates both.
template <class T>
inline acc_t<T> row_logsumexp(const T* x, int64_t n) {
  using A = acc_t<T>;
  RowStats<A> s = row_stats(x, n);
  if (s.max != -minus_infinity<A>()) return A(s.max + s.log_sum);
  for (int64_t j = 0; j < n; ++j) {
    A v = load_one(x + j);
    if (v != v) return v;
  }
  return s.max;
}

template <class T>
inline void logsumexp_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  if (are_few(a.classes)) return logsumexp_few_classes<T>(a, begin, end);
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  A *result = (A*)a.row_result, *tile = (A*)a.scratch;
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
