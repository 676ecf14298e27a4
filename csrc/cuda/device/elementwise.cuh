// A kernel of one thread for each 16 bytes of its tensors, whatever is to be done there.
#pragma once
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/tuning.h"

namespace rf::cuda {

template <class F>
__global__ void __launch_bounds__(tuning::kElementwiseThreads) elementwise_kernel(F f, int64_t vectors) {
  const int64_t v = (int64_t)blockIdx.x * tuning::kElementwiseThreads + threadIdx.x;
  if (v < vectors) f(v);
}

// Of n elements at x, where vectors lie at multiples of 16 bytes of x.
template <class T>
int64_t vector_count(const T* x, int64_t n) {
  return ceil_div(n + (int64_t)(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)), kWidth<T>);
}

template <class F, class T>
void launch_elementwise(F f, const T* x, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t vectors = vector_count(x, n);
  launch(elementwise_kernel<F>, dim3((unsigned)ceil_div(vectors, tuning::kElementwiseThreads)),
         dim3(tuning::kElementwiseThreads), 0, stream, f, vectors);
}

}  // namespace rf::cuda
