// Packing for the GEMM engine: the operand whose vectors are loaded goes into panels of register-tile width, the one
// whose elements are broadcast is laid out anew only where it cannot be read in place. Half types are widened on the
// way, so that one micro-kernel per accumulator type serves them all. kTile is the ISA's register tile.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

template <class V>
constexpr int64_t kTileColumns = kTile.vectors * V::size;

// Panels of rows that lie along k in memory, P a multiple of the vector: squares of V::size are transposed in
// registers. to[k * P + i] = operand(i0 + i, k0 + k), zero for i >= count.
template <class T, int P>
inline void pack_rows_along_k(const PackArgs& a) {
  using V = vec_t<T>;
  constexpr int64_t W = V::size;
  const T* base = (const T*)a.from.data + a.k0;
  acc_t<T>* to = (acc_t<T>*)a.to;
  for (int64_t panel = 0; panel < a.count; panel += P, to += P * a.k) {
    // Of rows beyond the last, null: the panel has zeros there, and the micro-kernel need not ask.
    const T* row[P];
    for (int64_t i = 0; i < P; ++i) row[i] = panel + i < a.count ? base + a.from.row_offset(a.i0 + panel + i) : nullptr;
    if constexpr (W > 1 && std::is_same_v<V, f32v>) {
      static_assert(P % W == 0, "a panel is made of whole squares");
      for (int64_t j = 0; j < a.k; j += W) {
        const int64_t n = std::min<int64_t>(W, a.k - j);
        for (int64_t i = 0; i < P; i += W) {
          V square[W];
#pragma GCC unroll 16
          for (int64_t r = 0; r < W; ++r)
            square[r] = !row[i + r] ? set1(acc_t<T>(0)) : n == W ? load(row[i + r] + j) : load_n(row[i + r] + j, n);
          transpose(square);
          acc_t<T>* q = to + j * P + i;
          if (n == W) {
#pragma GCC unroll 16
            for (int64_t c = 0; c < W; ++c) store(q + c * P, square[c]);
          } else {
            for (int64_t c = 0; c < n; ++c) store(q + c * P, square[c]);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < P; ++i)
        for (int64_t j = 0; j < a.k; ++j) to[j * P + i] = row[i] ? load_one(row[i] + j) : acc_t<T>(0);
    }
  }
}

// One k of a panel of width P; n elements are there to be read. Where P is no multiple of the vector, the last one may
// spill into the next k, which is written afterwards.
template <class T, int P>
inline void pack_one_k(const T* from, int64_t n, bool spill, acc_t<T>* to) {
  using V = vec_t<T>;
  constexpr int64_t W = V::size;
  if (spill && n >= (P + W - 1) / W * W) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < P; i += W) store(to + i, load(from + i));
    return;
  }
  for (int64_t i = 0; i < P; i += W) {
    const int64_t there = n - i;
    // The last columns: read as far as they go, zeros behind.
    const V x = there >= W ? load(from + i) : there > 0 ? load_n(from + i, there) : set1(acc_t<T>(0));
    if (i + W <= P || spill)
      store(to + i, x);
    else
      store_n(to + i, x, P - i);
  }
}

// Panels of rows that lie across k in memory: copies. A few k at a time, so that a line of memory is read once and a
// line of a panel is written at once, however the rows' distance maps them onto the caches' sets. Every row may lie on
// a page of its own, where no hardware prefetcher follows: later rows are asked for early.
template <class T, int P>
inline void pack_rows_across_k(const PackArgs& a) {
  constexpr int64_t kDepth = tuning::kPackDepth, kAhead = tuning::kPackAhead, kLine = 64 / sizeof(T);
  acc_t<T>* to = (acc_t<T>*)a.to;
  for (int64_t j = 0; j < a.k; j += kDepth) {
    const int64_t depth = std::min(kDepth, a.k - j);
    const T *row[kDepth], *later[kDepth];
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t k = a.k0 + j + d;
      row[d] = (const T*)a.from.data + a.from.row_offset(k) + a.i0;
      later[d] = (const T*)a.from.data + a.from.row_offset(std::min(k + kAhead, a.k0 + a.k - 1)) + a.i0;
    }
    for (int64_t i = 0; i < a.count; i += P)
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t line = 0; line < P; line += kLine) __builtin_prefetch(later[d] + i + line);
        pack_one_k<T, P>(row[d] + i, a.count - i, j + d + 1 < a.k, to + i * a.k + (j + d) * P);
      }
  }
}

// Elements of a row that are not adjacent are gathered first, some of all rows of a panel at a time.
template <class T, int P>
inline void pack_any(const PackArgs& a) {
  using A = acc_t<T>;
  // So many numbers of each row stay in L1 until they are written by columns.
  constexpr int64_t kStage = 128;
  const int64_t step = a.from.col_stride;
  const T* const base = (const T*)a.from.data;
  A stage[P * kStage];
  for (int64_t panel = 0; panel < a.count; panel += P) {
    A* to = (A*)a.to + panel * a.k;
    const int64_t rows = std::min<int64_t>(P, a.count - panel);
    if (a.across) {
      for (int64_t j = 0; j < a.k; ++j, to += P) {
        gather_row(base + a.from.row_offset(a.k0 + j) + (a.i0 + panel) * step, step, rows, to);
        for (int64_t i = rows; i < P; ++i) to[i] = A(0);
      }
      continue;
    }
    for (int64_t j = 0; j < a.k; j += kStage) {
      const int64_t n = std::min(kStage, a.k - j);
      for (int64_t i = 0; i < rows; ++i)
        gather_row(base + a.from.row_offset(a.i0 + panel + i) + (a.k0 + j) * step, step, n, stage + i * kStage);
      for (int64_t c = 0; c < n; ++c, to += P)
        for (int64_t i = 0; i < P; ++i) to[i] = i < rows ? stage[i * kStage + c] : A(0);
    }
  }
}

template <class T>
inline void pack_a(const PackArgs& a) {
  a.across&& a.from.col_stride == 1 ? pack_rows_across_k<T, kTile.rows>(a) : pack_any<T, kTile.rows>(a);
}
template <class T>
inline void pack_b(const PackArgs& a) {
  constexpr int P = kTileColumns<vec_t<T>>;
  if (a.from.col_stride != 1) return pack_any<T, P>(a);
  a.across ? pack_rows_across_k<T, P>(a) : pack_rows_along_k<T, P>(a);
}

// Rows along k, widened: to[i * k + j] = operand(i0 + i, k0 + j).
template <class T>
inline void widen_a(const PackArgs& a) {
  using V = vec_t<T>;
  acc_t<T>* to = (acc_t<T>*)a.to;
  for (int64_t i = 0; i < a.count; ++i, to += a.k) {
    const T* from = (const T*)a.from.data + a.from.row_offset(a.i0 + i) + a.k0;
    int64_t j = 0;
    for (; j + V::size <= a.k; j += V::size) store(to + j, load(from + j));
    if (j < a.k) store_n(to + j, load_n(from + j, a.k - j), a.k - j);
  }
}
