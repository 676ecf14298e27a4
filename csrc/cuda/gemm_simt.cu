// The matrix product without tensor cores: float32 where tf32 is not allowed, and float64. 16 x 16 threads hold squares
// of C in registers; operands are copied by cp.async an element at a time, which any strides and alignment allow and
// which transposes on the way, so that both lie with K outermost and are read 16 bytes at a time.
#include <cuda_runtime.h>

#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/gemm.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

constexpr int kSide = tuning::kSimtSide, kThreads = kSide * kSide;

__device__ __forceinline__ void copy(float* to, const float* from, bool there) {
  ptx::cp_async4(to, from, there ? 4 : 0);
}
__device__ __forceinline__ void copy(double* to, const double* from, bool there) {
  ptx::cp_async8(to, from, there ? 8 : 0);
}

// Span rows of A (columns of B) by Depth of K, as tile[k][row]; zeros where there are none. Neighbouring threads take
// neighbours in memory.
template <class T, int Span, int Depth, int Stride>
__device__ __forceinline__ void fetch(T* tile, const GemmOperand& operand, int64_t first, int64_t rows, int64_t k,
                                      int64_t k_end) {
  static_assert(Span * Depth % kThreads == 0, "every thread copies the same number of elements");
  const T* data = (const T*)operand.view.data;
#pragma unroll
  for (int i = 0; i < Span * Depth / kThreads; ++i) {
    const int index = (int)threadIdx.x + i * kThreads;
    const int r = operand.across_k ? index % Span : index / Depth, d = operand.across_k ? index / Span : index % Depth;
    const bool there = first + r < rows && k + d < k_end;
    copy(tile + d * Stride + r, there ? data + operand.offset(first + r, k + d) : data, there);
  }
}

// A thread's part of a row of the tile: groups of 16 bytes, kSide of them apart, so that a warp reads without
// conflicts.
template <class T, int Each>
__device__ __forceinline__ void load(T (&x)[Each], const T* row, int thread) {
#pragma unroll
  for (int g = 0; g < Each; g += kWidth<T>) {
    const int4 raw = *(const int4*)(row + g * kSide + thread * kWidth<T>);
    memcpy(x + g, &raw, sizeof raw);
  }
}

template <class T, class Shape>
struct Config {
  static constexpr int kPad = kWidth<T>;  // keeps the transposing copies' banks apart
  static constexpr int kStrideA = Shape::M + kPad, kStrideB = Shape::N + kPad;
  static constexpr int kStage = Shape::Depth * (kStrideA + kStrideB);
  static constexpr int64_t kSharedBytes = Shape::Stages * kStage * (int64_t)sizeof(T);
};

// Two blocks to an SM; the compiler for Blackwell needs more than 128 registers for the large tile.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, ptx::kBlackwell ? 1 : 2) gemm_simt(GemmTask task) {
  using C = Config<T, Shape>;
  constexpr int kRows = Shape::M / kSide, kColumns = Shape::N / kSide, kStages = Shape::Stages, kW = kWidth<T>;
  T* const shared = ptx::dynamic_shared<T>();
  const TilePosition tile = tile_position<tuning::kGemmGroup>(blockIdx.x, (task.m + Shape::M - 1) / Shape::M,
                                                              (task.n + Shape::N - 1) / Shape::N);
  const int64_t row0 = tile.row * Shape::M, column0 = tile.column * Shape::N;
  const int64_t k_begin = blockIdx.y * task.k_per_split;
  const int64_t k_end = k_begin + task.k_per_split < task.k ? k_begin + task.k_per_split : task.k;
  const int64_t k_tiles = (k_end - k_begin + Shape::Depth - 1) / Shape::Depth;
  const int x = (int)threadIdx.x % kSide, y = (int)threadIdx.x / kSide;

  const auto fetch_tile = [&](int64_t t) {
    T* stage = shared + t % kStages * C::kStage;
    const int64_t k = k_begin + t * Shape::Depth;
    if (t < k_tiles) {
      fetch<T, Shape::M, Shape::Depth, C::kStrideA>(stage, task.a, row0, task.m, k, k_end);
      fetch<T, Shape::N, Shape::Depth, C::kStrideB>(stage + Shape::Depth * C::kStrideA, task.b, column0, task.n, k,
                                                    k_end);
    }
    ptx::cp_async_commit();  // empty groups too: the count of groups tells which tile has arrived
  };

  T sum[kRows][kColumns] = {};
  for (int t = 0; t < kStages - 1; ++t) fetch_tile(t);
  for (int64_t t = 0; t < k_tiles; ++t) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // tile t is here, and no one reads tile t - 1, whose stage is filled next
    fetch_tile(t + kStages - 1);
    const T* stage = shared + t % kStages * C::kStage;
#pragma unroll
    for (int d = 0; d < Shape::Depth; ++d) {
      T a[kRows], b[kColumns];
      load(a, stage + d * C::kStrideA, y);
      load(b, stage + Shape::Depth * C::kStrideA + d * C::kStrideB, x);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += a[i] * b[j];
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int j = 0; j < kColumns; j += kW) {
    const int64_t column = column0 + j * kSide + x * kW;
    if (column >= task.n) continue;
    T bias[kW];
    load_bias<T>(task.out, column, task.n, bias);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row0 + i / kW * kW * kSide + y * kW + i % kW;
      if (row >= task.m) continue;
      T part[kW];
#pragma unroll
      for (int l = 0; l < kW; ++l) part[l] = sum[i][j + l];
      if (task.partial)
        keep_partial<T>((T*)task.partial + blockIdx.y * task.m * task.n, row, column, task.n, part);
      else
        finish<T>(task.out, row, column, task.n, bias, part);
    }
  }
}

template <class T, class Shape>
void start(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  const int64_t tiles = ((task.m + Shape::M - 1) / Shape::M) * ((task.n + Shape::N - 1) / Shape::N);
  launch(gemm_simt<T, Shape>, dim3((unsigned)tiles, (unsigned)plan.splits), dim3(kThreads),
         Config<T, Shape>::kSharedBytes, stream, task);
}

}  // namespace

void launch_gemm_simt(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  if (dtype == DType::f64) return start<double, tuning::SimtSmall>(task, plan, stream);
  if (plan.tile_m == tuning::SimtLarge::M) return start<float, tuning::SimtLarge>(task, plan, stream);
  start<float, tuning::SimtSmall>(task, plan, stream);
}

}  // namespace rf::cuda
