// Rows of few columns (classes, features) for kernels whose lanes are rows: kLaneRows of them at a time, column by
// column, in the accumulator's type, whatever the layout. They are read from memory once and written once; what happens
// in between is in L1.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

inline bool are_few(int64_t classes) { return 0 < classes && classes <= tuning::kFewColumns; }

// Class c of row r is at [c * kLaneRows + r]. A vector that has rows beyond the last one has zeros there, which are
// computed too and not stored.
template <class A>
struct ColumnTile {
  A at[tuning::kFewColumns * tuning::kLaneRows];
};

// The sum of exponentials of which the largest is 1, and its logarithm: ones are added up apart from the rest, so that
// of confident rows, whose logarithm is about that rest, no digits are lost but one rounding of it.
template <class V>
struct ExpSum {
  V ones, rest;
  void add(V e, V z, V max) {
    const V zero = set1(scalar_t<V>(0));
    ones = ones + select_eq(z, max, e, zero);
    rest = rest + select_eq(z, max, zero, e);
  }
  V sum() const { return ones + rest; }
  V log_of_sum() const {
    const V s = sum();  // at least 1, or 0 of a row of -inf
    return log(s) + (rest - (s - ones)) / max(s, set1(scalar_t<V>(1)));
  }
};

// What exponents are counted from, as origin_of.
template <class V>
inline V lane_origin(V max) {
  using A = scalar_t<V>;
  return select_lt(abs(max), set1(-minus_infinity<A>()), max, set1(A(0)));
}

// How many rows from `row` on, of `rows`, lie at one distance from each other.
inline int64_t rows_of_run(const RowLayout& l, int64_t row, int64_t rows) {
  return l.inner == 1 ? rows : std::min(rows, l.inner - row % l.inner);
}

// Rows whose classes are adjacent are transposed a square of vectors at a time; with fewer than `least` classes most of
// a square would be padding.
template <class T>
inline bool in_squares(const RowLayout& l, int64_t classes, int64_t least) {
  return vec_t<T>::size > 1 && l.class_stride == 1 && classes >= least;
}

// Of rows of n numbers, how many may be read to `width` numbers: where others follow, that reads them and not beyond
// the last one. Masked loads from memory take twice as long (Zen 5).
inline int64_t readable_rows(int64_t rows, int64_t step, int64_t n, int64_t width) {
  if (n >= width) return rows;
  return step < n ? 0 : std::max<int64_t>(0, rows - ceil_div(width - n, step));
}

template <class T>
inline void load_squares(const T* from, int64_t step, int64_t rows, int64_t classes, acc_t<T>* to) {
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size, F = 8;
  for (int64_t c = 0; c < classes; c += W) {
    const int64_t count = std::min(W, classes - c);
    // Two rows to a vector where half of it holds one: 24 shuffles instead of 64.
    const bool halves = W == 2 * F && count <= F;
    const int64_t whole = readable_rows(rows, step, classes - c, halves ? F : W);
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t lanes = std::min(W, rows - r);
      const T* p = from + r * step + c;
      // W rows of W classes become W columns: shuffles instead of a load and a store for each element.
      vec_t<T> square[W];
      if constexpr (W == 2 * F) {
        if (halves) {
          vec_t<T> pairs[F];
          if (r + W <= whole) {
            for (int64_t i = 0; i < F; ++i) pairs[i] = load_pair(p + i * step, F, p + (i + F) * step, F);
          } else {
            for (int64_t i = 0; i < F; ++i)
              pairs[i] = load_pair(p + i * step, i < lanes ? count : 0, p + (i + F) * step, i + F < lanes ? count : 0);
          }
          transpose(pairs);
          for (int64_t i = 0; i < count; ++i) store_up_to(to + (c + i) * R + r, pairs[i], lanes);
          continue;
        }
      }
      // Whole vectors, whatever lies behind a row's last class: what the tile does not want is not stored.
      if (r + W <= whole) {
        for (int64_t i = 0; i < W; ++i) square[i] = load(p + i * step);
      } else {
        for (int64_t i = 0; i < W; ++i) square[i] = i < lanes ? load_up_to(p + i * step, count) : set1(acc_t<T>(0));
      }
      transpose(square);
      for (int64_t i = 0; i < count; ++i) store_up_to(to + (c + i) * R + r, square[i], lanes);
    }
  }
}

template <class T>
inline void store_squares(const acc_t<T>* from, T* to, int64_t step, int64_t rows, int64_t classes) {
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t lanes = std::min(W, rows - r);
    for (int64_t c = 0; c < classes; c += W) {
      const int64_t count = std::min(W, classes - c);
      vec_t<T> square[W];
      for (int64_t i = 0; i < W; ++i)
        // Columns that are not there: whatever they hold is transposed and not stored.
        square[i] = i < count ? load_up_to(from + (c + i) * R + r, lanes) : set1(acc_t<T>(0));
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i) store_up_to(to + (r + i) * step + c, square[i], count);
    }
  }
}

// K vectors of rows of K adjacent numbers, K a power of two, become K columns, and columns rows.
template <int K, class V>
[[gnu::always_inline]] inline void rows_to_columns(V* v) {
  if constexpr (K > 1) {
    // Even numbers and odd ones, and in each half again: log K steps of one shuffle a vector.
    V even[K / 2], odd[K / 2];
#pragma GCC unroll 4
    for (int i = 0; i < K / 2; ++i) unzip(v[2 * i], v[2 * i + 1], even + i, odd + i);
    rows_to_columns<K / 2>(even);
    rows_to_columns<K / 2>(odd);
#pragma GCC unroll 4
    for (int i = 0; i < K / 2; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
  }
}
template <int K, class V>
[[gnu::always_inline]] inline void columns_to_rows(V* v) {
  if constexpr (K > 1) {
    V even[K / 2], odd[K / 2];
#pragma GCC unroll 4
    for (int i = 0; i < K / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    columns_to_rows<K / 2>(even);
    columns_to_rows<K / 2>(odd);
#pragma GCC unroll 4
    for (int i = 0; i < K / 2; ++i) zip(even[i], odd[i], v + 2 * i, v + 2 * i + 1);
  }
}

// Rows without gaps, of 2, 4 or 8 classes.
template <class T, int K>
inline void load_pairs(const T* from, int64_t rows, acc_t<T>* to) {
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t lanes = std::min(W, rows - r);
    // Rows without gaps are K vectors of numbers one behind another.
    vec_t<T> v[K];
    for (int64_t k = 0; k < K; ++k)
      v[k] = load_up_to(from + r * K + k * W, std::max<int64_t>(0, std::min(W, lanes * K - k * W)));
    rows_to_columns<K>(v);
    for (int64_t k = 0; k < K; ++k) store_up_to(to + k * R + r, v[k], lanes);
  }
}
template <class T, int K>
inline void store_pairs(const acc_t<T>* from, T* to, int64_t rows) {
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t lanes = std::min(W, rows - r);
    // As load_pairs, the other way round.
    vec_t<T> v[K];
    for (int64_t k = 0; k < K; ++k) v[k] = load_up_to(from + k * R + r, lanes);
    columns_to_rows<K>(v);
    for (int64_t k = 0; k < K; ++k)
      store_up_to(to + r * K + k * W, v[k], std::max<int64_t>(0, std::min(W, lanes * K - k * W)));
  }
}
inline bool in_pairs(const RowLayout& l, int64_t step, int64_t classes) {
  return l.class_stride == 1 && step == classes && (classes == 2 || classes == 4 || classes == 8);
}

template <class T>
inline void load_tile(const T* base, const RowLayout& l, int64_t row, int64_t rows, int64_t classes,
                      ColumnTile<acc_t<T>>& tile) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  const int64_t step = l.inner == 1 ? l.outer_stride : l.inner_stride;
  // The last vector of each column may have lanes beyond the rows: they are computed too, of zeros.
  for (int64_t c = 0; rows % W && c < classes; ++c) store(tile.at + c * R + rows / W * W, set1(A(0)));
  for (int64_t r = 0, run; r < rows; r += run) {
    run = rows_of_run(l, row + r, rows - r);
    const T* from = base + l.offset(row + r);
    // Cheapest first: rows without gaps, squares, columns that are adjacent, and single elements.
    if (in_pairs(l, step, classes)) {
      classes == 2   ? load_pairs<T, 2>(from, run, tile.at + r)
      : classes == 4 ? load_pairs<T, 4>(from, run, tile.at + r)
                     : load_pairs<T, 8>(from, run, tile.at + r);
      continue;
    }
    if (in_squares<T>(l, classes, tuning::kLoadSquares)) {
      load_squares(from, step, run, classes, tile.at + r);
      continue;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T* p = from + c * l.class_stride;
      A* to = tile.at + c * R + r;
      if (step == 1) {
        for (int64_t i = 0; i < run; i += W) {
          const int64_t n = std::min(W, run - i);
          // Of as many streams as there are classes the hardware does not see where each goes on.
          __builtin_prefetch(p + i + 2 * R);
          store_up_to(to + i, load_up_to(p + i, n), n);
        }
      } else if (step == 2 || step == 0) {
        gather_row(p, step, run, to);
      } else if constexpr (std::is_same_v<T, A>) {
        for (int64_t i = 0; i < run; ++i) to[i] = p[i * step];
      } else {
        // Half types are gathered as they are, and widened a vector at a time.
        T narrow[R];
        for (int64_t i = 0; i < run; ++i) narrow[i] = p[i * step];
        for (int64_t i = 0; i < run; i += W) {
          const int64_t n = std::min(W, run - i);
          store_up_to(to + i, load_up_to(narrow + i, n), n);
        }
      }
    }
  }
}

template <class T>
inline void store_tile(const ColumnTile<acc_t<T>>& tile, T* base, const RowLayout& l, int64_t row, int64_t rows,
                       int64_t classes) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  const int64_t step = l.inner == 1 ? l.outer_stride : l.inner_stride;
  for (int64_t r = 0, run; r < rows; r += run) {
    run = rows_of_run(l, row + r, rows - r);
    T* to = base + l.offset(row + r);
    if (in_pairs(l, step, classes)) {
      classes == 2   ? store_pairs<T, 2>(tile.at + r, to, run)
      : classes == 4 ? store_pairs<T, 4>(tile.at + r, to, run)
                     : store_pairs<T, 8>(tile.at + r, to, run);
      continue;
    }
    if (in_squares<T>(l, classes, tuning::kStoreSquares)) {
      store_squares(tile.at + r, to, step, run, classes);
      continue;
    }
    for (int64_t c = 0; c < classes; ++c) {
      T* p = to + c * l.class_stride;
      const A* from = tile.at + c * R + r;
      if (step == 1) {
        for (int64_t i = 0; i < run; i += W) {
          const int64_t n = std::min(W, run - i);
          store_up_to(p + i, load_up_to(from + i, n), n);
        }
      } else if constexpr (std::is_same_v<T, A>) {
        for (int64_t i = 0; i < run; ++i) p[i * step] = from[i];
      } else {
        // Rounded a vector at a time, then scattered.
        T narrow[R];
        for (int64_t i = 0; i < run; i += W) {
          const int64_t n = std::min(W, run - i);
          store_up_to(narrow + i, load_up_to(from + i, n), n);
        }
        // No instruction scatters half types.
        for (int64_t i = 0; i < run; ++i) p[i * step] = narrow[i];
      }
    }
  }
}
