// Elementary functions of accumulators, as exactly as the elements that they are for need them.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/device/ptx.cuh"
#include "shared/types.h"

namespace rf::cuda {

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

// exp for elements of type T. Half types take the special function unit's 2^x as it is: its relative error, 1e-7 times
// one plus abs(x), is far below theirs, and expf's eight instructions would take longer than the memory.
template <class T>
__device__ __forceinline__ acc_t<T> exp_of(acc_t<T> x) {
  if constexpr (std::is_same_v<T, double>)
    return exp(x);
  else if constexpr (std::is_same_v<T, float>)
    return expf(x);
  else
    return ptx::exp2_approx(x * 1.44269504f);
}

__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }  // the number, if one is NaN
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }

}  // namespace rf::cuda
