// The GEMM engine's micro-kernel and epilogue (Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008). Of the two operands the longer one, A, is read where it lies, an element at a time; the
// other, B, comes in packed panels. C is therefore computed as it is or transposed. gemm_packed.cpp has loops and
// threads.
#pragma once
#include "cpu/kernels/activation.inl.h"
#include "cpu/kernels/gemm_pack.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// Vectors that follow one another; a type may have an instruction for them.
template <class T, class V, int N>
inline void store_all(T* to, const V (&x)[N]) {
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) store(to + j * V::size, x[j]);
}

// ---- epilogue ------------------------------------------------------------------------------------------------------

template <class T, Activation act>
inline void finish_tile(const acc_t<T>* tile, int64_t tile_stride, int64_t rows, int64_t cols, int64_t row, int64_t col,
                        bool first, const Epilogue& e) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const T* bias = e.bias ? (const T*)e.bias + col : nullptr;
  // A whole tile, and nothing to ask for each vector of it: what most are.
  if (cols == kTileColumns<V> && first && !e.preactivation && e.bias_rows == 1) {
    // The bias stays in registers for all of the tile's rows.
    V b[kTile.vectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTile.vectors; ++j) b[j] = bias ? load(bias + j * V::size) : set1(A(0));
    T* c = (T*)e.c + row * e.c_stride + col;
    for (int64_t i = 0; i < rows; ++i, tile += tile_stride, c += e.c_stride) {
      V x[kTile.vectors];
#pragma GCC unroll 4
      for (int j = 0; j < kTile.vectors; ++j) x[j] = activate<act>(load(tile + j * V::size) + b[j]);
      store_all(c, x);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride) {
    // phm_linear's: rows of C are parts of an output, each with its part of the bias.
    if (bias && e.bias_rows > 1) bias = (const T*)e.bias + (row + i) % e.bias_rows * e.bias_stride + col;
    T* c = (T*)e.c + (row + i) * e.c_stride + col;
    T* z = e.preactivation ? (T*)e.preactivation + (row + i) * e.c_stride + col : nullptr;
    const A* partial = (const A*)e.partial + (row + i) * e.partial_stride + col;
    int64_t j = 0;
    for (; j + V::size <= cols; j += V::size) {
      V x = load(tile + j);
      if (!first) x = x + load(partial + j);
      if (bias) x = x + load(bias + j);
      if (z) store(z + j, x);
      store(c + j, activate<act>(x));
    }
    if (j < cols) {
      // Masked stores: what lies beyond is another thread's, or the caller's between C's rows.
      const int64_t n = cols - j;
      V x = load_n(tile + j, n);
      if (!first) x = x + load_n(partial + j, n);
      if (bias) x = x + load_n(bias + j, n);
      if (z) store_n(z + j, x, n);
      store_n(c + j, activate<act>(x), n);
    }
  }
}

// Sums of a K block that is not the last.
template <class A>
inline void keep_tile(const A* tile, int64_t tile_stride, int64_t rows, int64_t cols, int64_t row, int64_t col,
                      bool first, const Epilogue& e) {
  using V = vec_t<A>;
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride) {
    // Blocks of K are added one after the other, whoever multiplies them: the same bits with any number of threads.
    A* partial = (A*)e.partial + (row + i) * e.partial_stride + col;
    int64_t j = 0;
    for (; j + V::size <= cols; j += V::size)
      store(partial + j, first ? load(tile + j) : load(tile + j) + load(partial + j));
    if (j < cols) {
      V x = load_n(tile + j, cols - j);
      store_n(partial + j, first ? x : x + load_n(partial + j, cols - j), cols - j);
    }
  }
}

template <class T>
inline void epilogue(const acc_t<T>* tile, int64_t tile_stride, int64_t rows, int64_t cols, int64_t row, int64_t col,
                     bool first, bool last, const Epilogue& e) {
  if (!last) return keep_tile(tile, tile_stride, rows, cols, row, col, first, e);
  switch (e.activation) {
#define RF_CASE(act, saved) \
  case Activation::act:     \
    return finish_tile<T, Activation::act>(tile, tile_stride, rows, cols, row, col, first, e);
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}

// ---- packed product ------------------------------------------------------------------------------------------------

// R rows of A times a panel of B, for one chain of additions, all of it in registers. Element (i, k) of A is
// a[i * a_row + k * a_k], row k of the panel b + k * b_k. P is a vector of factors, V of sums: the same type, or pairs
// of bf16 and floats (gemm_pairs.inl.h). A function of its own: inlined, its pointers would be spilled inside of the
// loop.
template <class P, class V, int R>
[[gnu::noinline]] void micro_kernel(int64_t k, const scalar_t<P>* a, int64_t a_row, int64_t a_k, const scalar_t<P>* b,
                                    int64_t b_k, scalar_t<V>* tile, int64_t tile_row, bool add) {
  // R * N sums, none of which waits for another: as many as hide the latency of two fma a cycle, and as registers hold
  // beside a row of the panel.
  constexpr int N = kTile.vectors, kQuads = (R + 3) / 4;
  V acc[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = set1(scalar_t<V>(0));
  // Four rows to a pointer: their distances fit addressing modes.
  const scalar_t<P>* quad[kQuads];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) quad[q] = a + 4 * q * a_row;
  for (; k > 0; --k, b += b_k) {
    // Loads are the second bound: N of the panel and R broadcasts are R * N fma's, 8 loads beside 12 of vectors of 8.
    P row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = load(b + j * P::size);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      P x = set1(quad[i / 4][i % 4 * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) quad[q] += a_k;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i, tile += tile_row)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      // To a tile in L1 and not to C, whose lines would be waited for.
      scalar_t<V>* to = tile + j * V::size;
      store(to, add ? load(to) + acc[i][j] : acc[i][j]);
    }
}

// The tile of exactly `rows` rows.
template <class P, class V, int R>
inline void multiply_tile(int64_t rows, int64_t k, const scalar_t<P>* a, int64_t a_row, int64_t a_k,
                          const scalar_t<P>* b, int64_t b_k, scalar_t<V>* tile, int64_t tile_row, bool add) {
  if constexpr (R > 1) {
    // The last rows have an instance of their own: rows of zeros would cost as much as others.
    if (rows < R) return multiply_tile<P, V, R - 1>(rows, k, a, a_row, a_k, b, b_k, tile, tile_row, add);
  }
  micro_kernel<P, V, R>(k, a, a_row, a_k, b, b_k, tile, tile_row, add);
}

// Columns of a tile become rows of a strip, which has room for whole vectors beyond its last column.
template <class V>
inline void transpose_tile(const scalar_t<V>* tile, int64_t rows, scalar_t<V>* strip, int64_t stride) {
  constexpr int64_t W = V::size, N = kTileColumns<V>;
  if constexpr (W > 1) {
    for (int64_t i = 0; i < rows; i += W)
      for (int64_t j = 0; j < N; j += W) {
        // Squares in registers: to store element by element would touch a line for each.
        V square[W];
#pragma GCC unroll 16
        for (int64_t r = 0; r < W; ++r) square[r] = i + r < rows ? load(tile + (i + r) * N + j) : set1(scalar_t<V>(0));
        transpose(square);
#pragma GCC unroll 16
        for (int64_t c = 0; c < W; ++c) store(strip + (j + c) * stride + i, square[c]);
      }
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < N; ++j) strip[j * stride + i] = tile[i * N + j];
  }
}

// Brings a tile of C that will be read and written towards the core while its products are summed.
template <class T>
inline void prefetch_tile(const Epilogue& e, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* c = (const T*)e.c + (row + i) * e.c_stride + col;
    // A tile's row begins anywhere in a line, and then reaches into the next.
    __builtin_prefetch(c, 1);
    __builtin_prefetch(c + cols - 1, 1);
  }
}

// Asks L2 for part i of n of the memory that comes next.
template <class A>
inline void prefetch_part(const A* from, int64_t count, int64_t i, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(A);
  const int64_t lines = (count + kLine - 1) / kLine, end = lines * (i + 1) / n;
  for (int64_t line = lines * i / n; line < end; ++line) __builtin_prefetch(from + line * kLine, 0, 2);
}

// Asks L2 for memory a few lines at a time: all at once would hold up what is being loaded.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* at;
  int64_t rows, row_lines, skip, line, a_time;

  Ahead(const Region& r, int64_t times)
      : at((const char*)r.from), rows(r.rows), row_lines((r.bytes + kLine - 1) / kLine), line(0) {
    skip = r.stride - row_lines * kLine;
    a_time = (rows * row_lines + times - 1) / times;
  }
  void ask() {
    for (int64_t n = a_time; n > 0 && rows > 0; --n, at += kLine) {
      __builtin_prefetch(at, 0, 2);
      if (++line == row_lines) {
        line = 0;
        at += skip;
        --rows;
      }
    }
  }
};

// A block of C whose K is so short that storing C takes longer than multiplying: a tile's rows at a time, all along the
// block, from the registers through L1 to C.
template <class T, class P>
inline void gemm_block_short(const GemmBlockArgs& g) {
  using V = vec_t<T>;
  using F = scalar_t<P>;
  constexpr int64_t R = kTile.rows, N = kTileColumns<V>;
  acc_t<T>* tiles = (acc_t<T>*)g.tiles;
  for (int64_t i = 0; i < g.a_count; i += R) {
    // All products of the rows first, then their epilogue, so that C is written along its rows.
    const int64_t rows = std::min(R, g.a_count - i);
    for (int64_t j = 0; j < g.b_count; j += N)
      multiply_tile<P, V, R>(rows, g.k, (const F*)g.a + i / R * g.a_panel, g.a_row, g.a_k, (const F*)g.b + j * g.k, N,
                             tiles + j * R, N, false);
    for (int64_t j = 0; j < g.b_count; j += N)
      epilogue<T>(tiles + j * R, N, rows, std::min(N, g.b_count - j), g.a_index + i, g.b_index + j, g.first, g.last,
                  g.epilogue);
  }
}

// Turns a block's sums, in tiles of R rows, into C.
template <class T, int64_t R>
inline void finish_block(const GemmBlockArgs& g) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t N = kTileColumns<V>;
  const A* const tiles = (const A*)g.tiles;
  const int64_t down = (g.a_count + R - 1) / R;
  if (!g.transposed) {
    // Tiles lie by panels, but C is finished row by row, where its lines follow one another.
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < g.b_count; j += N)
        epilogue<T>(tiles + (j / N * down + i) * R * N, N, std::min(R, g.a_count - i * R), std::min(N, g.b_count - j),
                    g.a_index + i * R, g.b_index + j, g.first, g.last, g.epilogue);
    return;
  }
  // A strip of C's rows; a vector may reach beyond the last of its tiles.
  constexpr int64_t kTiles = tuning::kStripTiles * kTile.rows / R, kStride = kTiles * R + 16;
  alignas(64) A strip[N * kStride];
  for (int64_t j = 0; j < g.b_count; j += N)
    for (int64_t s = 0; s < down; s += kTiles) {
      const int64_t end = std::min(down, s + kTiles);
      for (int64_t i = s; i < end; ++i)
        transpose_tile<V>(tiles + (j / N * down + i) * R * N, std::min(R, g.a_count - i * R), strip + (i - s) * R,
                          kStride);
      epilogue<T>(strip, kStride, std::min(N, g.b_count - j), std::min(end * R, g.a_count) - s * R, g.b_index + j,
                  g.a_index + s * R, g.first, g.last, g.epilogue);
    }
}

// A block of C, or of C transposed. One chain of a panel of B stays in L1 while A's rows pass by from L2; the tiles'
// sums wait in scratch until the last chain, since tiles of C itself would lie on as many pages as they have rows.
template <class T, class P = vec_t<T>>
inline void gemm_block(const GemmBlockArgs& g) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  using F = scalar_t<P>;
  static_assert(P::size == V::size && sizeof(F) == sizeof(A), "a vector of factors is as wide as one of sums");
  constexpr int64_t R = kTile.rows, N = kTileColumns<V>;
  if (g.k <= tuning::kShortK && !g.transposed && !g.continues && !g.continued) return gemm_block_short<T, P>(g);
  const F *a = (const F*)g.a, *b = (const F*)g.b;
  A* tiles = (A*)g.tiles;
  const int64_t down = (g.a_count + R - 1) / R;
  const auto& e = g.epilogue;
  Ahead ahead(g.next, std::max<int64_t>(1, down * ((g.b_count + N - 1) / N) * ((g.k + g.chain - 1) / g.chain)));
  // Once for an empty K too: C is written all the same.
  for (int64_t k = 0; k == 0 || k < g.k; k += g.chain) {
    const int64_t depth = std::min(g.chain, g.k - k);
    for (int64_t j = 0; j < g.b_count; j += N) {
      const F* panel = b + j * g.k + k * N;
      const int64_t cols = std::min(N, g.b_count - j);
      // The panel after this one, or after the last panel the next chain of the first.
      const int64_t next_j = j + N < g.b_count ? j + N : 0, next_k = next_j ? k : k + g.chain;
      const F* next = g.b_is_far && next_k < g.k ? b + next_j * g.k + next_k * N : nullptr;
      for (int64_t i = 0; i < down; ++i) {
        const int64_t rows = std::min(R, g.a_count - i * R);
        // C is not touched before the last chain is done.
        if (!g.continued && k + g.chain >= g.k)
          g.transposed ? prefetch_tile<T>(e, g.b_index + j, g.a_index + i * R, cols, rows)
                       : prefetch_tile<T>(e, g.a_index + i * R, g.b_index + j, rows, cols);
        if (next) prefetch_part(next, std::min(g.chain, g.k - next_k) * N, i, down);
        ahead.ask();
        multiply_tile<P, V, R>(rows, depth, a + i * g.a_panel + k * g.a_k, g.a_row, g.a_k, panel, N,
                               tiles + (j / N * down + i) * R * N, N, g.continues || k > 0);
      }
    }
  }
  if (!g.continued) finish_block<T, R>(g);
}
