// Squared error and its gradients.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

template <class T>
inline double mse_loss(const void* px, const void* py, void* peach, int64_t n) {
  using V = vec_t<T>;
  const T *x = (const T*)px, *y = (const T*)py;
  T* each = (T*)peach;
  // Four sums at a time, so that none waits for its last addition.
  constexpr int64_t kStep = 4 * V::size, kSumBlock = kStep * tuning::kSumVectors;
  // Blocks' sums in double precision: a float of millions of squares would lose what is added last.
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    V sum = set1(acc_t<T>(0)), more[4] = {sum, sum, sum, sum};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = j + i * V::size;
        V d = load(x + at) - load(y + at), q = d * d;
        more[i] = more[i] + q;
        if (each) store(each + at, q);
      }
    for (; j + V::size <= end; j += V::size) {
      V d = load(x + j) - load(y + j), q = d * d;
      sum = sum + q;
      if (each) store(each + j, q);
    }
    if (j < end) {
      // Zeros in the lanes beyond the last: their difference adds nothing.
      V d = load_n(x + j, end - j) - load_n(y + j, end - j), q = d * d;
      sum = sum + q;
      if (each) store_n(each + j, q, end - j);
    }
    total += (double)reduce_add(sum + ((more[0] + more[1]) + (more[2] + more[3])));
  }
  return total;
}

template <class T>
inline void mse_loss_backward(const void* px, const void* py, const void* pg, bool each_grad, double scale, void* pdx,
                              void* pdy, int64_t n) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const T *x = (const T*)px, *y = (const T*)py, *g = (const T*)pg;
  T *dx = (T*)pdx, *dy = (T*)pdy;
  const V factor = set1(A(scale)), shared = factor * set1(load_one(g)), zero = set1(A(0));
  for (int64_t j = 0; j < n; j += V::size) {
    const int64_t count = std::min<int64_t>(V::size, n - j);
    const bool full = count == V::size;
    V d = full ? load(x + j) - load(y + j) : load_n(x + j, count) - load_n(y + j, count);
    // One upstream gradient for all of a reduced loss.
    V s = !each_grad ? shared : factor * (full ? load(g + j) : load_n(g + j, count));
    d = d * s;
    // Either operand may want none; both differ by their sign alone.
    if (dx) full ? store(dx + j, d) : store_n(dx + j, d, count);
    if (dy) full ? store(dy + j, zero - d) : store_n(dy + j, zero - d, count);
  }
}
