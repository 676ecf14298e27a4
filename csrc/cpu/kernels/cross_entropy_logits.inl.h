// What the kernels of cross-entropy share: logits as losses see them, bounds of exponents, the check of classes.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

template <class A>
struct LogitTransform {
  A scale, cap;  // cap 0: none
  bool identity() const { return scale == A(1) && cap == A(0); }
  template <class V>
  V operator()(V x) const {
    x = x * set1(scale);
    return cap == A(0) ? x : set1(cap) * tanh(x / set1(cap));
  }
};

// exp(x) x counts as 0 where exp(x) is 0: this bound keeps -inf out of the product. NaN passes.
template <class A>
constexpr A kLeastExponent = A(-1e4);

// Probabilities below exp of this count as 0 in gradients: times 1/N they would be subnormal, and every product that
// the layers below form with a subnormal costs a microcode assist (a 10-class layer's backward took 5 times as long).
template <class A>
constexpr A kLeastLogProbability = A(sizeof(A) == 4 ? -69 : -690);
template <class A>
constexpr A kLeastProbability = A(sizeof(A) == 4 ? 1.0806393e-30 : 2.1717382813898298e-300);  // exp of it

// The first row whose class is out of range, or -1. All are looked at without a branch, several at a time.
inline int64_t first_bad_row(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  const int64_t *target = a.target, ignored = a.ignore_index;
  if (!target) return -1;
  const uint64_t classes = (uint64_t)a.classes;
  uint64_t bad = 0;
  for (int64_t r = begin; r < end; ++r)
    bad |= (uint64_t)(target[r] != ignored) & (uint64_t)((uint64_t)target[r] >= classes);
  if (!bad) return -1;
  int64_t r = begin;
  while (target[r] == ignored || (uint64_t)target[r] < classes) ++r;
  return r;
}
