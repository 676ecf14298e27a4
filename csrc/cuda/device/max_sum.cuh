// The maximum of a row and the sum of exp(x - maximum) in one pass: the sum is rescaled when the maximum grows (Milakov
// and Gimelshein, "Online normalizer calculation for softmax", 2018).
#pragma once
#include "cuda/device/math.cuh"
#include "cuda/device/vec128.cuh"

namespace rf::cuda {

// What exponents are counted from: the maximum; 0 where that is infinite, so that a row of -inf sums to 0 and one with
// +inf to inf.
template <class A>
__device__ __forceinline__ A origin(A max) {
  return max - max == A(0) ? max : A(0);
}

template <class A>
struct MaxSum {
  A max = minus_infinity<A>(), sum = A(0);
};

// What a sum counted from the maximum `from` is multiplied with to count from `to`, which is not less. 0 does it where
// there was no maximum: a sum is then 0, or NaN, which stays.
template <class A>
__device__ __forceinline__ A rescale(A from, A to) {
  return from == to ? A(1) : exp_of<A>(from - to);
}

template <class A, int n>
__device__ __forceinline__ A maximum(const A (&x)[n]) {
  A m = x[0];
#pragma unroll
  for (int i = 1; i < n; ++i) m = max_of(m, x[i]);
  return m;
}

// One vector of elements of type T.
template <class T, class A, int n>
__device__ __forceinline__ void add_vector(MaxSum<A>& s, const A (&x)[n]) {
  const A m = maximum(x);
  if (m > s.max) {
    s.sum *= rescale(s.max, m);
    s.max = m;
  }
  const A from = origin(s.max);
  A sum = A(0);
#pragma unroll
  for (int i = 0; i < n; ++i) sum += exp_of<T>(x[i] - from);
  s.sum += sum;
}

template <class A>
__device__ __forceinline__ void merge(MaxSum<A>& into, const MaxSum<A>& other) {
  const A m = max_of(into.max, other.max);
  into.sum = into.sum * rescale(into.max, m) + other.sum * rescale(other.max, m);
  into.max = m;
}

// The sum that probabilities are divided by: with +inf in the row they are all NaN, as torch's.
template <class A>
__device__ __forceinline__ A normalizer(A max, A sum) {
  return max == -minus_infinity<A>() ? max - max : sum;
}

}  // namespace rf::cuda
