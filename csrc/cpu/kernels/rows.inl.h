// What softmax and cross-entropy share of rows: blocks of one row that fit L1, and tiles of rows. Where the class
// dimension is not adjacent in memory, tiles of kTileRows rows are transposed into scratch, the row kernels run there,
// and the results are transposed back.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// ---- a block of a row ----------------------------------------------------------------------------------------------

constexpr int64_t kBlock = tuning::kBlockVectors * f32v::size;

template <class A>
inline A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

template <class T>
inline acc_t<T> block_max(const T* z, int64_t n) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  // Two maxima, none of which waits for the other; and in an order in which NaN loses: the sum tells of it.
  V m0 = set1(minus_infinity<A>()), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * V::size <= n; j += 2 * V::size) {
    m0 = max(load(z + j), m0);
    m1 = max(load(z + j + V::size), m1);
  }
  for (; j + V::size <= n; j += V::size) m0 = max(load(z + j), m0);
  if (j < n) m1 = max(first_n(load_n(z + j, n - j), n - j, m1), m1);
  return reduce_max(max(m0, m1));
}

// Sum of exp(z - m). Lanes past the end count exp(-inf) = 0. Meanwhile what follows at `next` is fetched (past the
// end of the row that is a hint without effect): memory would idle during this pass otherwise.
// With `keep`, what is summed is also stored at `exponentials`. E: the type of the results (exp_for).
template <class E, bool keep = false, class S, class T, class A = acc_t<S>>
inline A block_exp_sum(const S* z, int64_t n, A m, const T* next, A* exponentials = nullptr) {
  using V = vec_t<A>;
  constexpr int64_t line = 64 / sizeof(T);
  // Two exponentials at a time, since one alone is a long chain of fma.
  V vm = set1(m), s0 = set1(A(0)), s1 = s0;
  int64_t j = 0;
  for (; j + 2 * V::size <= n; j += 2 * V::size) {
    __builtin_prefetch(next + j);
    // Two wide vectors are more than a line.
    if constexpr (line < 2 * V::size) __builtin_prefetch(next + j + line);
    const V e0 = exp_for<E>(load(z + j) - vm), e1 = exp_for<E>(load(z + j + V::size) - vm);
    if constexpr (keep) {
      store(exponentials + j, e0);
      store(exponentials + j + V::size, e1);
    }
    s0 = s0 + e0;
    s1 = s1 + e1;
  }
  for (; j + V::size <= n; j += V::size) {
    const V e = exp_for<E>(load(z + j) - vm);
    if constexpr (keep) store(exponentials + j, e);
    s0 = s0 + e;
  }
  if (j < n) {
    // Lanes beyond the last count as -inf, whose exponential is 0.
    const V e = exp_for<E>(first_n(load_n(z + j, n - j) - vm, n - j, set1(minus_infinity<A>())));
    if constexpr (keep) store_n(exponentials + j, e, n - j);
    s1 = s1 + e;
  }
  return reduce_add(s0 + s1);
}

// A block of n elements in accumulator type: the elements themselves where nothing needs doing, else a copy in buf.
template <class T, class A>
inline const A* staged(const T* p, int64_t n, A* buf) {
  if constexpr (std::is_same_v<T, A>) {
    return p;
  } else {
    using V = vec_t<A>;
    int64_t j = 0;
    for (; j + V::size <= n; j += V::size) store(buf + j, load(p + j));
    if (j < n) store_n(buf + j, load_n(p + j, n - j), n - j);
    return buf;
  }
}

// ---- several rows at a time ----------------------------------------------------------------------------------------

template <class T>
inline void fill(acc_t<T> x, int64_t n, T* to) {
  const vec_t<T> v = set1(x);
  for (int64_t i = 0; i < n; i += vec_t<T>::size) store_up_to(to + i, v, std::min<int64_t>(vec_t<T>::size, n - i));
}

// A row's classes, `step` apart: every other one by vectors, of which the last is left alone, since it may be the last
// of memory; none apart, as in a sum's gradient, one number for all.
template <class T>
inline void gather_row(const T* p, int64_t step, int64_t classes, acc_t<T>* to) {
  using V = vec_t<T>;
  int64_t c = 0;
  if (step == 1) {
    for (; c + V::size <= classes; c += V::size) store(to + c, load(p + c));
    if (c < classes) store_n(to + c, load_n(p + c, classes - c), classes - c);
    return;
  }
  if (step == 0) return fill(load_one(p), classes, to);
  for (; step == 2 && c + V::size < classes; c += V::size) {
    V even, odd;
    unzip(load(p + 2 * c), load(p + 2 * c + V::size), &even, &odd);
    store(to + c, even);
  }
  for (; c < classes; ++c) to[c] = load_one(p + c * step);
}
template <class T>
inline void scatter_row(const acc_t<T>* from, T* p, int64_t step, int64_t classes) {
  using V = vec_t<T>;
  int64_t c = 0;
  if (step == 1) {
    for (; c + V::size <= classes; c += V::size) store(p + c, load(from + c));
    if (c < classes) store_n(p + c, load_n(from + c, classes - c), classes - c);
    return;
  }
  for (; c < classes; ++c) store_one(p + c * step, from[c]);
}

// Whether a tile is gathered and scattered along its rows, which are few, whose classes are closer than rows are, or of
// one number each.
inline bool row_by_row(const RowLayout& l, int64_t rows) {
  return rows <= tuning::kRowByRow || l.class_stride == 0 || std::abs(l.class_stride) < std::abs(l.inner_stride);
}

// Tile from memory: to[row][class], rows adjacent in memory along `inner` with inner_stride.
template <class T>
inline void gather_tile(const T* base, const RowLayout& l, int64_t row, int64_t rows, int64_t classes, acc_t<T>* to) {
  const T* p = base + l.offset(row);
  if (row_by_row(l, rows)) {
    for (int64_t r = 0; r < rows; ++r) gather_row(p + r * l.inner_stride, l.class_stride, classes, to + r * classes);
    return;
  }
  if (l.inner_stride == 1 && vec_t<T>::size > 1) {
    constexpr int64_t W = vec_t<T>::size;
    for (int64_t r0 = 0; r0 < rows; r0 += W) {
      const int64_t lanes = std::min<int64_t>(W, rows - r0);
      for (int64_t c0 = 0; c0 < classes; c0 += W) {
        const int64_t count = std::min<int64_t>(W, classes - c0);
        // Read by columns and written by rows, a square in registers: element by element, one of the two goes across
        // lines.
        vec_t<T> block[W];
        for (int64_t c = 0; c < W; ++c) {
          const T* q = p + (c0 + c) * l.class_stride + r0;
          block[c] = c >= count ? set1(acc_t<T>(0)) : lanes == W ? load(q) : load_n(q, lanes);
        }
        transpose(block);
        for (int64_t r = 0; r < lanes; ++r) {
          acc_t<T>* q = to + (r0 + r) * classes + c0;
          if (count == W)
            store(q, block[r]);
          else
            store_n(q, block[r], count);
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t r = 0; r < rows; ++r) to[r * classes + c] = load_one(p + c * l.class_stride + r * l.inner_stride);
}

template <class T>
inline void scatter_tile(const acc_t<T>* from, T* base, const RowLayout& l, int64_t row, int64_t rows,
                         int64_t classes) {
  T* p = base + l.offset(row);
  if (row_by_row(l, rows)) {
    for (int64_t r = 0; r < rows; ++r) scatter_row(from + r * classes, p + r * l.inner_stride, l.class_stride, classes);
    return;
  }
  if (l.inner_stride == 1 && vec_t<T>::size > 1) {
    constexpr int64_t W = vec_t<T>::size;
    for (int64_t r0 = 0; r0 < rows; r0 += W) {
      const int64_t lanes = std::min<int64_t>(W, rows - r0);
      for (int64_t c0 = 0; c0 < classes; c0 += W) {
        const int64_t count = std::min<int64_t>(W, classes - c0);
        // The same the other way.
        vec_t<T> block[W];
        for (int64_t r = 0; r < W; ++r) {
          const acc_t<T>* q = from + (r0 + r) * classes + c0;
          block[r] = r >= lanes ? set1(acc_t<T>(0)) : count == W ? load(q) : load_n(q, count);
        }
        transpose(block);
        for (int64_t c = 0; c < count; ++c) {
          T* q = p + (c0 + c) * l.class_stride + r0;
          if (lanes == W)
            store(q, block[c]);
          else
            store_n(q, block[c], lanes);
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t r = 0; r < rows; ++r) store_one(p + c * l.class_stride + r * l.inner_stride, from[r * classes + c]);
}

// Rows of the tile that starts at `row`: never across a step of the outer dimension.
inline int64_t tile_rows(const RowLayout& l, int64_t row, int64_t end) {
  return std::min(std::min<int64_t>(tuning::kTileRows, l.inner - row % l.inner), end - row);
}
