// 16 bytes of a row at a time, whatever its alignment, stride and length: the vector at elements j to j + width - 1 of
// a row of n elements, of which those outside of [0, n) are filled in when loaded and left alone when stored. Rows are
// cut at multiples of 16 bytes of memory, so that all of a contiguous row but its ragged ends moves in full vectors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "shared/types.h"

namespace rf::cuda {

// ---- elements ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float* y) { *y = x; }
__device__ __forceinline__ void narrow(double x, double* y) { *y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half* y) { *y = __float2half_rn(x); }

template <class T>
__device__ __forceinline__ T narrowed(acc_t<T> x) {
  T y;
  narrow(x, &y);
  return y;
}

template <class T>
struct Type {
  using type = T;
};
// f(Type<T>()) with the C++ type of a DType.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>());
    case DType::f64:
      return f(Type<double>());
    case DType::bf16:
      return f(Type<__nv_bfloat16>());
    case DType::f16:
      return f(Type<__half>());
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kWidth = 16 / (int)sizeof(T);

template <class T>
struct Vec {
  int4 raw;
};

template <class T>
__device__ __forceinline__ void widen(const Vec<T>& v, acc_t<T> (&out)[kWidth<T>]) {
  T lane[kWidth<T>];
  memcpy(lane, &v.raw, 16);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) out[i] = widen(lane[i]);
}
// Pairs: one conversion instruction for two elements.
__device__ __forceinline__ void widen(const Vec<__nv_bfloat16>& v, float (&out)[8]) {
  __nv_bfloat162 pair[4];
  memcpy(pair, &v.raw, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __bfloat1622float2(pair[i]);
    out[2 * i] = f.x;
    out[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ void widen(const Vec<__half>& v, float (&out)[8]) {
  __half2 pair[4];
  memcpy(pair, &v.raw, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(pair[i]);
    out[2 * i] = f.x;
    out[2 * i + 1] = f.y;
  }
}

template <class T>
__device__ __forceinline__ Vec<T> narrowed_vec(const acc_t<T> (&in)[kWidth<T>]) {
  Vec<T> v;
  if constexpr (sizeof(T) >= 4) {
    memcpy(&v.raw, in, 16);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&word[i], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        memcpy(&word[i], &pair, 4);
      }
    }
    memcpy(&v.raw, word, 16);
  }
  return v;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Where the first vector of a row begins: at or before element 0, so that vectors lie at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ int64_t first_vector(const T* row, int64_t stride) {
  return stride == 1 ? -(int64_t)(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)) : 0;
}

// Whether the vector at j is one 16-byte access. Rows that go together may differ in alignment, so each one asks.
template <class T>
__device__ __forceinline__ bool is_whole(const T* row, int64_t stride, int64_t j, int64_t n) {
  return stride == 1 && j >= 0 && j + kWidth<T> <= n && reinterpret_cast<uintptr_t>(row + j) % 16 == 0;
}

template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* row, int64_t stride, int64_t j, int64_t n, T fill) {
  if (is_whole(row, stride, j, n)) return {*reinterpret_cast<const int4*>(row + j)};
  T lane[kWidth<T>];
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) lane[i] = 0 <= j + i && j + i < n ? row[(j + i) * stride] : fill;
  Vec<T> v;
  memcpy(&v.raw, lane, 16);
  return v;
}

template <class T>
__device__ __forceinline__ void store_vec(T* row, int64_t stride, int64_t j, int64_t n, const Vec<T>& v) {
  if (is_whole(row, stride, j, n)) {
    *reinterpret_cast<int4*>(row + j) = v.raw;
    return;
  }
  T lane[kWidth<T>];
  memcpy(lane, &v.raw, 16);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i)
    if (0 <= j + i && j + i < n) row[(j + i) * stride] = lane[i];
}

// As many elements of a row of accumulators as a vector of another type has, in several vectors.
template <class A, int width>
__device__ __forceinline__ void load_vecs(const A* row, int64_t j, int64_t n, A (&out)[width]) {
#pragma unroll
  for (int i = 0; i < width; i += kWidth<A>) {
    A part[kWidth<A>];
    widen(load_vec(row, 1, j + i, n, A(0)), part);
#pragma unroll
    for (int k = 0; k < kWidth<A>; ++k) out[i + k] = part[k];
  }
}

template <class A, int width>
__device__ __forceinline__ void store_vecs(A* row, int64_t j, int64_t n, const A (&in)[width]) {
#pragma unroll
  for (int i = 0; i < width; i += kWidth<A>) {
    A part[kWidth<A>];
#pragma unroll
    for (int k = 0; k < kWidth<A>; ++k) part[k] = in[i + k];
    store_vec(row, 1, j + i, n, narrowed_vec<A>(part));
  }
}

}  // namespace rf::cuda
