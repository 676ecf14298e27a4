// The matrix product on tensor cores since sm_80: bf16, fp16 and tf32. A pipeline of cp.async stages brings 64 bytes of
// K at a time to shared memory, swizzled so that neither the copies nor ldmatrix conflict; warps multiply with mma.sync
// from fragments, A's loaded one step ahead; sums leave through shared memory in 16-byte pieces. Operands that cannot
// be copied 16 bytes at a time (alignment, strides) are gathered element by element into the same layout.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/device/epilogue.cuh"
#include "cuda/device/gemm_tile.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/gemm.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  ptx::mma_tf32(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_f16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  ptx::mma_bf16(d, a, b);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// Shape: one of tuning.h's.
template <class T, class Shape, GemmLoad load>
struct Config {
  static constexpr int kThreads = Shape::M / Shape::WarpM * (Shape::N / Shape::WarpN) * 32;
  static constexpr Memory kMemoryA = load == GemmLoad::elements        ? Memory::elements
                                     : load == GemmLoad::across_across ? Memory::across_k
                                                                       : Memory::along_k;
  static constexpr Memory kMemoryB = load == GemmLoad::elements      ? Memory::elements
                                     : load == GemmLoad::along_along ? Memory::along_k
                                                                     : Memory::across_k;
  using TileA = Tile<T, Shape::M, kMemoryA, kThreads>;
  using TileB = Tile<T, Shape::N, kMemoryB, kThreads>;
  static_assert(free_of_conflicts<TileA>() && free_of_conflicts<TileB>(), "fragments are loaded at full speed");
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  // Rows of a warp's tile that leave at a time; eight words between rows keep the banks apart.
  static constexpr int kRoundRows = 32, kStagingStride = Shape::WarpN + 8;
  static constexpr int kStagingFloats = kRoundRows * kStagingStride;
  static constexpr int kSharedBytes = Shape::Stages * kStageBytes;
  static_assert(Shape::WarpM % kRoundRows == 0 && Shape::WarpN % 16 == 0, "warp tiles are loaded 16 wide, stored 32");
  static_assert(kThreads / 32 * kStagingFloats * 4 <= kSharedBytes, "staging takes the place of the stages");
  static_assert(Shape::Blocks * (kSharedBytes + 1024) <= 100 << 10, "the SM with the least shared memory, sm_86's");
};

template <class T, class Shape, GemmLoad load>
__global__ void __launch_bounds__(Config<T, Shape, load>::kThreads, Shape::Blocks) gemm_sm80(GemmTask task) {
  using C = Config<T, Shape, load>;
  // Rows of C are those of A, columns rows of B: both tiles are 'mn x k', whichever lies along memory.
  using TileA = typename C::TileA;
  using TileB = typename C::TileB;
  constexpr int kRowTiles = Shape::WarpM / 16, kColumnTiles = Shape::WarpN / 16;
  constexpr int kSteps = kDepthBytes / kStepBytes, kStages = Shape::Stages;
  char* const shared = ptx::dynamic_shared<char>();

  // Blocks that run at one time take tiles of few rows and few columns: what they share stays in L2.
  const auto [tile_row, tile_column] = tile_position<tuning::kGemmGroup>(blockIdx.x, (task.m + Shape::M - 1) / Shape::M,
                                                                         (task.n + Shape::N - 1) / Shape::N);
  const int64_t row0 = tile_row * Shape::M, column0 = tile_column * Shape::N;
  // K in parts where tiles are too few for the SMs; finish_split adds them in order.
  const int64_t k_begin = blockIdx.y * task.k_per_split;
  const int64_t k_count = task.k - k_begin < task.k_per_split ? task.k - k_begin : task.k_per_split;
  const int k_tiles = (int)((k_count + kDepth<T> - 1) / kDepth<T>);
  // The rest of K is filled with zeros, which add nothing.
  const int last_depth = (int)(k_count - (int64_t)(k_tiles - 1) * kDepth<T>);
  TileA a(task.a, row0, task.m, k_begin);
  TileB b(task.b, column0, task.n, k_begin);
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  const int warp_row = warp % (Shape::M / Shape::WarpM) * Shape::WarpM;
  const int warp_column = warp / (Shape::M / Shape::WarpM) * Shape::WarpN;

  // All sums of a warp's tile stay in registers over all of K.
  float sum[kRowTiles][2 * kColumnTiles][4] = {};
  uint32_t fragment_a[2][kRowTiles][4], fragment_b[kColumnTiles][4];  // A's are loaded a step ahead; B's would spill
  const auto fetch = [&](char* stage, int t) {
    if (t < k_tiles) {
      const int depth = t + 1 < k_tiles ? kDepth<T> : last_depth;
      a.fetch(stage, depth);
      b.fetch(stage + TileA::kBytes, depth);
    }
    ptx::cp_async_commit();  // empty groups too: the count of groups tells which tile has arrived
  };
  const auto load_a = [&](const char* stage, int step) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) TileA::load(fragment_a[step % 2][i], stage, warp_row + i * 16, step);
  };
  const auto load_b = [&](const char* stage, int step) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
      TileB::load(fragment_b[j], stage + TileA::kBytes, warp_column + j * 16, step);
  };

  // As many stages under way as hide memory's latency behind the products of the others.
  for (int t = 0; t < kStages - 1; ++t) fetch(shared + t * C::kStageBytes, t);
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();
  int reading = 0, filling = (kStages - 1) * C::kStageBytes;  // stages, as offsets
  if (k_tiles > 0) load_a(shared, 0);
  for (int t = 0; t < k_tiles; ++t) {
    // Into the stage that everyone left at the last barrier; one barrier for a stage is then enough.
    fetch(shared + filling, t + kStages - 1);
    filling = reading;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_b(shared + reading, step);
      if (step + 1 < kSteps) {
        load_a(shared + reading, step + 1);
      } else {
        // Tile t + 1 is here, and no one reads the stage of tile t any more but from registers.
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();
        reading = reading == (kStages - 1) * C::kStageBytes ? 0 : reading + C::kStageBytes;
        if (t + 1 < k_tiles) load_a(shared + reading, 0);
      }
#pragma unroll
      for (int j = 0; j < 2 * kColumnTiles; ++j) {
        // ldmatrix brings two columns of fragments at a time.
        const uint32_t column[2] = {fragment_b[j / 2][j % 2], fragment_b[j / 2][2 + j % 2]};
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) multiply(sum[i][j], fragment_a[step % 2][i], column, T());
      }
    }
  }
  // No copy may come late into what is now the staging's memory.
  ptx::cp_async_wait<0>();
  __syncthreads();

  // Through shared memory, so that a lane holds neighbouring columns: its own warp's part, 32 rows at a time.
  constexpr int kLanesPerRow = Shape::WarpN / kWidth<T>;
  float* staging = (float*)shared + warp * C::kStagingFloats;
  const int lane_column = lane % kLanesPerRow * kWidth<T>;
  const int64_t column = column0 + warp_column + lane_column;
  float bias[kWidth<T>];
  load_bias<T>(task.out, column, task.n, bias);
  // Rounds, since a warp's whole tile in float32 is more than the stages hold.
#pragma unroll
  for (int round = 0; round < Shape::WarpM / C::kRoundRows; ++round) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kColumnTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* pair = sum[round * 2 + i][j] + 2 * half;
          float* to = staging + (i * 16 + half * 8 + lane / 4) * C::kStagingStride + j * 8 + lane % 4 * 2;
          *(float2*)to = make_float2(pair[0], pair[1]);
        }
    __syncwarp();
    // Not unrolled: its addresses beside the sums would spill.
#pragma unroll 1
    for (int r = lane / kLanesPerRow; r < C::kRoundRows; r += 32 / kLanesPerRow) {
      const int64_t row = row0 + warp_row + round * C::kRoundRows + r;
      // Rows and columns beyond C were multiplied as zeros.
      if (row >= task.m || column >= task.n) continue;
      const float4* from = (const float4*)(staging + r * C::kStagingStride + lane_column);
      float x[kWidth<T>];
#pragma unroll
      for (int i = 0; i < kWidth<T> / 4; ++i) {
        const float4 four = from[i];
        memcpy(x + 4 * i, &four, sizeof four);
      }
      if (task.partial)
        keep_partial<T>((float*)task.partial + blockIdx.y * task.m * task.n, row, column, task.n, x);
      else
        finish<T>(task.out, row, column, task.n, bias, x);
    }
    __syncwarp();
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------------

template <class T, class Shape, GemmLoad load>
void start(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  using C = Config<T, Shape, load>;
  const int64_t tiles = ((task.m + Shape::M - 1) / Shape::M) * ((task.n + Shape::N - 1) / Shape::N);
  launch(gemm_sm80<T, Shape, load>, dim3((unsigned)tiles, (unsigned)plan.splits), dim3(C::kThreads), C::kSharedBytes,
         stream, task);
}

template <class T, GemmLoad load>
void start_shape(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  using Large = std::conditional_t<sizeof(T) == 4, tuning::GemmLargeTf32, tuning::GemmLarge>;
  if constexpr (load != GemmLoad::elements)
    // Operands that are gathered element by element have the small tile alone.
    if (plan.tile_m == Large::M) return start<T, Large, load>(task, plan, stream);
  start<T, tuning::GemmSmall, load>(task, plan, stream);
}

template <class T>
void start_load(const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  switch (plan.load) {
    case GemmLoad::elements:
      return start_shape<T, GemmLoad::elements>(task, plan, stream);
    case GemmLoad::along_along:
      return start_shape<T, GemmLoad::along_along>(task, plan, stream);
    case GemmLoad::along_across:
      return start_shape<T, GemmLoad::along_across>(task, plan, stream);
    case GemmLoad::across_across:
      return start_shape<T, GemmLoad::across_across>(task, plan, stream);
  }
}

}  // namespace

void launch_gemm_sm80(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream) {
  switch (dtype) {
    case DType::bf16:
      return start_load<__nv_bfloat16>(task, plan, stream);
    case DType::f16:
      return start_load<__half>(task, plan, stream);
    default:
      return start_load<float>(task, plan, stream);
  }
}

}  // namespace rf::cuda
