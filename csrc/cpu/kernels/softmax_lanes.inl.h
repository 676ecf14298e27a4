// Softmax, log-softmax and log-sum-exp with a lane to a row, forward and backward: where rows are adjacent in memory,
// and for few classes, whose tiles make them so. The formulas are those of softmax.inl.h.
#pragma once
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

// Asks for n numbers: of as many streams as there are classes the hardware does not see where each goes on.
template <int write, class T>
inline void ask_for(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i, write);
}

// Between one look at the classes of a vector of rows and the next, its numbers stay where they lie, and exponentials
// wait in the result where that holds them exactly; or, `apart`, all wait in `tile`, since classes share one set of the
// cache. K vectors are taken together, so that none waits for another; `lanes` are those of the last one.
template <int K, bool apart, class T>
inline void softmax_of_lanes(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t n, int64_t lanes, bool log_of_it,
                             acc_t<T>* tile, int64_t tile_step) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = V::size, ahead = (apart ? K : std::max<int64_t>(2 * K, tuning::kLaneAhead)) * W;
  constexpr bool in_result = !apart && std::is_same_v<T, A>;
  const V zero = set1(A(0));
  V m[K];
  ExpSum<V> sum[K];
  for (int k = 0; k < K; ++k) m[k] = set1(minus_infinity<A>()), sum[k] = {zero, zero};
  for (int64_t c = 0; c < n; ++c) {
    ask_for<0>(x + c * x_step + ahead, K * W);
    for (int k = 0; k < K; ++k) {
      const V z = load_up_to(x + c * x_step + k * W, lanes);
      if constexpr (apart) store(tile + c * tile_step + k * W, z);
      m[k] = max(z, m[k]);
    }
  }
  for (int64_t begin = 0; begin < n; begin += tuning::kChain) {
    V chain[K];
    for (int k = 0; k < K; ++k) chain[k] = zero;
    for (int64_t c = begin; c < std::min(n, begin + tuning::kChain); ++c) {
      ask_for<1>(y + c * y_step + ahead, K * W);
      for (int k = 0; k < K; ++k) {
        A* at = tile + c * tile_step + k * W;
        V z;
        if constexpr (apart)
          z = load(at);
        else
          z = load_up_to(x + c * x_step + k * W, lanes);
        const V t = z - m[k], e = exp_for<T>(t);
        if constexpr (apart) store(at, log_of_it ? t : e);
        if constexpr (in_result) store_up_to(y + c * y_step + k * W, log_of_it ? t : e, lanes);
        ExpSum<V> both = {sum[k].ones, chain[k]};
        both.add(e, z, m[k]);
        sum[k].ones = both.ones;
        chain[k] = both.rest;
      }
    }
    for (int k = 0; k < K; ++k) sum[k].rest = sum[k].rest + chain[k];
  }
  V finish[K];
  for (int k = 0; k < K; ++k) finish[k] = log_of_it ? sum[k].log_of_sum() : set1(A(1)) / sum[k].sum();
  for (int64_t c = 0; c < n; ++c) {
    for (int k = 0; k < K; ++k) {
      T* to = y + c * y_step + k * W;
      V t;
      if constexpr (apart) {
        t = load(tile + c * tile_step + k * W);
      } else if constexpr (in_result) {
        t = load_up_to(to, lanes);
      } else {
        t = load_up_to(x + c * x_step + k * W, lanes) - m[k];
        if (!log_of_it) t = exp_for<T>(t);
      }
      store_up_to(to, log_of_it ? t - finish[k] : t * finish[k], lanes);
    }
  }
}

template <int K, bool apart, class T>
inline void softmax_backward_of_lanes(const T* g, int64_t g_step, const T* y, int64_t y_step, T* dx, int64_t dx_step,
                                      int64_t n, int64_t lanes, bool log_of_it, acc_t<T>* g_tile, acc_t<T>* y_tile,
                                      int64_t tile_step) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = V::size, ahead = (apart ? K : std::max<int64_t>(2 * K, tuning::kLaneAhead)) * W;
  const V zero = set1(A(0));
  V sum[K];
  for (int k = 0; k < K; ++k) sum[k] = zero;
  for (int64_t begin = 0; begin < n; begin += tuning::kChain) {
    V chain[K];
    for (int k = 0; k < K; ++k) chain[k] = zero;
    for (int64_t c = begin; c < std::min(n, begin + tuning::kChain); ++c) {
      ask_for<0>(g + c * g_step + ahead, K * W);
      ask_for<0>(y + c * y_step + ahead, K * W);
      ask_for<1>(dx + c * dx_step + ahead, K * W);
      for (int k = 0; k < K; ++k) {
        const V gc = load_up_to(g + c * g_step + k * W, lanes);
        V yc = zero;
        if (apart || !log_of_it) yc = load_up_to(y + c * y_step + k * W, lanes);
        if constexpr (apart) {
          store(g_tile + c * tile_step + k * W, gc);
          store(y_tile + c * tile_step + k * W, yc);
        }
        chain[k] = log_of_it ? chain[k] + gc : fma(gc, yc, chain[k]);
      }
    }
    for (int k = 0; k < K; ++k) sum[k] = sum[k] + chain[k];
  }
  for (int64_t c = 0; c < n; ++c) {
    for (int k = 0; k < K; ++k) {
      V gc, yc;
      if constexpr (apart) {
        gc = load(g_tile + c * tile_step + k * W);
        yc = load(y_tile + c * tile_step + k * W);
      } else {
        gc = load_up_to(g + c * g_step + k * W, lanes);
        yc = load_up_to(y + c * y_step + k * W, lanes);
      }
      store_up_to(dx + c * dx_step + k * W, log_of_it ? gc - exp(yc) * sum[k] : yc * (gc - sum[k]), lanes);
    }
  }
}

// How lanes of a call are taken: so many vectors together, 0 if rows are not adjacent or too few for vectors, or their
// classes too many.
struct LanePlan {
  int vectors;
  bool apart;
};
template <class T>
inline LanePlan lane_plan(const RowLayout& a, const RowLayout& b, const RowLayout& c, int64_t classes, int64_t tiles) {
  constexpr int64_t bytes = vec_t<T>::size * sizeof(T), tile_bytes = vec_t<T>::size * sizeof(acc_t<T>);
  LanePlan plan = {0, false};
  if (vec_t<T>::size == 1 || classes > tuning::kLaneClasses) return plan;
  for (const RowLayout* l : {&a, &b, &c}) {
    if (l->inner_stride != 1 || l->inner < vec_t<T>::size) return plan;
    plan.apart = plan.apart || (classes > tuning::kCacheWays && l->class_stride * sizeof(T) % tuning::kPageBytes == 0);
  }
  const int64_t held = plan.apart ? tuning::kLaneTileBytes / (tiles * tile_bytes * classes)
                                  : tuning::kLaneBytes / ((tiles + 1) * bytes * classes);
  plan.vectors = held >= 4 ? 4 : held >= 2 ? 2 : 1;
  // What is left of a line is gone before the next vector wants it.
  if (plan.apart && plan.vectors * bytes < tuning::kLineBytes) plan.vectors = 0;
  return plan;
}

template <class T>
inline void softmax_lanes(LanePlan plan, const T* x, int64_t x_step, T* y, int64_t y_step, int64_t n, int64_t lanes,
                          bool log_of_it, acc_t<T>* tile, int64_t tile_step) {
  const auto of_lanes = plan.vectors == 4 ? (plan.apart ? softmax_of_lanes<4, true, T> : softmax_of_lanes<4, false, T>)
                        : plan.vectors == 2
                            ? (plan.apart ? softmax_of_lanes<2, true, T> : softmax_of_lanes<2, false, T>)
                            : (plan.apart ? softmax_of_lanes<1, true, T> : softmax_of_lanes<1, false, T>);
  of_lanes(x, x_step, y, y_step, n, lanes, log_of_it, tile, tile_step);
}
template <class T>
inline void softmax_backward_lanes(LanePlan plan, const T* g, int64_t g_step, const T* y, int64_t y_step, T* dx,
                                   int64_t dx_step, int64_t n, int64_t lanes, bool log_of_it, acc_t<T>* g_tile,
                                   acc_t<T>* y_tile, int64_t tile_step) {
  const auto of_lanes =
      plan.vectors == 4 ? (plan.apart ? softmax_backward_of_lanes<4, true, T> : softmax_backward_of_lanes<4, false, T>)
      : plan.vectors == 2
          ? (plan.apart ? softmax_backward_of_lanes<2, true, T> : softmax_backward_of_lanes<2, false, T>)
          : (plan.apart ? softmax_backward_of_lanes<1, true, T> : softmax_backward_of_lanes<1, false, T>);
  of_lanes(g, g_step, y, y_step, dx, dx_step, n, lanes, log_of_it, g_tile, y_tile, tile_step);
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
  const V origin = select_lt(abs(m), inf, m, zero);
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
    // Of exponentials the tile is the result.
    for (int64_t i = 0, vectors; i < rows; i += vectors * W) {
      vectors = rows - i > 2 * W ? 4 : 1;  // what is beyond the last row is not stored
      A* at = z.at + i;
      softmax_lanes<A>({(int)vectors, false}, at, R, at, R, a.classes, W, a.log, nullptr, 0);
    }
    store_tile(z, (T*)a.output, a.out, row, rows, a.classes);
  }
}

template <class T>
inline void softmax_backward_few_classes(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  ColumnTile<A> y, g;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_tile((const T*)a.input, a.in, row, rows, a.classes, y);
    load_tile((const T*)a.grad, a.grad_in, row, rows, a.classes, g);
    for (int64_t i = 0, vectors; i < rows; i += vectors * W) {
      vectors = rows - i > 2 * W ? 4 : 1;
      A* at = g.at + i;
      softmax_backward_lanes<A>({(int)vectors, false}, at, R, y.at + i, R, at, R, a.classes, W, a.log, nullptr, nullptr,
                                0);
    }
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
  ColumnTile<A> z;
  A max_of[R], ones[R], rest[R], aside[R];  // of ExpSum, and what of the rest was put aside
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    for (int64_t i = 0; i < R; i += W) {
      store(max_of + i, lowest);
      store(ones + i, zero);
      store(rest + i, zero);
      store(aside + i, zero);
    }
    const T* x = (const T*)a.input;
    for (int64_t c = 0; c < a.classes; c += C) {
      const int64_t classes = std::min(C, a.classes - c);
      load_tile(x + c * a.in.class_stride, a.in, row, rows, classes, z);
      const bool puts_aside = c / C % tuning::kChain == tuning::kChain - 1;
      for (int64_t i = 0; i < rows; i += W) {
        const V before = load(max_of + i);
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
      if (!a.log) load_tile((const T*)a.input + c * a.in.class_stride, a.in, row, rows, classes, y);
      load_tile((const T*)a.grad + c * a.grad_in.class_stride, a.grad_in, row, rows, classes, g);
      const bool aside = c / C % tuning::kChain == tuning::kChain - 1;
      for (int64_t i = 0; i < rows; i += W) {
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
      for (int64_t c = 0; c < a.classes; ++c) store(z.at + c * R + i, g * exp(load(z.at + c * R + i) - lse));
    }
    store_tile(z, (T*)a.output, a.out, row, rows, a.classes);
  }
}
