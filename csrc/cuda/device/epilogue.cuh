// What a product's sums become: bias, activation, rounding once, and a copy from before the activation where its
// derivative needs it. Also the sums themselves where K is split, for finish_split (gemm.cu) to add up.
#pragma once
#include "cuda/device/activation.cuh"
#include "cuda/device/gemm_task.h"
#include "cuda/device/vec128.cuh"

namespace rf::cuda {

// One 16-byte vector of C, the elements from `column` on of `row`, of which those outside of n columns are nothing.
template <class T>
__device__ __forceinline__ void finish(const GemmOutput& out, int64_t row, int64_t column, int64_t n,
                                       const acc_t<T> (&bias)[kWidth<T>], acc_t<T> (&x)[kWidth<T>]) {
  const int64_t start = row * out.c_stride;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) x[i] += bias[i];
  if (out.preactivation) store_vec((T*)out.preactivation + start, 1, column, n, narrowed_vec<T>(x));
  activate(out.activation, x);
  store_vec((T*)out.c + start, 1, column, n, narrowed_vec<T>(x));
}

template <class T>
__device__ __forceinline__ void load_bias(const GemmOutput& out, int64_t column, int64_t n,
                                          acc_t<T> (&bias)[kWidth<T>]) {
  if (out.bias) {
    widen(load_vec((const T*)out.bias, 1, column, n, narrowed<T>(0)), bias);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) bias[i] = 0;
  }
}

// The same elements of one part of a split sum.
template <class T>
__device__ __forceinline__ void keep_partial(void* partial, int64_t row, int64_t column, int64_t n,
                                             const acc_t<T> (&x)[kWidth<T>]) {
  store_vecs((acc_t<T>*)partial + row * n, column, n, x);
}

}  // namespace rf::cuda
