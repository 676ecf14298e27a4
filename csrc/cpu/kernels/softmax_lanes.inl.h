// Softmax, log-softmax and log-sum-exp with a lane to a row, forward and backward: where rows are adjacent in memory,
// and for few classes, whose tiles make them so. The formulas are those of softmax.inl.h.
#pragma once
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

// Softmax of `lanes` rows whose classes are x_step and y_step apart. E: the type of the results in the end (exp_for).
template <bool log_of_it, class E, class T>
inline void softmax_lanes(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t n, int64_t lanes) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  // Of as many streams as there are classes the hardware does not see where each goes on.
  constexpr int64_t ahead = tuning::kLaneAhead * V::size;
  // Exponentials are kept where y holds them exactly.
  constexpr bool keep = std::is_same_v<T, A>;
  const V zero = set1(A(0));
  V m = set1(minus_infinity<A>());
  ExpSum<V> sum = {zero, zero};
  for (int64_t c = 0; c < n; ++c) {
    __builtin_prefetch(x + c * x_step + ahead);
    // In this order NaN loses: the sum tells of it.
    m = max(load_up_to(x + c * x_step, lanes), m);
  }
  for (int64_t c = 0; c < n; c += tuning::kChain) {
    // Sums of kChain classes at most, which then join the rest.
    ExpSum<V> chain = {zero, zero};
    for (int64_t i = c; i < std::min(n, c + tuning::kChain); ++i) {
      const V z = load_up_to(x + i * x_step, lanes), t = z - m, e = exp_for<E>(t);
      __builtin_prefetch(y + i * y_step + ahead, 1);
      // The result holds them until the sum is known; half types, which would round them, compute them again.
      if constexpr (keep) store_up_to(y + i * y_step, log_of_it ? t : e, lanes);
      chain.add(e, z, m);
    }
    sum.ones = sum.ones + chain.ones;
    sum.rest = sum.rest + chain.rest;
  }
  // One division or logarithm for a whole row.
  const V finish = log_of_it ? sum.log_of_sum() : set1(A(1)) / sum.sum();
  for (int64_t c = 0; c < n; ++c) {
    V t;
    if constexpr (keep) {
      t = load_up_to(y + c * y_step, lanes);
    } else {
      t = load_up_to(x + c * x_step, lanes) - m;
      if (!log_of_it) t = exp_for<E>(t);
    }
    store_up_to(y + c * y_step, log_of_it ? t - finish : t * finish, lanes);
  }
}

template <bool log_of_it, class T>
inline void softmax_backward_lanes(const T* g, int64_t g_step, const T* y, int64_t y_step, T* dx, int64_t dx_step,
                                   int64_t n, int64_t lanes) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t ahead = tuning::kLaneAhead * V::size;
  V sum = set1(A(0));
  for (int64_t c = 0; c < n; c += tuning::kChain) {
    V chain = set1(A(0));
    for (int64_t i = c; i < std::min(n, c + tuning::kChain); ++i) {
      __builtin_prefetch(g + i * g_step + ahead);
      __builtin_prefetch(y + i * y_step + ahead);
      __builtin_prefetch(dx + i * dx_step + ahead, 1);
      const V gc = load_up_to(g + i * g_step, lanes);
      // log-softmax's sum does not need y, which is read once, below.
      chain = log_of_it ? chain + gc : fma(gc, load_up_to(y + i * y_step, lanes), chain);
    }
    sum = sum + chain;
  }
  for (int64_t c = 0; c < n; ++c) {
    const V gc = load_up_to(g + c * g_step, lanes), yc = load_up_to(y + c * y_step, lanes);
    store_up_to(dx + c * dx_step, log_of_it ? gc - exp(yc) * sum : yc * (gc - sum), lanes);
  }
}

// Whether lanes are taken from memory where they lie, several times each: rows are adjacent, all of their classes stay
// in a core's cache, and those of a vector of them do not share one set of it.
template <class T>
inline bool lie_in_lanes(const RowLayout& l, int64_t classes) {
  const int64_t step = l.class_stride * (int64_t)sizeof(T);
  return vec_t<T>::size > 1 && l.inner_stride == 1 && l.inner >= vec_t<T>::size &&
         (classes <= tuning::kLaneClasses || classes * std::abs(step) <= tuning::kCachedRowBytes) &&
         (classes <= tuning::kCacheWays || step == 0 || step % tuning::kPageBytes != 0);
}

// Of the last rows of a run, fewer than a vector, how many before them are computed once more to make one: the same
// results, by whole loads and stores. None that another thread has.
template <class T>
inline int64_t rows_again(const RowLayout& l, int64_t begin, int64_t row, int64_t lanes) {
  const int64_t missing = vec_t<T>::size - lanes;
  return std::min(row - begin, row % l.inner) >= missing ? missing : 0;
}

// +inf dominates any finite value, as the limit does; a NaN dominates both.
template <class A>
inline vec_t<A> logsumexp_few_lanes(const A* z, int64_t classes) {
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows;
  const V inf = set1(-minus_infinity<A>());
  const V zero = set1(A(0));
  V m = set1(minus_infinity<A>());
  for (int64_t c = 0; c < classes; ++c) m = max(load(z + c * R), m);
  // 0 where the maximum is infinite: as row_logsumexp, the sum then tells infinity from NaN.
  const V origin = lane_origin(m);
  ExpSum<V> sum = {zero, zero};
  for (int64_t c = 0; c < classes; ++c) sum.add(exp(load(z + c * R) - origin), load(z + c * R), origin);
  return select_eq(m, inf, sum.sum(), m + sum.log_of_sum());
}

// ---- ranges of rows ------------------------------------------------------------------------------------------------

template <class T>
inline void softmax_few_classes(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  ColumnTile<A> z;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.input, a.in, row, rows, a.classes, z);
    const auto softmax = a.log ? softmax_lanes<true, T, A> : softmax_lanes<false, T, A>;
    for (int64_t i = 0; i < rows; i += W) softmax(z.at + i, R, z.at + i, R, a.classes, W);
    store_tile(z, (T*)a.output, a.out, row, rows, a.classes);
  }
}

template <class T>
inline void softmax_backward_few_classes(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  // dx takes the gradient's place.
  ColumnTile<A> y, g;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.input, a.in, row, rows, a.classes, y);
    load_tile((const T*)a.grad, a.grad_in, row, rows, a.classes, g);
    const auto backward = a.log ? softmax_backward_lanes<true, A> : softmax_backward_lanes<false, A>;
    for (int64_t i = 0; i < rows; i += W) backward(g.at + i, R, y.at + i, R, g.at + i, R, a.classes, W);
    store_tile(g, (T*)a.output, a.out, row, rows, a.classes);
  }
}

// Whether rows are closer to their neighbours than classes are, and enough of them for vectors.
inline bool lie_by_columns(const RowLayout& l) {
  return f32v::size > 1 && l.inner >= f32v::size && std::abs(l.inner_stride) < std::abs(l.class_stride);
}

// Any number of classes, of kLaneRows rows at a time, so many classes at a time as a tile holds: their maxima and sums,
// the latter rescaled when a maximum grows, and then the results from a second read. A tile's sums are by themselves,
// and those of tiles are put aside after so many that no chain of additions is long.
template <class T>
inline void softmax_columns(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size, C = tuning::kFewColumns;
  const V zero = set1(A(0)), lowest = set1(minus_infinity<A>());
  // The tile is both: what is read, and what is written.
  ColumnTile<A> z;
  A max_of[R], ones[R], rest[R], aside[R];  // of ExpSum, and what of the rest was put aside
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    for (int64_t i = 0; i < R; i += W) {
      // As if a tile before had been empty.
      store(max_of + i, lowest);
      store(ones + i, zero);
      store(rest + i, zero);
      store(aside + i, zero);
    }
    const T* x = (const T*)a.input;
    for (int64_t c = 0; c < a.classes; c += C) {
      const int64_t classes = std::min(C, a.classes - c);
      load_tile(x + c * a.in.class_stride, a.in, row, rows, classes, z);
      // Sums of kChain tiles at most, as of kChain additions within one.
      const bool puts_aside = c / C % tuning::kChain == tuning::kChain - 1;
      for (int64_t i = 0; i < rows; i += W) {
        const V before = load(max_of + i);
        // The tile's maximum beside that of the tiles before.
        V m = before;
        for (int64_t k = 0; k < classes; ++k) m = max(load(z.at + k * R + i), m);
        store(max_of + i, m);
        const V origin = select_eq(m, lowest, zero, m), scale = exp(before - origin);
        // What was 1 is less beside a larger maximum.
        const V was_one = load(ones + i), still_one = select_eq(before, m, was_one, zero);
        V r = load(rest + i) * scale + select_eq(before, m, zero, was_one * scale), p = load(aside + i) * scale;
        ExpSum<V> tile = {zero, zero};
        for (int64_t k = 0; k < classes; ++k) {
          const V zk = load(z.at + k * R + i);
          tile.add(exp_for<T>(zk - origin), zk, m);
        }
        r = r + tile.rest;
        store(ones + i, still_one + tile.ones);
        store(rest + i, puts_aside ? zero : r);
        store(aside + i, puts_aside ? p + r : p);
      }
    }
    for (int64_t i = 0; i < rows; i += W) {
      const ExpSum<V> sum = {load(ones + i), load(rest + i) + load(aside + i)};
      store(rest + i, a.log ? sum.log_of_sum() : set1(A(1)) / sum.sum());
    }
    for (int64_t c = 0; c < a.classes; c += C) {
      const int64_t classes = std::min(C, a.classes - c);
      load_tile(x + c * a.in.class_stride, a.in, row, rows, classes, z);
      for (int64_t i = 0; i < rows; i += W) {
        const V m = load(max_of + i), finish = load(rest + i);
        for (int64_t k = 0; k < classes; ++k) {
          // Exponentials are computed twice: kept, they would be as long as the rows.
          const V t = load(z.at + k * R + i) - m;
          store(z.at + k * R + i, a.log ? t - finish : exp_for<T>(t) * finish);
        }
      }
      store_tile(z, (T*)a.output + c * a.out.class_stride, a.out, row, rows, classes);
    }
  }
}

template <class T>
inline void softmax_backward_columns(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size, C = tuning::kFewColumns;
  const V zero = set1(A(0));
  ColumnTile<A> y, g;
  A sum[R], total[R];
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    for (int64_t i = 0; i < R; i += W) {
      store(sum + i, zero);
      store(total + i, zero);
    }
    for (int64_t c = 0; c < a.classes; c += C) {
      const int64_t classes = std::min(C, a.classes - c);
      // The sum of log-softmax is that of the gradient alone.
      if (!a.log) load_tile((const T*)a.input + c * a.in.class_stride, a.in, row, rows, classes, y);
      load_tile((const T*)a.grad + c * a.grad_in.class_stride, a.grad_in, row, rows, classes, g);
      // As forward's.
      const bool aside = c / C % tuning::kChain == tuning::kChain - 1;
      for (int64_t i = 0; i < rows; i += W) {
        // A tile's classes at a time: a chain is kFewColumns long.
        V s = zero;
        for (int64_t k = 0; k < classes; ++k) {
          const V gk = load(g.at + k * R + i);
          s = a.log ? s + gk : fma(gk, load(y.at + k * R + i), s);
        }
        s = load(sum + i) + s;
        store(sum + i, aside ? zero : s);
        if (aside) store(total + i, load(total + i) + s);
      }
    }
    for (int64_t c = 0; c < a.classes; c += C) {
      const int64_t classes = std::min(C, a.classes - c);
      load_tile((const T*)a.input + c * a.in.class_stride, a.in, row, rows, classes, y);
      load_tile((const T*)a.grad + c * a.grad_in.class_stride, a.grad_in, row, rows, classes, g);
      for (int64_t i = 0; i < rows; i += W) {
        const V s = load(sum + i) + load(total + i);
        for (int64_t k = 0; k < classes; ++k) {
          const V gk = load(g.at + k * R + i), yk = load(y.at + k * R + i);
          store(g.at + k * R + i, a.log ? gk - exp(yk) * s : yk * (gk - s));
        }
      }
      store_tile(g, (T*)a.output + c * a.out.class_stride, a.out, row, rows, classes);
    }
  }
}

template <class T>
inline void logsumexp_few_classes(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  ColumnTile<A> z;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.input, a.in, row, rows, a.classes, z);
    for (int64_t i = 0; i < rows; i += W)
      store_up_to((A*)a.row_result + row + i, logsumexp_few_lanes(z.at + i, a.classes), std::min(W, rows - i));
  }
}

template <class T>
inline void logsumexp_backward_few_classes(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size;
  ColumnTile<A> z;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.input, a.in, row, rows, a.classes, z);
    for (int64_t i = 0; i < rows; i += W) {
      const int64_t n = std::min(W, rows - i);
      const V g = load_up_to((const A*)a.row_grad + row + i, n), lse = load_up_to((const A*)a.row_result + row + i, n);
      // exp(z - lse) is the probability: nothing is summed.
      for (int64_t c = 0; c < a.classes; ++c) store(z.at + c * R + i, g * exp(load(z.at + c * R + i) - lse));
    }
    store_tile(z, (T*)a.output, a.out, row, rows, a.classes);
  }
}
