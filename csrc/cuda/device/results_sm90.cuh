// How gemm_sm90's results leave a warp's registers: bias and activation where the sums are, rounded once, through boxes
// of shared memory that the copy engine stores while the warp goes on; or its lanes, where rows of C do not begin at 16
// bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device/activation.cuh"
#include "cuda/device/gemm_task.h"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/tuning.h"

namespace rf::cuda {

// A box is a warp's 16 rows by 64 columns, the 128 bytes that the swizzle is over.
constexpr int kRowsOut = 16, kColumnsOut = 64, kPartsOut = tuning::kHopperTileN / kColumnsOut;
constexpr int kBoxesOut = tuning::kHopperBoxesOut, kBoxBytes = kRowsOut * 128;
static_assert(kBoxBytes % 1024 == 0, "the swizzle's pattern repeats after 1024 bytes");

// The matrices that a product writes, as the copy engine sees them where it can.
struct Results {
  CUtensorMap c, preactivation;
  bool by_engine;
};

template <class T>
__device__ __forceinline__ uint32_t narrowed_pair(float x, float y) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// A lane loads two of a part's columns, and gets from others those of its sums.
template <class T>
__device__ __forceinline__ void add_bias(const T* bias, int64_t column0, int64_t n, float (&sum)[128]) {
  const int lane = (int)threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < kPartsOut; ++part) {
    const int64_t column = column0 + part * kColumnsOut + 2 * lane;
    T pair[2];
    uint32_t bits;
    for (int i = 0; i < 2; ++i) pair[i] = column + i < n ? bias[column + i] : narrowed<T>(0);
    memcpy(&bits, pair, 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t of_sums = __shfl_sync(~0u, bits, j * 4 + lane % 4);
      memcpy(pair, &of_sums, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[part * 32 + j * 4 + i] += widen(pair[i % 2]);
    }
  }
}

// Part after part, in the same registers: there are seven activations, and each unrolled over all sums would be long.
__device__ __forceinline__ void activate_parts(Activation activation, float (&sum)[128]) {
#pragma unroll 1
  for (int part = 0; part < kPartsOut; ++part) {
    float x[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = sum[i];
    activate(activation, x);
#pragma unroll
    for (int i = 0; i < 96; ++i) sum[i] = sum[i + 32];
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[96 + i] = x[i];
  }
}

// A warp's way out of registers, through its own boxes of shared memory in turn.
template <class T>
struct WarpResults {
  const GemmTask& task;
  const Results& results;
  char* boxes;
  int box = 0;

  // Part after part to one of the matrices.
  __device__ __forceinline__ void put(const CUtensorMap* map, void* matrix, const float (&sum)[128], int64_t row0,
                                      int64_t column0) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < kPartsOut; ++part) {
      const int64_t column = column0 + part * kColumnsOut;
      if (column >= task.n) return;
      char* const to = boxes + box * kBoxBytes;
      box = (box + 1) % kBoxesOut;
      if (results.by_engine && lane == 0) ptx::store_wait_read<kBoxesOut - 1>();
      __syncwarp();
      // Neighbouring lanes have neighbouring pairs; the swizzle lets those of 8 rows go to all banks at once.
      const auto chunk = [&](int row, int i) { return to + row * 128 + (i ^ row % 8) * 16; };
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* pair = sum + part * 32 + j * 4 + half * 2;
          *(uint32_t*)(chunk(half * 8 + lane / 4, j) + lane % 4 * 4) = narrowed_pair<T>(pair[0], pair[1]);
        }
      if (results.by_engine) ptx::fence_proxy_async();
      __syncwarp();
      if (!results.by_engine) {
#pragma unroll 1
        for (int r = lane / 8; r < kRowsOut && row0 + r < task.m; r += 4)
          store_vec((T*)matrix + (row0 + r) * task.out.c_stride, 1, column + lane % 8 * 8, task.n,
                    Vec<T>{*(const int4*)chunk(r, lane % 8)});
      } else if (lane == 0) {
        ptx::store_box(map, (int)column, (int)row0, to);
        ptx::store_commit();
      }
    }
  }

  __device__ __forceinline__ void write(float (&sum)[128], int64_t row0, int64_t column0) {
    if (row0 >= task.m) return;
    if (task.out.bias) add_bias((const T*)task.out.bias, column0, task.n, sum);
    if (task.out.preactivation) put(&results.preactivation, task.out.preactivation, sum, row0, column0);
    if (task.out.activation != Activation::none) activate_parts(task.out.activation, sum);
    put(&results.c, task.out.c, sum, row0, column0);
  }

  // Before the shared memory may go.
  __device__ __forceinline__ void finish() {
    if (results.by_engine && threadIdx.x % 32 == 0) ptx::store_wait_read<0>();
  }
};

}  // namespace rf::cuda
