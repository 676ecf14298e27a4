// Gradients of which few entries are large enough to matter (filter_eps): the others are dropped and the products
// that follow take the remaining ones alone.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// Entries of a row of which the magnitude exceeds the bound; NaN does.
template <class A>
inline bool exceeds(A x, A bound) {
  return !(std::fabs(x) <= bound);
}

// From j on, in steps of four vectors, the first that has such an entry; n if there is none. NaN, and infinity, may
// hide from a maximum, but not from a sum of zeros times them.
template <class A>
inline int64_t next_step(const A* x, int64_t j, int64_t n, A bound) {
  using V = vec_t<A>;
  constexpr int64_t W = V::size;
  for (; j + 4 * W <= n; j += 4 * W) {
    // One branch for four vectors: most steps have nothing.
    const V a = abs(load(x + j)), b = abs(load(x + j + W)), c = abs(load(x + j + 2 * W)), d = abs(load(x + j + 3 * W));
    const V most = max(max(a, b), max(c, d)), zero = (a + b + c + d) * set1(A(0));
    if (exceeds(reduce_max(most) + reduce_add(zero), bound)) break;
  }
  return std::min(j, n);
}

template <class T>
inline int64_t count_entries(const void* row, int64_t n, double bound) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 4 * vec_t<A>::size;
  const A *x = (const A*)row, b = A(bound);
  // Counted before they are listed, so that lists are of the right length, and none where too many entries are left.
  int64_t count = 0;
  for (int64_t j = next_step(x, 0, n, b); j < n; j = next_step(x, j + kStep, n, b))
    for (int64_t i = j; i < std::min(n, j + kStep); ++i) count += exceeds(x[i], b);
  return count;
}

template <class T>
inline void list_entries(const void* row, int64_t n, double bound, int32_t* columns, void* values) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 4 * vec_t<A>::size;
  const A *x = (const A*)row, b = A(bound);
  A* to = (A*)values;
  for (int64_t j = next_step(x, 0, n, b); j < n; j = next_step(x, j + kStep, n, b))
    for (int64_t i = j; i < std::min(n, j + kStep); ++i)
      if (exceeds(x[i], b)) {
        *columns++ = (int32_t)i;
        *to++ = x[i];
      }
}

// Columns [j, j + N vectors) of one row of the product, in registers.
template <class T, int N>
inline void sparse_strip(const SparseRow& s, int64_t j, const T* b, acc_t<T>* c) {
  using V = vec_t<T>;
  const acc_t<T>* values = (const acc_t<T>*)s.values;
  V sum[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) sum[v] = s.add ? load(c + j + v * V::size) : set1(acc_t<T>(0));
  for (int64_t e = 0; e < s.entries; ++e) {
    const T* row = b + s.rows[e] * s.b_row + j;
    // Rows of B come in any order, which no prefetcher of the hardware foresees.
    const int64_t ahead = std::min(e + tuning::kSparseAhead, s.entries - 1);
    const char* later = (const char*)(b + s.rows[ahead] * s.b_row + j);
#pragma GCC unroll 8
    for (int64_t line = 0; line < N * V::size * (int64_t)sizeof(T); line += 64) __builtin_prefetch(later + line);
    const V x = set1(values[e]);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[v] = fma(x, load(row + v * V::size), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store(c + j + v * V::size, sum[v]);
}

template <class T>
inline void sparse_row_product(const SparseRow& s) {
  using V = vec_t<T>;
  const T* b = (const T*)s.b;
  acc_t<T>* c = (acc_t<T>*)s.c;
  const acc_t<T>* values = (const acc_t<T>*)s.values;
  int64_t j = 0;
  for (; j + 8 * V::size <= s.columns; j += 8 * V::size) sparse_strip<T, 8>(s, j, b, c);
  for (; j + V::size <= s.columns; j += V::size) sparse_strip<T, 1>(s, j, b, c);
  for (; j < s.columns; ++j) {
    // Fewer columns than a vector has.
    acc_t<T> sum = s.add ? c[j] : acc_t<T>(0);
    for (int64_t e = 0; e < s.entries; ++e) sum += values[e] * load_one(b + s.rows[e] * s.b_row + j);
    c[j] = sum;
  }
}
