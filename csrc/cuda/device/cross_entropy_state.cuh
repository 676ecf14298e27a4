// What cross-entropy with options gathers of a row: sums that are counted from the maximum so far, and shifted with it.
#pragma once
#include "cuda/device/max_sum.cuh"

namespace rf::cuda {

// exp(x) x counts as 0 where exp(x) is 0: this bound keeps -inf out of the product. NaN passes.
template <class A>
__device__ __forceinline__ A bounded_exponent(A x) {
  return x < A(-1e4) ? A(-1e4) : x;
}

template <class A>
struct CrossEntropyState {
  static constexpr int64_t kNowhere = INT64_MAX, kNan = INT64_MIN / 2;

  int64_t where = kNowhere;                 // of the maximum; of the first NaN, plus kNan
  A max = minus_infinity<A>(), sum = A(0);  // sum of e = exp(z - max)
  A weighted = A(0);                        // of e (z - max)
  A q_dot = A(0), q_mass = A(0);            // of q (z - max) and of q, the effective target weights
  A t_dot = A(0), t_mass = A(0);            // the same of the probabilities
  A unused = A(0);                          // all bytes of a state are shuffled, so none is left out

  // Counts from a maximum that is not less.
  __device__ void shift_to(A to) {
    if (to == max) return;
    const A step = origin(max) - origin(to), shrink = rescale(max, to);
    // Before there was a maximum there was nothing but -inf, and exp(x) x counts as 0 there. The step may overflow:
    // where nothing is left of the sum there is no 0 * inf.
    weighted = max != minus_infinity<A>() && shrink > A(0) ? shrink * (weighted + step * sum) : sum * A(0);
    sum *= shrink;
    q_dot += step * q_mass;
    t_dot += step * t_mass;
    max = to;
  }

  // The maximum of a vector of logits, in whose order they come; its place only where `places`.
  template <class T, int n>
  __device__ void track(const A (&z)[n], int64_t j, int64_t classes, bool places) {
    const A m = maximum(z);
    if (places) {
      const int64_t before = where;
#pragma unroll
      for (int i = n - 1; i >= 0; --i) {
        if (j + i < 0 || j + i >= classes) continue;
        if (z[i] != z[i])
          where = before < 0 ? before : j + i + kNan;
        else if (where >= 0 && z[i] == m && (m > max || before == kNowhere))
          where = j + i;
      }
    }
    if (m > max) shift_to(m);
  }

  template <class T, int n>
  __device__ void add_exponentials(const A (&z)[n], bool entropy) {
    const A from = origin(max);
    A vector = A(0);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A d = z[i] - from, e = exp_of<T>(d);
      vector += e;
      if (entropy) weighted += e * bounded_exponent(d);
    }
    sum += vector;
  }

  // A class: z counted from the maximum, its probability, its effective weight.
  __device__ void add_target(A z, A t, A q) {
    q_dot += q * z;
    q_mass += q;
    t_dot += t * z;
    t_mass += t;
  }

  // The first maximum, or the first NaN.
  __device__ int64_t argmax() const { return where < 0 ? where - kNan : where; }
};

template <class A>
__device__ __forceinline__ void merge(CrossEntropyState<A>& into, CrossEntropyState<A> other) {
  // Any NaN is before all maxima.
  if (other.where < 0 || into.where < 0 || other.max == into.max)
    into.where = other.where < into.where ? other.where : into.where;
  else if (other.max > into.max)
    into.where = other.where;
  const A to = max_of(into.max, other.max);
  into.shift_to(to);
  other.shift_to(to);
  into.sum += other.sum;
  into.weighted += other.weighted;
  into.q_dot += other.q_dot;
  into.q_mass += other.q_mass;
  into.t_dot += other.t_dot;
  into.t_mass += other.t_mass;
}

}  // namespace rf::cuda
