// What a layer whose weight is a sum of Kronecker products A_m (x) S_m does beside its products with S: combinations of
// a row's parts with A's numbers, and their gradient, products of parts with parts (Zhang et al., "Beyond
// fully-connected layers with quaternions", 2021). A row is a sequence of adjacent parts of equal length.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// J parts of the result at a time: each vector of the row is used J times, in as many chains of additions.
template <class In, class Out, int J>
inline void combine_some(const In* from, int64_t parts, int64_t length, const acc_t<In>* coefficients, Out* to) {
  using V = vec_t<In>;
  for (int64_t r = 0; r < length; r += V::size) {
    const int64_t n = std::min<int64_t>(V::size, length - r);
    // As many sums as hide the latency of fma.
    V sum[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[j] = set1(acc_t<In>(0));
    for (int64_t i = 0; i < parts; ++i) {
      const In* p = from + i * length + r;
      // One load for J parts, where a product of matrices of this size would first be packed.
      const V x = load_up_to(p, n);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[j] = fma(x, set1(coefficients[j * parts + i]), sum[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store_up_to(to + j * length + r, sum[j], n);
  }
}

template <class In, class Out>
inline void combine_parts(const CombinePartsProblem& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const In* from = (const In*)a.from + row * a.from_stride;
    Out* to = (Out*)a.to + row * a.to_parts * a.length;
    const acc_t<In>* c = (const acc_t<In>*)a.coefficients;
    // Eight parts of the result, then four, then one: to_parts is mostly n or n^2 of n = 2, 4 or 8.
    int64_t j = 0;
    for (; j + 8 <= a.to_parts; j += 8)
      combine_some<In, Out, 8>(from, a.parts, a.length, c + j * a.parts, to + j * a.length);
    for (; j + 4 <= a.to_parts; j += 4)
      combine_some<In, Out, 4>(from, a.parts, a.length, c + j * a.parts, to + j * a.length);
    for (; j < a.to_parts; ++j) combine_some<In, Out, 1>(from, a.parts, a.length, c + j * a.parts, to + j * a.length);
  }
}

template <class T>
inline void mix_parts(const CombinePartsProblem& a, int64_t begin, int64_t end) {
  combine_parts<T, acc_t<T>>(a, begin, end);
}
template <class T>
inline void unmix_parts(const CombinePartsProblem& a, int64_t begin, int64_t end) {
  combine_parts<acc_t<T>, T>(a, begin, end);
}

// sums[j * stride + i] += p_j . q_i for J x I parts, each lane of which adds up kChain products at most (tuning.h).
template <class T, int J, int I>
inline void add_products(const acc_t<T>* p, const T* q, int64_t length, acc_t<T>* sums, int64_t stride) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  // As dot_tile: chains of additions are short, whatever the length.
  for (int64_t begin = 0; begin < length; begin += tuning::kChain * V::size) {
    const int64_t end = std::min<int64_t>(length, begin + tuning::kChain * V::size);
    // J x I sums, each loaded vector used J or I times.
    V acc[J][I];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) acc[j][i] = set1(A(0));
    for (int64_t r = begin; r < end; r += V::size) {
      const int64_t n = std::min<int64_t>(V::size, end - r);
      V x[I];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) x[i] = load_up_to(q + i * length + r, n);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        // Parts may be shorter than a vector: zeros beyond their ends add nothing.
        const V y = load_up_to(p + j * length + r, n);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) acc[j][i] = fma(y, x[i], acc[j][i]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) sums[j * stride + i] += reduce_add(acc[j][i]);
  }
}

template <class T, int J>
inline void add_products_of(const acc_t<T>* p, const T* q, int64_t parts, int64_t length, acc_t<T>* sums) {
  int64_t i = 0;
  for (; i + 4 <= parts; i += 4) add_products<T, J, 4>(p, q + i * length, length, sums + i, parts);
  for (; i + 2 <= parts; i += 2) add_products<T, J, 2>(p, q + i * length, length, sums + i, parts);
  for (; i < parts; ++i) add_products<T, J, 1>(p, q + i * length, length, sums + i, parts);
}

template <class T>
inline void part_products(const PartProductsProblem& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A* sums = (A*)a.sums;
  // Of this range of rows alone: the caller adds ranges up in order.
  for (int64_t i = 0; i < a.of_parts * a.parts; ++i) sums[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    // A row of both stays in L1 while its parts are multiplied with each other.
    const A* p = (const A*)a.of + row * a.of_parts * a.length;
    const T* q = (const T*)a.with + row * a.with_stride;
    int64_t j = 0;
    for (; j + 4 <= a.of_parts; j += 4)
      add_products_of<T, 4>(p + j * a.length, q, a.parts, a.length, sums + j * a.parts);
    for (; j < a.of_parts; ++j) add_products_of<T, 1>(p + j * a.length, q, a.parts, a.length, sums + j * a.parts);
  }
}
