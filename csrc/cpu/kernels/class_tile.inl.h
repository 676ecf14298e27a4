// Rows of few classes for kernels whose lanes are rows: kLaneRows of them at a time, class by class, in the
// accumulator's type, whatever the layout. They are read from memory once and written once; what happens in between is
// in L1.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

inline bool are_few(int64_t classes) { return 0 < classes && classes <= tuning::kFewClasses; }

// Class c of row r is at [c * kLaneRows + r]. A vector that has rows beyond the last one has zeros there, which are
// computed too and not stored.
template <class A>
struct ClassTile {
  A at[tuning::kFewClasses * tuning::kLaneRows];
};

// How many rows from `row` on, of `rows`, lie at one distance from each other.
inline int64_t rows_of_run(const RowLayout& l, int64_t row, int64_t rows) {
  return l.inner == 1 ? rows : std::min(rows, l.inner - row % l.inner);
}

// Rows whose classes are adjacent are transposed a square of vectors at a time; with fewer classes most of a square
// would be padding.
template <class T>
inline bool in_squares(const RowLayout& l, int64_t classes) {
  return !std::is_same_v<T, double> && f32v::size > 1 && l.class_stride == 1 && classes >= tuning::kSquareClasses;
}

template <class T>
inline void load_squares(const T* from, int64_t step, int64_t rows, int64_t classes, float* to) {
  constexpr int64_t R = tuning::kLaneRows, W = f32v::size;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t lanes = std::min(W, rows - r);
    for (int64_t c = 0; c < classes; c += W) {
      const int64_t count = std::min(W, classes - c);
      f32v square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = i < lanes ? load_up_to(from + (r + i) * step + c, count) : set1(0.0f);
      transpose(square);
      for (int64_t i = 0; i < count; ++i) store_up_to(to + (c + i) * R + r, square[i], lanes);
    }
  }
}

template <class T>
inline void store_squares(const float* from, T* to, int64_t step, int64_t rows, int64_t classes) {
  constexpr int64_t R = tuning::kLaneRows, W = f32v::size;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t lanes = std::min(W, rows - r);
    for (int64_t c = 0; c < classes; c += W) {
      const int64_t count = std::min(W, classes - c);
      f32v square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = i < count ? load_up_to(from + (c + i) * R + r, lanes) : set1(0.0f);
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i) store_up_to(to + (r + i) * step + c, square[i], count);
    }
  }
}

template <class T>
inline void load_tile(const T* base, const RowLayout& l, int64_t row, int64_t rows, int64_t classes,
                      ClassTile<acc_t<T>>& tile) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  const int64_t step = l.inner == 1 ? l.outer_stride : l.inner_stride;
  for (int64_t c = 0; rows % W && c < classes; ++c) store(tile.at + c * R + rows / W * W, set1(A(0)));
  for (int64_t r = 0, run; r < rows; r += run) {
    run = rows_of_run(l, row + r, rows - r);
    const T* from = base + l.offset(row + r);
    if constexpr (!std::is_same_v<T, double>) {
      if (in_squares<T>(l, classes)) {
        load_squares(from, step, run, classes, tile.at + r);
        continue;
      }
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
      } else if constexpr (std::is_same_v<T, A>) {
        for (int64_t i = 0; i < run; ++i) to[i] = p[i * step];
      } else {
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
inline void store_tile(const ClassTile<acc_t<T>>& tile, T* base, const RowLayout& l, int64_t row, int64_t rows,
                       int64_t classes) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<T>::size;
  const int64_t step = l.inner == 1 ? l.outer_stride : l.inner_stride;
  for (int64_t r = 0, run; r < rows; r += run) {
    run = rows_of_run(l, row + r, rows - r);
    T* to = base + l.offset(row + r);
    if constexpr (!std::is_same_v<T, double>) {
      if (in_squares<T>(l, classes)) {
        store_squares(tile.at + r, to, step, run, classes);
        continue;
      }
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
        T narrow[R];
        for (int64_t i = 0; i < run; i += W) {
          const int64_t n = std::min(W, run - i);
          store_up_to(narrow + i, load_up_to(from + i, n), n);
        }
        for (int64_t i = 0; i < run; ++i) p[i * step] = narrow[i];
      }
    }
  }
}
