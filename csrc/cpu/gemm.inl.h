// The GEMM engine's single-threaded parts: packing, the micro-kernel and its epilogue (Goto and van de Geijn, "Anatomy
// of high-performance matrix multiplication", 2008). Half types are widened while packing, so one micro-kernel per
// accumulator type serves them all. Loops and threads are in gemm.cpp. kTile is the ISA's register tile.

template <class V>
constexpr int64_t kTileColumns = kTile.vectors * V::size;

// ---- packing -------------------------------------------------------------------------------------------------------

// One panel: to[k * P + i] = operand(i0 + i, k0 + k) for i < count <= P, zero for the other i.
// Rows of memory run along k: blocks of V::size rows are transposed in registers.
template <class T, int P>
inline void pack_rows_along_k(const MatrixView& m, int64_t i0, int64_t count, int64_t k0, int64_t k, acc_t<T>* to) {
  using V = vec_t<T>;
  constexpr int64_t W = V::size;
  const T* base = (const T*)m.data;
  if constexpr (W > 1 && std::is_same_v<V, f32v>) {
    for (int64_t i = 0; i < P; i += W) {
      // A panel that is no multiple of the vector: its last block's vectors reach into the next k, which is written
      // afterwards; at the very end they are cut.
      const int64_t width = std::min<int64_t>(W, P - i), rows = std::min<int64_t>(W, count - i);
      const T* row[W];
      for (int64_t r = 0; r < W; ++r) row[r] = r < rows ? base + m.row_offset(i0 + i + r) + k0 : nullptr;
      for (int64_t j = 0; j < k; j += W) {
        const int64_t n = std::min<int64_t>(W, k - j);
        V block[W];
        for (int64_t r = 0; r < W; ++r)
          block[r] = !row[r] ? set1(acc_t<T>(0)) : n == W ? load(row[r] + j) : load_n(row[r] + j, n);
        transpose(block);
        acc_t<T>* q = to + j * P + i;
        for (int64_t c = 0; c < n; ++c, q += P) {
          if (width == W)
            store(q, block[c]);
          else
            store_n(q, block[c], width);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < P; ++i) {
      const T* row = i < count ? base + m.row_offset(i0 + i) + k0 : nullptr;
      for (int64_t j = 0; j < k; ++j) to[j * P + i] = row ? load_one(row + j) : acc_t<T>(0);
    }
  }
}

// Rows of memory run along i: each k is a straight copy. `rows_are_k` tells which index selects a row of memory.
template <class T, int P>
inline void pack_rows_along_i(const MatrixView& m, bool rows_are_k, int64_t i0, int64_t count, int64_t k0, int64_t k,
                              acc_t<T>* to) {
  using V = vec_t<T>;
  const T* base = (const T*)m.data;
  for (int64_t j = 0; j < k; ++j, to += P) {
    const T* from = base + (rows_are_k ? m.row_offset(k0 + j) + i0 : (k0 + j) * m.col_stride + m.row_offset(i0));
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) store(to + i, load(from + i));
    if (i < count) {
      store_n(to + i, load_n(from + i, count - i), count - i);
      i = count;
    }
    for (; i < P; ++i) to[i] = 0;
  }
}

template <class T, int P>
inline void pack_panels(const PackArgs& a) {
  const MatrixView& m = a.from;
  acc_t<T>* to = (acc_t<T>*)a.to;
  for (int64_t i = 0; i < a.count; i += P, to += P * a.k) {
    const int64_t i0 = a.i0 + i, count = std::min<int64_t>(P, a.count - i);
    if (!a.transposed && m.col_stride == 1) {
      pack_rows_along_k<T, P>(m, i0, count, a.k0, a.k, to);
    } else if (a.transposed && m.col_stride == 1) {
      pack_rows_along_i<T, P>(m, true, i0, count, a.k0, a.k, to);
    } else if (!a.transposed && m.inner == 1 && m.outer_stride == 1) {
      pack_rows_along_i<T, P>(m, false, i0, count, a.k0, a.k, to);
    } else {
      const T* base = (const T*)m.data;
      for (int64_t j = 0; j < a.k; ++j)
        for (int64_t r = 0; r < P; ++r) {
          const int64_t row = a.transposed ? a.k0 + j : i0 + r, col = a.transposed ? i0 + r : a.k0 + j;
          to[j * P + r] = r < count ? load_one(base + m.row_offset(row) + col * m.col_stride) : acc_t<T>(0);
        }
    }
  }
}
template <class T>
inline void pack_a(const PackArgs& a) {
  pack_panels<T, kTile.rows>(a);
}
template <class T>
inline void pack_b(const PackArgs& a) {
  pack_panels<T, kTileColumns<vec_t<T>>>(a);
}

// ---- epilogue ------------------------------------------------------------------------------------------------------

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh(x) = x (1 + tanh(half of it)) / 2 = x sigmoid(it).
constexpr double kGeluTanhLinear = 1.5957691216057308, kGeluTanhCubic = 0.044715 * kGeluTanhLinear;
template <class V>
inline V gelu_tanh_argument(V x) {
  using A = typename V::scalar;
  return x * fma(x * x, set1(A(kGeluTanhCubic)), set1(A(kGeluTanhLinear)));
}

template <Activation act, class V>
inline V activate(V x) {
  using A = typename V::scalar;
  if constexpr (act == Activation::relu)
    return max(set1(A(0)), x);  // in this order NaN gets through
  else if constexpr (act == Activation::gelu)
    return x * normal_cdf(x, gaussian(x));
  else if constexpr (act == Activation::gelu_tanh)
    return x * sigmoid(gelu_tanh_argument(x));
  else if constexpr (act == Activation::silu)
    return x * sigmoid(x);
  else if constexpr (act == Activation::sigmoid)
    return sigmoid(x);
  else if constexpr (act == Activation::tanh)
    return tanh(x);
  else
    return x;
}

template <class T, Activation act>
inline void finish_tile(const acc_t<T>* tile, int64_t tile_stride, int64_t rows, int64_t cols, int64_t row, int64_t col,
                        bool first, const Epilogue& e) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const T* bias = e.bias ? (const T*)e.bias + col : nullptr;
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride) {
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
#define RF_CASE(act)    \
  case Activation::act: \
    return finish_tile<T, Activation::act>(tile, tile_stride, rows, cols, row, col, first, e)
    RF_CASE(none);
    RF_CASE(relu);
    RF_CASE(gelu);
    RF_CASE(gelu_tanh);
    RF_CASE(silu);
    RF_CASE(sigmoid);
    RF_CASE(tanh);
#undef RF_CASE
  }
}

// ---- packed product ------------------------------------------------------------------------------------------------

// tile = sum over k of a column of A's panel times a row of B's panel, all of it in registers.
template <class V>
inline void micro_kernel(int64_t k, const scalar_t<V>* a, const scalar_t<V>* b, scalar_t<V>* tile) {
  constexpr int M = kTile.rows, N = kTile.vectors;
  V acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = set1(scalar_t<V>(0));
  for (; k > 0; --k, a += M, b += N * V::size) {
    V row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = load(b + j * V::size);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      V x = set1(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(tile + (i * N + j) * V::size, acc[i][j]);
}

// Brings a tile of C that is about to be read and written towards L1 while its products are summed.
template <class T>
inline void prefetch_tile(const Epilogue& e, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* c = (const T*)e.c + (row + i) * e.c_stride + col;
    __builtin_prefetch(c, 1);
    __builtin_prefetch(c + cols - 1, 1);
  }
}

// A block of C. A's panel stays in L1 while B's panels stream past it from L2; rows of C are written along.
template <class T>
inline void gemm_block(const GemmBlockArgs& g) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t M = kTile.rows, N = kTileColumns<V>;
  alignas(64) A tile[M * N];
  for (int64_t i = 0; i < g.m; i += M) {
    const int64_t rows = std::min(M, g.m - i);
    for (int64_t j = 0; j < g.n; j += N) {
      const int64_t cols = std::min(N, g.n - j);
      prefetch_tile<T>(g.epilogue, g.row + i, g.column + j, rows, cols);
      micro_kernel<V>(g.k, (const A*)g.a + i * g.k, (const A*)g.b + j * g.k, tile);
      epilogue<T>(tile, N, rows, cols, g.row + i, g.column + j, g.first, g.last, g.epilogue);
    }
  }
}
