// The GEMM engine's operands as pairs of bf16 that are neighbours along K: a slot of the panels, as large as a float,
// holds two of them, and one instruction adds both products to a float32 sum. Half as many slots, so twice the rate of
// widened operands, and half the bytes. A factor of the accumulator's type is rounded to bf16 on the way. K's last slot
// ends with a zero where K is odd. Subnormal bf16 count as zero (VDPBF16PS does not know them).
#pragma once
#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/gemm_pack.inl.h"
#include "cpu/kernels/gemm_small.inl.h"
#include "cpu/kernels/prelude.h"

constexpr int64_t kPairColumns = kTileColumns<bf16x2v>;

// AMX multiplies squares of so many rows by so many slots (gemm_amx.inl.h): K's slots for it, the last ones zeros.
constexpr int64_t kSquare = 16;
inline int64_t slots_of_squares(int64_t numbers) { return round_up(ceil_div(numbers, 2), kSquare); }

// Where panels of B have slot s of column c, one of a vector's first: row after row, or by `squares`, so many rows of
// the panel's first vector and then of its second.
template <bool squares>
inline int64_t slot_of_panel(int64_t s, int64_t c) {
  return squares ? s / kSquare * kSquare * kPairColumns + c * kSquare + s % kSquare * kSquare : s * kPairColumns + c;
}

// Slots of a row that lies along K, of which `numbers` are there to be read.
template <class T>
inline bf16x2v load_slots(const T* p, int64_t numbers) {
  return numbers >= 2 * bf16x2v::size ? load_pairs(p) : load_pairs_n(p, std::max<int64_t>(0, numbers));
}

// Panels of rows along K: squares of slots are transposed in registers, as floats whose bits nobody looks at.
template <class T, bool squares>
inline void pack_pairs_along_k(const PackArgs& a) {
  constexpr int64_t W = bf16x2v::size, P = kPairColumns;
  static_assert(P % W == 0, "a panel is made of whole squares");
  const T* base = (const T*)a.from.data + a.k0;
  const int64_t slots = squares ? slots_of_squares(a.k) : ceil_div(a.k, 2);
  bf16x2* to = (bf16x2*)a.to;
  for (int64_t panel = 0; panel < a.count; panel += P, to += P * slots) {
    // Of rows beyond the last, null: their slots are zeros.
    const T* row[P];
    for (int64_t i = 0; i < P; ++i) row[i] = panel + i < a.count ? base + a.from.row_offset(a.i0 + panel + i) : nullptr;
    for (int64_t j = 0; j < slots; j += W) {
      const int64_t n = std::min<int64_t>(W, slots - j);
      for (int64_t i = 0; i < P; i += W) {
        f32v square[W];
#pragma GCC unroll 16
        for (int64_t r = 0; r < W; ++r)
          square[r] = row[i + r] ? as_floats(load_slots(row[i + r] + 2 * j, a.k - 2 * j)) : set1(0.0f);
        transpose(square);
        bf16x2* const q = to + slot_of_panel<squares>(j, i);
        for (int64_t c = 0; c < n; ++c) store(q + c * (squares ? W : P), as_pairs(square[c]));
      }
    }
  }
}

// Panels of rows across K: two rows are interleaved. As pack_rows_across_k, a few slots at a time, later rows asked for
// early.
template <class T, int P, bool squares>
inline void pack_pairs_across_k(const PackArgs& a) {
  constexpr int64_t kDepth = tuning::kPackDepth, kAhead = tuning::kPackAhead, kLine = 64 / sizeof(T), W = bf16x2v::size;
  const int64_t slots = squares ? slots_of_squares(a.k) : ceil_div(a.k, 2);
  const auto* const base = (const T*)a.from.data + a.i0;
  bf16x2* to = (bf16x2*)a.to;
  for (int64_t j = 0; j < slots; j += kDepth / 2) {
    // Rows that there are, and those that slots want: squares go on with zeros where K has ended.
    const int64_t rows = a.k - 2 * j, depth = std::min(kDepth, 2 * (slots - j));
    const T *row[kDepth], *later[kDepth];
    for (int64_t d = 0; d < kDepth; ++d) {
      // Addresses to be asked for are always some row's.
      const int64_t k = a.k0 + 2 * j + d, last = a.k0 + a.k - 1;
      row[d] = d < rows ? base + a.from.row_offset(k) : nullptr;
      later[d] = base + a.from.row_offset(std::min(k + kAhead, last));
    }
    for (int64_t i = 0; i < a.count; i += P)
      for (int64_t d = 0; d < depth; d += 2) {
        for (int64_t line = 0; line < P; line += kLine) {
          __builtin_prefetch(later[d] + i + line);
          __builtin_prefetch(later[d + 1] + i + line);
        }
        const int64_t s = j + d / 2;
        for (int64_t c = 0; c < P; c += W) {
          const int64_t there = std::min<int64_t>(W, a.count - i - c), wide = std::min<int64_t>(W, P - c);
          const bf16x2v x = there > 0 && row[d]
                                ? interleave(row[d] + i + c, row[d + 1] ? row[d + 1] + i + c : nullptr, there)
                                : as_pairs(set1(0.0f));
          // A's panels have no squares, whatever B's have: with AMX, A is laid out by gemm_amx.inl.h.
          bf16x2* const slot = to + i * slots + (P == kPairColumns ? slot_of_panel<squares>(s, c) : s * P + c);
          wide == W ? store(slot, x) : store_n(slot, x, wide);
        }
      }
  }
}

// Elements that lie apart: gathered as floats, some of all rows of a panel at a time.
template <class T, int P, bool squares>
inline void pack_pairs_any(const PackArgs& a) {
  constexpr int64_t kStage = 128;
  const int64_t step = a.from.col_stride, slots = squares ? slots_of_squares(a.k) : ceil_div(a.k, 2);
  const T* const base = (const T*)a.from.data;
  float stage[P * kStage];
  for (int64_t panel = 0; panel < a.count; panel += P) {
    bf16x2* const to = (bf16x2*)a.to + panel * slots;
    const int64_t rows = std::min<int64_t>(P, a.count - panel);
    for (int64_t j = 0; j < 2 * slots; j += kStage) {
      const int64_t n = std::clamp<int64_t>(a.k - j, 0, kStage), columns = std::min(kStage, 2 * slots - j);
      // Rows and numbers beyond the last are zeros.
      std::fill(stage, stage + P * kStage, 0.0f);
      for (int64_t i = 0; i < rows && !a.across && n > 0; ++i)
        gather_row(base + a.from.row_offset(a.i0 + panel + i) + (a.k0 + j) * step, step, n, stage + i * kStage);
      for (int64_t c = 0; c < n && a.across; ++c) {
        const T* const row = base + a.from.row_offset(a.k0 + j + c) + (a.i0 + panel) * step;
        for (int64_t i = 0; i < rows; ++i) stage[i * kStage + c] = load_one(row + i * step);
      }
      for (int64_t c = 0; c < columns; c += 2)
        for (int64_t i = 0; i < P; ++i) {
          // One by one: elements that lie apart cost more to fetch than this costs.
          const int64_t s = (j + c) / 2, lane = i % bf16x2v::size;
          bf16x2* const slot = to + (squares ? slot_of_panel<true>(s, i - lane) + lane : s * P + i);
          store_one(&slot->first, stage[i * kStage + c]);
          store_one(&slot->second, stage[i * kStage + c + 1]);
        }
    }
  }
}

template <class T>
inline void pack_a_pairs(const PackArgs& a) {
  constexpr int P = kTile.rows;
  a.across&& a.from.col_stride == 1 ? pack_pairs_across_k<T, P, false>(a) : pack_pairs_any<T, P, false>(a);
}
template <class T, bool squares = false>
inline void pack_b_pairs(const PackArgs& a) {
  if (a.from.col_stride != 1) return pack_pairs_any<T, kPairColumns, squares>(a);
  a.across ? pack_pairs_across_k<T, kPairColumns, squares>(a) : pack_pairs_along_k<T, squares>(a);
}

// Rows along K, slot after slot.
template <class T>
inline void lay_out_a_pairs(const PackArgs& a) {
  const int64_t slots = ceil_div(a.k, 2);
  bf16x2* to = (bf16x2*)a.to;
  for (int64_t i = 0; i < a.count; ++i, to += slots) {
    const T* const from = (const T*)a.from.data + a.from.row_offset(a.i0 + i) + a.k0;
    for (int64_t j = 0; j < slots; j += bf16x2v::size)
      store_n(to + j, load_slots(from + 2 * j, a.k - 2 * j), std::min<int64_t>(bf16x2v::size, slots - j));
  }
}

inline void gemm_dot_pairs(const DotArgs& d) { gemm_dot<bf16, bf16x2v>(d); }

template <class T>
inline void gemm_block_pairs(const GemmBlockArgs& g) {
  gemm_block<T, bf16x2v>(g);
}
