// What a layer whose weight is a sum of Kronecker products has besides its products of matrices (see
// csrc/cpu/kernels/phm_linear.inl.h): combinations of a row's parts, and products of parts with parts. Blocks have sums
// of their own, for the caller to add up: no atomics, the same bits on every run.
#include <algorithm>

#include "cuda/device/columns.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

// The element at r of a part, and those behind it that make a vector of T.
template <class T, class From>
__device__ __forceinline__ void load_part(const From* part, int64_t r, int64_t length, acc_t<T> (&x)[kWidth<T>]) {
  if constexpr (std::is_same_v<From, T>)
    widen(load_vec(part, 1, r, length, T()), x);
  else
    load_vecs(part, r, length, x);
}

// ---- combinations --------------------------------------------------------------------------------------------------

// A thread has a vector of kParts parts of the result, for which it reads each of the row's parts once.
constexpr int kParts = tuning::kPhmParts;

template <class T, class From>
__global__ void __launch_bounds__(tuning::kElementwiseThreads, 1)
    combine_parts_kernel(CombineParts p, int64_t vectors) {
  using A = acc_t<T>;
  constexpr int kW = kWidth<T>;
  const int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t row = item / vectors, r = item % vectors * kW;
  if (row >= p.rows) return;
  const From* from = (const From*)p.from + row * p.from_stride;
  T* to = (T*)p.to + row * p.to_parts * p.length;
  for (int64_t first = (int64_t)blockIdx.y * kParts; first < p.to_parts; first += (int64_t)gridDim.y * kParts) {
    const A* of_first = (const A*)p.coefficients + first * p.parts;
    A sum[kParts][kW] = {};
    for (int64_t i = 0; i < p.parts; ++i) {
      A x[kW];
      load_part<T>(from + i * p.length, r, p.length, x);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const A c = first + j < p.to_parts ? of_first[j * p.parts + i] : A(0);
#pragma unroll
        for (int k = 0; k < kW; ++k) sum[j][k] += c * x[k];
      }
    }
#pragma unroll
    for (int j = 0; j < kParts; ++j)
      if (first + j < p.to_parts) store_vec(to + (first + j) * p.length, 1, r, p.length, narrowed_vec<T>(sum[j]));
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// A block has the products of kTile parts with kTile others.
constexpr int kTile = tuning::kPhmTile;

template <class A>
struct TileSums {
  A sum[kTile][kTile] = {};
};
template <class A>
__device__ __forceinline__ void merge(TileSums<A>& into, const TileSums<A>& other) {
#pragma unroll
  for (int j = 0; j < kTile; ++j)
#pragma unroll
    for (int i = 0; i < kTile; ++i) into.sum[j][i] += other.sum[j][i];
}

template <class T>
__global__ void __launch_bounds__(tuning::kElementwiseThreads, 1)
    part_products_kernel(PartProducts p, int64_t vectors) {
  using A = acc_t<T>;
  constexpr int kW = kWidth<T>;
  __shared__ TileSums<A> scratch[kWarp];
  const int64_t i0 = (int64_t)blockIdx.z * kTile, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t j0 = (int64_t)blockIdx.y * kTile; j0 < p.of_parts; j0 += (int64_t)gridDim.y * kTile) {
    TileSums<A> sums;
    for (int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; item < p.rows * vectors; item += step) {
      const int64_t row = item / vectors, r = item % vectors * kW;
      const A* of = (const A*)p.of + (row * p.of_parts + j0) * p.length;
      const T* with = (const T*)p.with + row * p.with_stride + i0 * p.length;
      A x[kTile][kW] = {};
#pragma unroll
      for (int i = 0; i < kTile; ++i)
        if (i0 + i < p.parts) load_part<T>(with + i * p.length, r, p.length, x[i]);
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        if (j0 + j >= p.of_parts) break;
        A y[kW];
        load_part<T>(of + j * p.length, r, p.length, y);
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int k = 0; k < kW; ++k) sums.sum[j][i] += y[k] * x[i][k];
      }
    }
    sums = reduce_block(sums, scratch);
    if (threadIdx.x == 0)
#pragma unroll
      for (int j = 0; j < kTile; ++j)
#pragma unroll
        for (int i = 0; i < kTile; ++i)
          if (j0 + j < p.of_parts && i0 + i < p.parts)
            ((A*)p.sums)[((int64_t)blockIdx.x * p.of_parts + j0 + j) * p.parts + i0 + i] = sums.sum[j][i];
    __syncthreads();  // before the next products take `scratch`
  }
}

constexpr int64_t kMostBlocksAlongY = 65535;

int64_t vectors_of(DType dtype, int64_t length) { return ceil_div(length * size_of(dtype), 16); }

// Of a block; with many parts there are many blocks for a few vectors.
int64_t threads_for(int64_t items) { return tuning::power_of_two(2 * items - 1, kWarp, tuning::kElementwiseThreads); }

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

void launch_combine_parts(DType dtype, const CombineParts& args, cudaStream_t stream) {
  if (args.rows * args.to_parts * args.length == 0) return;
  const int64_t vectors = vectors_of(dtype, args.length), threads = threads_for(args.rows * vectors);
  const dim3 grid((unsigned)ceil_div(args.rows * vectors, threads),
                  (unsigned)std::min(kMostBlocksAlongY, ceil_div(args.to_parts, kParts)));
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch(args.from_is_acc ? combine_parts_kernel<T, acc_t<T>> : combine_parts_kernel<T, T>, grid,
           dim3((unsigned)threads), 0, stream, args, vectors);
  });
}

int64_t part_products_blocks(DType dtype, int64_t rows, int64_t length) {
  const int64_t most =
      ceil_div(rows * vectors_of(dtype, length), (int64_t)tuning::kElementwiseThreads * tuning::kColumnSumLeastRows);
  return std::min(most, (int64_t)device().sms * tuning::kColumnSumBlocksPerSm);
}

void launch_part_products(DType dtype, const PartProducts& args, cudaStream_t stream) {
  const int64_t blocks = part_products_blocks(dtype, args.rows, args.length);
  if (blocks * args.of_parts * args.parts == 0) return;
  const dim3 grid((unsigned)blocks, (unsigned)std::min(kMostBlocksAlongY, ceil_div(args.of_parts, kTile)),
                  (unsigned)ceil_div(args.parts, kTile));
  const int64_t vectors = vectors_of(dtype, args.length), threads = threads_for(args.rows * vectors);
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch(part_products_kernel<T>, grid, dim3((unsigned)threads), 0, stream, args, vectors);
  });
}

}  // namespace rf::cuda
