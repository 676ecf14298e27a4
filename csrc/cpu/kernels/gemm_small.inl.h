// Products that packing does not pay for, on operands where they lie.
#pragma once
#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/gemm_lanes.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// ---- a few rows against many, both adjacent along K ----------------------------------------------------------------

// A vector of factors along K: widened numbers of T, or pairs of bf16 (gemm_pairs.inl.h).
template <class T, class F>
constexpr bool kPairs = !std::is_same_v<F, vec_t<T>>;
template <class T, class F>
constexpr int64_t kNumbers = kPairs<T, F> ? 2 * F::size : F::size;
template <class T, class F>
inline F load_factors(const T* p) {
  if constexpr (kPairs<T, F>)
    return load_pairs(p);
  else
    return load(p);
}
template <class T, class F>
inline F load_factors_n(const T* p, int64_t n) {
  if constexpr (kPairs<T, F>)
    return load_pairs_n(p, n);
  else
    return load_n(p, n);
}

// The last n factors of a row, a vector at most, zeros behind them; `readable` where a whole vector may be read.
template <class T, class F>
inline F load_last(const T* p, int64_t n, bool readable) {
  if (n >= kNumbers<T, F>) return load_factors<T, F>(p);
  if constexpr (kPairs<T, F>)
    return load_pairs_n(p, n);
  else
    return readable ? first_n(load(p), n, set1(acc_t<T>(0))) : load_n(p, n);
}

// out[r * out_many + q * out_few] = many_r . few_q: R x Q accumulators along K, so each loaded vector is used R or Q
// times. `readable`: many's rows may be read beyond k to a whole vector.
template <class T, class F, int R, int Q>
[[gnu::noinline]] void dot_tile(const T* const* many, const T* const* few, int64_t k, bool readable, acc_t<T>* out,
                                int64_t out_many, int64_t out_few) {
  using V = vec_t<T>;
  constexpr int64_t W = kNumbers<T, F>;
  for (int64_t begin = 0; begin == 0 || begin < k; begin += tuning::kChain * W) {
    // A lane adds up kChain products at most before its sum joins the rest: errors grow with the length of a chain.
    const int64_t end = std::min<int64_t>(k, begin + tuning::kChain * W);
    V acc[R][Q];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) acc[r][q] = set1(acc_t<T>(0));
    int64_t j = begin;
    for (; j + W <= end; j += W) {
      F x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = load_factors<T, F>(many[r] + j);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        F w = load_factors<T, F>(few[q] + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][q] = fma(x[r], w, acc[r][q]);
      }
    }
    // What is left of K, with zeros behind it that add nothing.
    if (j < end) {
      F x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = load_last<T, F>(many[r] + j, end - j, readable);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        F w = load_factors_n<T, F>(few[q] + j, end - j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][q] = fma(x[r], w, acc[r][q]);
      }
    }
    // Sums across lanes, a vector of them at a time: one by one they would take longer than the products of a short K.
    acc_t<T> sums[R * Q];
    constexpr int kGrouped = R * Q / V::size * V::size;
#pragma GCC unroll 8
    for (int i = 0; i < kGrouped; i += V::size) {
      V group[V::size];
#pragma GCC unroll 16
      for (int j = 0; j < V::size; ++j) group[j] = acc[(i + j) / Q][(i + j) % Q];
      store(sums + i, reduce_each(group));
    }
#pragma GCC unroll 16
    for (int i = kGrouped; i < R * Q; ++i) sums[i] = reduce_add(acc[i / Q][i % Q]);
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < Q; ++q) {
        acc_t<T>& sum = out[r * out_many + q * out_few];
        sum = begin == 0 ? sums[r * Q + q] : sum + sums[r * Q + q];
      }
  }
}

template <class T, class F, int R>
inline void dot_rows(const T* const* many, const T* const* few, int64_t few_rows, int64_t k, bool readable,
                     acc_t<T>* out, int64_t out_many, int64_t out_few) {
  // R rows by four others are as many sums as registers hold.
  int64_t q = 0;
  for (; q + 4 <= few_rows; q += 4)
    dot_tile<T, F, R, 4>(many, few + q, k, readable, out + q * out_few, out_many, out_few);
  switch (few_rows - q) {
    case 3:
      return dot_tile<T, F, R, 3>(many, few + q, k, readable, out + q * out_few, out_many, out_few);
    case 2:
      return dot_tile<T, F, R, 2>(many, few + q, k, readable, out + q * out_few, out_many, out_few);
    case 1:
      return dot_tile<T, F, R, 1>(many, few + q, k, readable, out + q * out_few, out_many, out_few);
  }
}

// The same for rows of up to G vectors at one distance, with the same bits: a lane's number of rows at a time, whose
// sums come out of the registers together. Rows are read in the order in which they lie, and factors stay in registers.
template <class T, class F, int G>
inline void dot_short_rows(const T* many, int64_t stride, int64_t rows, int64_t whole, const T* few, int64_t k,
                           acc_t<T>* out) {
  using V = vec_t<T>;
  constexpr int64_t R = V::size, W = kNumbers<T, F>;
  const int64_t last = k - (G - 1) * W;
  // The one row of the few stays in registers for all of the many.
  F w[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) w[g] = load_last<T, F>(few + g * W, k - g * W, false);
  for (int64_t r = 0; r + R <= rows; r += R) {
    const T* row = many + r * stride;
    V acc[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i, row += stride) {
      acc[i] = set1(acc_t<T>(0));
#pragma GCC unroll 4
      for (int g = 0; g < G - 1; ++g) acc[i] = fma(load_factors<T, F>(row + g * W), w[g], acc[i]);
      F x = load_last<T, F>(row + (G - 1) * W, last, r + i < whole);
      acc[i] = fma(x, w[G - 1], acc[i]);
    }
    store(out + r, reduce_each(acc));
  }
}
template <class T, class F>
inline void dot_short_rows(const T* many, int64_t stride, int64_t rows, int64_t whole, const T* few, int64_t k,
                           acc_t<T>* out) {
  switch (ceil_div(k, kNumbers<T, F>)) {
    case 1:
      return dot_short_rows<T, F, 1>(many, stride, rows, whole, few, k, out);
    case 2:
      return dot_short_rows<T, F, 2>(many, stride, rows, whole, few, k, out);
    case 3:
      return dot_short_rows<T, F, 3>(many, stride, rows, whole, few, k, out);
    case 4:
      return dot_short_rows<T, F, 4>(many, stride, rows, whole, few, k, out);
  }
}

// Reads a byte of each line of some rows in the order in which they lie. Dot products read several rows side by side,
// which the hardware's prefetchers do not follow (Zen 5: 16 GB/s a core instead of 40; prefetch instructions changed
// nothing).
template <class T>
inline void read_in_order(const T* const* x, int64_t rows, int64_t features) {
  for (int64_t r = 0; r < rows; ++r) {
    // volatile: a load that nobody uses would be left out.
    const volatile char* line = (const volatile char*)x[r];
    for (int64_t i = 0; i < features * (int64_t)sizeof(T); i += 64) line[i];
  }
}

template <class A>
inline void add_to_column(A* column, int64_t rows, A x) {
  using V = vec_t<A>;
  for (int64_t r = 0; r < rows; r += V::size) store(column + r, load(column + r) + set1(x));
}

template <class T, class F, int R>
inline void dot_strips(const DotArgs& d) {
  using A = acc_t<T>;
  constexpr int64_t kStrip = tuning::kLaneRows;
  static_assert(tuning::kSkinny <= tuning::kFewColumns, "a strip is a tile of lanes");
  const T* few[tuning::kSkinny];
  for (int64_t q = 0; q < d.few_rows; ++q) few[q] = (const T*)d.few.data + d.few.row_offset(q);
  // A strip of results: rows of C when `many` are its rows, else a piece of each of its few rows.
  alignas(64) ColumnTile<A> tile;
  A* const strip = tile.at;
  // Rows of a few columns are finished with a lane to a row.
  const bool lanes = !d.many_are_columns && d.few_rows <= tuning::kLaneOutputs && d.epilogue.bias_rows == 1;
  const bool by_column = d.many_are_columns || lanes;
  // Only rows of one distance tell what lies behind them.
  const int64_t whole =
      d.many.inner == 1 ? readable_rows(d.end, d.many.outer_stride, d.k, round_up(d.k, kNumbers<T, F>)) : 0;
  const int64_t along_many = by_column ? 1 : d.few_rows, along_few = by_column ? kStrip : 1;
  const bool are_short =
      by_column && d.few_rows <= tuning::kShortDots && d.many.inner == 1 && d.k > 0 && d.k <= 4 * kNumbers<T, F>;
  for (int64_t s = d.begin; s < d.end; s += kStrip) {
    const int64_t count = std::min<int64_t>(kStrip, d.end - s);
    // Whole vectors of short rows; what they leave of a strip goes the other way, with the same bits.
    const int64_t together = are_short ? count / vec_t<T>::size * vec_t<T>::size : 0;
    for (int64_t q = 0; together > 0 && q < d.few_rows; ++q)
      dot_short_rows<T, F>((const T*)d.many.data + d.many.row_offset(s), d.many.outer_stride, together, whole - s,
                           few[q], d.k, strip + q * kStrip);
    for (int64_t i = together; i < count; i += R) {
      const int64_t rows = std::min<int64_t>(R, count - i);
      const T* many[R];
      for (int64_t r = 0; r < rows; ++r) many[r] = (const T*)d.many.data + d.many.row_offset(s + i + r);
      A* out = strip + i * along_many;
      if (d.many_are_far) read_in_order(many, rows, d.k);
      // Rows that are not there have no address that could be read in their stead.
      if (rows == R)
        dot_rows<T, F, R>(many, few, d.few_rows, d.k, s + i + R <= whole, out, along_many, along_few);
      else
        for (int64_t r = 0; r < rows; ++r)
          dot_rows<T, F, 1>(many + r, few, d.few_rows, d.k, false, out + r * along_many, along_many, along_few);
    }
    if (lanes) {
      // The bias goes to whole columns here, where finish_lanes expects it added.
      if (d.epilogue.bias)
        for (int64_t q = 0; q < d.few_rows; ++q)
          add_to_column(strip + q * kStrip, count, load_one((const T*)d.epilogue.bias + q));
      finish_lanes<T>(tile, s, count, d.few_rows, d.epilogue);
    } else if (d.many_are_columns)
      epilogue<T>(strip, kStrip, d.few_rows, count, 0, s, true, true, d.epilogue);
    else
      epilogue<T>(strip, d.few_rows, count, d.few_rows, s, 0, true, true, d.epilogue);
  }
}

// As many accumulators as hide the latency of fma: a single row takes more of the many at a time.
template <class T, class F = vec_t<T>>
inline void gemm_dot(const DotArgs& d) {
  if (d.few_rows == 1)
    dot_strips<T, F, 8>(d);
  else if (d.few_rows == 2)
    dot_strips<T, F, 4>(d);
  else
    dot_strips<T, F, kTile.dot_rows>(d);
}

// ---- B in place, adjacent along the columns of C -------------------------------------------------------------------

// A few rows of B at a time, along hundreds of columns: reading or writing down a column of tiles would go to another
// page with every row, where no hardware prefetcher follows. The sums of a short K go straight to C where nothing is
// left to do there. Those of a longer one wait on the stack: prefetchers run beyond the columns of a thread, and would
// take lines of C from the thread that writes them.
template <class T>
inline void gemm_direct(const DirectArgs& d) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t R = kTile.rows, N = kTileColumns<V>;
  constexpr int64_t kColumns = (tuning::kDirectColumns + N - 1) / N * N;
  static_assert(tuning::kDirectK <= tuning::kSkinny, "what is packed fits in either case");
  constexpr int64_t kTiles = (tuning::kSkinny + R - 1) / R;  // unless K is one block, where sums need not wait
  alignas(64) A tiles[kTiles * R * kColumns];
  const Epilogue& e = d.epilogue;
  // Nothing is left to do with sums, so they may be written where they belong.
  const bool plain = std::is_same_v<T, A> && !e.bias && !e.preactivation && e.activation == Activation::none;
  const bool is_near = std::is_same_v<T, A> && !d.b_is_far;
  // Few rows of B at a time where it comes from memory, whose streams the prefetchers can still follow.
  const int64_t block = d.k <= tuning::kSkinny ? tuning::kSkinny : is_near ? tuning::kGemmChain : tuning::kDirectK;
  for (int64_t j0 = d.column_begin; j0 < d.column_end; j0 += kColumns) {
    const int64_t j1 = std::min(j0 + kColumns, d.column_end);
    for (int64_t k = 0; k == 0 || k < d.k; k += block) {
      const int64_t depth = std::min(block, d.k - k);
      const T* from = (const T*)d.b + k * d.b_k;
      // Half types, and the last columns, since the micro-kernel reads whole vectors of its own type.
      alignas(64) A packed[std::max(tuning::kSkinny * kColumns, tuning::kGemmChain * N)];
      // Columns before this one are read where they lie.
      const int64_t whole = std::is_same_v<T, A> ? j0 + (j1 - j0) / N * N : j0;
      for (int64_t j = whole; j < j1; j += N)
        for (int64_t h = 0; h < depth; ++h)
          pack_one_k<T, (int)N>(from + h * d.b_k + j, j1 - j, true, packed + (j - whole) * depth + h * N);
      for (int64_t i = d.row_begin; i < d.row_end; i += R) {
        const int64_t rows = std::min(R, d.row_end - i);
        const A* a = (const A*)d.a + i * d.a_row + k * d.a_k;
        // Sums of a K in one block need not wait for another one: all rows of tiles share the first's place.
        A* waiting = tiles + (d.k > block ? (i - d.row_begin) * kColumns : 0);
        for (int64_t j = j0; j < j1; j += N) {
          const bool in_place = j < whole, to_c = plain && d.k <= block && j + N <= j1;
          A* tile = to_c ? (A*)e.c + i * e.c_stride + j : waiting + (j - j0) * R;
          multiply_tile<V, V, R>(rows, depth, a, d.a_row, d.a_k,
                                 in_place ? (const A*)(const void*)(from + j) : packed + (j - whole) * depth,
                                 in_place ? d.b_k : N, tile, to_c ? e.c_stride : N, k > 0);
          if (!to_c && k + depth == d.k) epilogue<T>(tile, N, rows, std::min(N, j1 - j), i, j, true, true, e);
        }
      }
    }
  }
}
