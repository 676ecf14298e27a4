// The GEMM engine's blocks of bf16 pairs by AMX (Sapphire Rapids and later): one instruction multiplies a square of 16
// rows by 16 slots with one of 16 slots by 16 columns, as many products as 256 of AVX512-BF16's, with the same numbers
// taken for zero. B's squares follow one another (gemm_pairs.inl.h packs them), and so do A's where it is not read in
// place: rows along K, of which a square has whole lines. What K lacks of whole squares is zeros, which is why A in
// place has none to lack.
#pragma once
#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/gemm_pack.inl.h"
#include "cpu/kernels/gemm_pairs.inl.h"
#include "cpu/kernels/prelude.h"

// Two by two squares are C's in registers.
constexpr int64_t kAmxTileRows = 2 * kSquare;
static_assert(kPairColumns == 2 * kSquare);

// What LDTILECFG reads, of palette 1.
struct alignas(64) SquareShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int square, int64_t of_rows) {
    rows[square] = (uint8_t)of_rows;
    row_bytes[square] = of_rows ? kSquare * sizeof(float) : 0;
  }
};

// Registers 0 to 3 are C's squares, of up to 32 rows, 4 and 5 A's, 6 and 7 B's. Their contents are lost.
inline void shape_squares(int64_t rows) {
  // A register of fewer rows is loaded and multiplied in fewer cycles, and reads no row that is not there.
  const int64_t upper = std::min(kSquare, rows), lower = rows - upper;
  SquareShapes shapes;
  for (int j = 0; j < 2; ++j) {
    shapes.set(j, upper);
    shapes.set(2 + j, lower);
    shapes.set(6 + j, kSquare);
  }
  shapes.set(4, upper);
  shapes.set(5, lower);
  asm volatile("" ::: "memory");  // gcc's intrinsic does not tell that all of it is read
  _tile_loadconfig(&shapes);
}

// Up to 32 rows of A times a panel of B, or times its first half, over `k` slots. Squares of A are a_step slots apart.
template <bool lower, bool wide>
inline void multiply_squares(int64_t k, const bf16x2* a, int64_t a_row, int64_t a_step, const bf16x2* b, float* tile,
                             bool add, Ahead& ahead) {
  constexpr int64_t N = kPairColumns, kRow = N * sizeof(float), kLine = kSquare * sizeof(bf16x2);
  // Two by two squares of sums use each loaded square twice: with one by one there would be two loads to a product.
  const int64_t a_bytes = a_row * (int64_t)sizeof(bf16x2);
  float* const down = tile + kSquare * N;
  if (add) {
    // Sums of the chain before, from a tile in L1 or L2.
    _tile_loadd(0, tile, kRow);
    if constexpr (wide) _tile_loadd(1, tile + kSquare, kRow);
    if constexpr (lower) _tile_loadd(2, down, kRow);
    if constexpr (lower && wide) _tile_loadd(3, down + kSquare, kRow);
  } else {
    _tile_zero(0);
    if constexpr (wide) _tile_zero(1);
    if constexpr (lower) _tile_zero(2);
    if constexpr (lower && wide) _tile_zero(3);
  }
  // What most blocks are; the last rows and columns take the loop below, whose loads are waited for.
  if constexpr (lower && wide) {
    // The next squares are asked for as soon as a register is free, beside products that need none of them.
    if (k > 0) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, kLine);
      _tile_loadd(7, b + kSquare * kSquare, kLine);
      _tile_loadd(5, a + kSquare * a_row, a_bytes);
      for (; k > kSquare; k -= kSquare) {
        a += a_step;
        b += kSquare * N;
        // A few lines between products, never a burst.
        ahead.ask();
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, a, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b, kLine);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(5, a + kSquare * a_row, a_bytes);
        _tile_loadd(7, b + kSquare * kSquare, kLine);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    for (; k > 0; k -= kSquare, a += a_step, b += kSquare * N) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, kLine);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (wide) {
        _tile_loadd(7, b + kSquare * kSquare, kLine);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (lower) {
        _tile_loadd(5, a + kSquare * a_row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
  }
  _tile_stored(0, tile, kRow);
  if constexpr (wide) _tile_stored(1, tile + kSquare, kRow);
  if constexpr (lower) _tile_stored(2, down, kRow);
  if constexpr (lower && wide) _tile_stored(3, down + kSquare, kRow);
}

// Rows [begin, end) of a block's A, whole tiles or less than one, times columns [left, right) of B, of K from k on the
// next `depth` slots.
inline void multiply_rows(const GemmBlockArgs& g, int64_t begin, int64_t end, int64_t left, int64_t right, int64_t k,
                          int64_t depth, Ahead& ahead) {
  constexpr int64_t R = kAmxTileRows, N = kPairColumns;
  // As gemm_block's tiles: by panels of B, in each of them by rows of A.
  const int64_t down = ceil_div(g.a_count, R), a_step = kSquare * g.a_k;
  const bool add = g.continues || k > 0, lower = end - begin > kSquare;
  for (int64_t i = begin / R; i < ceil_div(end, R); ++i) {
    const bf16x2* const a = (const bf16x2*)g.a + i * g.a_panel + k * g.a_k;
    for (int64_t j = left; j < right; j += N) {
      const bf16x2* const panel = (const bf16x2*)g.b + j * g.k + k * N;
      const bool wide = g.b_count - j > kSquare;
      float* const tile = (float*)g.tiles + (j / N * down + i) * R * N;
      if (lower)
        wide ? multiply_squares<true, true>(depth, a, g.a_row, a_step, panel, tile, add, ahead)
             : multiply_squares<true, false>(depth, a, g.a_row, a_step, panel, tile, add, ahead);
      else
        wide ? multiply_squares<false, true>(depth, a, g.a_row, a_step, panel, tile, add, ahead)
             : multiply_squares<false, false>(depth, a, g.a_row, a_step, panel, tile, add, ahead);
    }
  }
}

// As gemm_block_short: some columns of a tile's rows at a time.
template <class T>
inline void gemm_block_amx_short(const GemmBlockArgs& g, Ahead& ahead) {
  constexpr int64_t R = kAmxTileRows, N = kPairColumns;
  const int64_t down = ceil_div(g.a_count, R);
  for (int64_t i = 0; i < g.a_count; i += R) {
    const int64_t rows = std::min(R, g.a_count - i);
    // The shape changes for the last rows alone.
    if (i == 0 || rows < R) shape_squares(rows);
    for (int64_t left = 0; left < g.b_count; left += tuning::kAmxShortColumns) {
      const int64_t right = std::min(g.b_count, left + tuning::kAmxShortColumns);
      multiply_rows(g, i, i + rows, left, right, 0, g.k, ahead);
      for (int64_t j = left; j < right; j += N)
        epilogue<T>((const float*)g.tiles + (j / N * down + i / R) * R * N, N, rows, std::min(N, g.b_count - j),
                    g.a_index + i, g.b_index + j, g.first, g.last, g.epilogue);
    }
  }
}

// As gemm_block, of a K in whole squares. Rows beyond whole tiles come last, since they change the squares' shapes.
template <class T>
inline void gemm_block_amx(const GemmBlockArgs& g) {
  constexpr int64_t R = kAmxTileRows;
  const int64_t whole = g.a_count / R * R;
  Ahead ahead(g.next, std::max<int64_t>(1, whole / R * (g.b_count / kPairColumns) * (g.k / kSquare)));
  if (g.k <= tuning::kShortK && !g.transposed && !g.continues && !g.continued) {
    gemm_block_amx_short<T>(g, ahead);
    // The system saves and restores eight KiB of registers as long as they are in use.
    return _tile_release();
  }
  for (int64_t k = 0; k == 0 || k < g.k; k += g.chain) {
    const int64_t depth = std::min(g.chain, g.k - k);
    if (whole > 0) {
      shape_squares(R);
      multiply_rows(g, 0, whole, 0, g.b_count, k, depth, ahead);
    }
    if (whole < g.a_count) {
      shape_squares(g.a_count - whole);
      multiply_rows(g, whole, g.a_count, 0, g.b_count, k, depth, ahead);
    }
  }
  _tile_release();
  if (!g.continued) finish_block<T, R>(g);
}

// A's rows for AMX: of each 32 of them a square's slots, row after row, then the next. Slots beyond the last are zero.
template <class T>
inline void lay_out_a_amx(const PackArgs& a) {
  constexpr int64_t R = kAmxTileRows;
  const int64_t slots = slots_of_squares(a.k);
  for (int64_t i = 0; i < a.count; ++i) {
    const T* const from = (const T*)a.from.data + a.from.row_offset(a.i0 + i) + a.k0;
    // Where tile i / R begins, and in its squares the row.
    bf16x2* const to = (bf16x2*)a.to + i / R * R * slots + i % R * kSquare;
    for (int64_t j = 0; j < slots; j += kSquare) store(to + j * R, load_slots(from + 2 * j, a.k - 2 * j));
  }
}

// The same of rows across K: squares of interleaved rows are transposed.
template <class T>
inline void pack_across_k_amx(const PackArgs& a) {
  constexpr int64_t R = kAmxTileRows;
  const int64_t slots = slots_of_squares(a.k);
  const T* const base = (const T*)a.from.data + a.i0;
  for (int64_t j = 0; j < slots; j += kSquare) {
    // Null beyond the last of K: zeros.
    const T *first[kSquare], *second[kSquare];
    for (int64_t s = 0; s < kSquare; ++s) {
      const int64_t k = 2 * (j + s);
      first[s] = k < a.k ? base + a.from.row_offset(a.k0 + k) : nullptr;
      second[s] = k + 1 < a.k ? base + a.from.row_offset(a.k0 + k + 1) : nullptr;
    }
    for (int64_t i = 0; i < a.count; i += kSquare) {
      const int64_t rows = std::min(kSquare, a.count - i);
      f32v square[kSquare];
#pragma GCC unroll 16
      for (int64_t s = 0; s < kSquare; ++s)
        square[s] =
            first[s] ? as_floats(interleave(first[s] + i, second[s] ? second[s] + i : nullptr, rows)) : set1(0.0f);
      transpose(square);
      bf16x2* const to = (bf16x2*)a.to + i / R * R * slots + j * R + i % R * kSquare;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSquare; ++r)
        // Rows that are not there have no place: the last tile is as short as its rows.
        if (r < rows) store(to + r * kSquare, as_pairs(square[r]));
    }
  }
}

// The same of elements that lie apart, gathered as floats.
template <class T>
inline void pack_any_amx(const PackArgs& a) {
  constexpr int64_t R = kAmxTileRows, kNumbers = 2 * kSquare;
  const int64_t step = a.from.col_stride, slots = slots_of_squares(a.k);
  const T* const base = (const T*)a.from.data;
  for (int64_t i = 0; i < a.count; ++i)
    for (int64_t j = 0; j < slots; j += kSquare) {
      const int64_t numbers = std::clamp<int64_t>(a.k - 2 * j, 0, kNumbers);
      float stage[kNumbers] = {};
      if (a.across)
        for (int64_t c = 0; c < numbers; ++c)
          stage[c] = load_one(base + a.from.row_offset(a.k0 + 2 * j + c) + (a.i0 + i) * step);
      else if (numbers > 0)
        gather_row(base + a.from.row_offset(a.i0 + i) + (a.k0 + 2 * j) * step, step, numbers, stage);
      store((bf16x2*)a.to + i / R * R * slots + j * R + i % R * kSquare, load_pairs(stage));
    }
}

template <class T>
inline void pack_a_amx(const PackArgs& a) {
  a.across&& a.from.col_stride == 1 ? pack_across_k_amx<T>(a) : pack_any_amx<T>(a);
}
