// The matrix product on Hopper, for bf16 and fp16. A block stays on its SM and takes one 128 x 256 tile of C after
// another: one thread has the copy engine bring stages of both operands, two warpgroups multiply them with wgmma, and
// the stages of the next tile arrive while the sums of this one leave, by the copy engine again. The blocks of a
// cluster take tiles below one another, whose columns of B each of them copies a part of to all. Off until it has been
// measured.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/results_sm90.cuh"
#include "cuda/gemm.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

constexpr int kTileM = tuning::kHopperTileM, kTileN = tuning::kHopperTileN, kDepth = tuning::kHopperDepth;
constexpr int kStages = tuning::kHopperStages;
constexpr int kWarpgroup = 128, kConsumers = kTileM / 64, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBytesA = kTileM * kDepth * 2, kBytesB = kTileN * kDepth * 2, kStageBytes = kBytesA + kBytesB;
constexpr int kBlockBytes = 64 * kDepth * 2;  // 64 rows (columns) of an operand, whichever way its memory runs
constexpr int kStagingBytes = kConsumers * 4 * kBoxesOut * kBoxBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kStagingBytes + 2 * kStages * (int)sizeof(uint64_t);
static_assert(kSharedBytes <= 227 << 10, "all of Hopper's shared memory that a block can have");
static_assert(kStageBytes % 1024 == 0, "the swizzle's pattern repeats after 1024 bytes");
constexpr int kProducerRegisters = tuning::kHopperProducerRegisters;
constexpr int kConsumerRegisters = tuning::kHopperConsumerRegisters;

// Stages in turn; the parity of the current use of each of them.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class T, bool a_across, bool b_across>
__device__ __forceinline__ void multiply(float (&sum)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::wgmma_f16<a_across, b_across>(sum, a, b, add);
  else
    ptx::wgmma_bf16<a_across, b_across>(sum, a, b, add);
}

// `span` rows (columns) from `mn` on by the stage's K, to this block or to all of the cluster. Across K a box is 64
// elements wide: one for each block.
template <bool across>
__device__ __forceinline__ void copy_operand(int cluster, char* to, const CUtensorMap* map, int mn, int span, int k,
                                             uint64_t* arrived) {
  const auto copy = [&](char* part, int x, int y) {
    if (cluster > 1)
      ptx::copy_box_to((uint16_t)((1 << cluster) - 1), part, map, x, y, arrived);
    else
      ptx::copy_box(part, map, x, y, arrived);
  };
  if constexpr (across) {
    for (int block = 0; block < span / 64; ++block) copy(to + block * kBlockBytes, mn + block * 64, k);
  } else {
    copy(to, k, mn);
  }
}

// 16 of K in the operand's stage from `tile` on, as wgmma is told of a matrix that is swizzled over 128 bytes: where it
// begins, bytes from one block of 64 elements across K to the next (of no meaning where rows run along K), and from 8
// rows of memory to the next 8.
template <bool across>
__device__ __forceinline__ uint64_t descriptor(const char* tile, int step) {
  const auto field = [](uint64_t bytes) { return bytes >> 4 & 0x3fff; };
  return field(ptx::shared_address(tile + step * (across ? 16 * 128 : 32))) | field(across ? kBlockBytes : 16) << 16 |
         field(8 * 128) << 32 | uint64_t(1) << 62;
}

template <class T, bool a_across, bool b_across>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
              const __grid_constant__ Results results, GemmTask task) {
  if constexpr (ptx::kHopper) {
    char* const shared = ptx::dynamic_shared<char>();
    uint64_t* const arrived = (uint64_t*)(shared + kStages * kStageBytes + kStagingBytes);
    uint64_t* const consumed = arrived + kStages;
    const int cluster = (int)ptx::cluster_size(), rank = (int)ptx::cluster_rank();
    if (threadIdx.x == 0) {
      ptx::prefetch_map(&map_a);
      ptx::prefetch_map(&map_b);
      if (results.by_engine) ptx::prefetch_map(&results.c);
      for (int s = 0; s < kStages; ++s) {
        ptx::mbarrier_init(arrived + s, 1);
        ptx::mbarrier_init(consumed + s, cluster * kConsumers * 4);  // each warp of all blocks that it is copied for
      }
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();

    const int64_t rows_m = (int64_t)kTileM * cluster;
    const int64_t tiles_m = (task.m + rows_m - 1) / rows_m, tiles_n = (task.n + kTileN - 1) / kTileN;
    const int64_t tiles = tiles_m * tiles_n, first = blockIdx.x / cluster, step = gridDim.x / cluster;
    const int k_tiles = (int)((task.k + kDepth - 1) / kDepth);
    const int warpgroup = (int)threadIdx.x / kWarpgroup;
    Ring ring;
    if (warpgroup == 0) {
      ptx::fewer_registers<kProducerRegisters>();
      const int part = kTileN / cluster;  // of B's columns
      for (int64_t index = first; index < tiles && threadIdx.x == 0; index += step) {
        const TilePosition tile = tile_position<tuning::kGemmGroup>(index, tiles_m, tiles_n);
        for (int t = 0; t < k_tiles; ++t, ring.advance()) {
          ptx::mbarrier_wait_for_cluster(consumed + ring.stage, ring.parity ^ 1);  // the first time round it is free
          ptx::mbarrier_arrive_expect(arrived + ring.stage, kStageBytes);
          char* stage = shared + ring.stage * kStageBytes;
          copy_operand<a_across>(1, stage, &map_a, ((int)tile.row * cluster + rank) * kTileM, kTileM, t * kDepth,
                                 arrived + ring.stage);
          copy_operand<b_across>(cluster, stage + kBytesA + rank * part * kDepth * 2, &map_b,
                                 (int)tile.column * kTileN + rank * part, part, t * kDepth, arrived + ring.stage);
        }
      }
      __syncwarp();
    } else {
      ptx::more_registers<kConsumerRegisters>();
      const int warp = (int)threadIdx.x / 32 - kWarpgroup / 32, first_row = (warpgroup - 1) * 64;
      const int lane = (int)threadIdx.x % 32;
      WarpResults<T> out = {task, results, shared + kStages * kStageBytes + warp * kBoxesOut * kBoxBytes};
      const auto signal = [&](int stage) {
        if (lane < cluster) ptx::mbarrier_arrive_at(consumed + stage, lane);
      };
      for (int64_t index = first; index < tiles; index += step) {
        const TilePosition tile = tile_position<tuning::kGemmGroup>(index, tiles_m, tiles_n);
        float sum[128];
        int previous = 0;
        for (int t = 0; t < k_tiles; ++t, ring.advance()) {
          ptx::mbarrier_wait(arrived + ring.stage, ring.parity);
          const char* stage = shared + ring.stage * kStageBytes;
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < kDepth / 16; ++k)
            multiply<T, a_across, b_across>(sum, descriptor<a_across>(stage + (warpgroup - 1) * kBlockBytes, k),
                                            descriptor<b_across>(stage + kBytesA, k), t > 0 || k > 0);
          ptx::wgmma_commit();
          // The products of the stage before this one are complete, those of this one may go on.
          ptx::wgmma_wait<1>();
          if (t > 0) signal(previous);
          previous = ring.stage;
        }
        ptx::wgmma_wait<0>();
        signal(previous);
        out.write(sum, (tile.row * cluster + rank) * kTileM + first_row + warp % 4 * kRowsOut, tile.column * kTileN);
      }
      out.finish();
    }
    // While others of the cluster copy to this block's memory or arrive at its barriers, it has to be there.
    ptx::cluster_sync();
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------------

// Whether code for sm_90a is in this build. kernels.py adds no PTX of 9.0 without it.
constexpr bool built_for_hopper() {
#ifdef __CUDA_ARCH_LIST__
  for (int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
#endif
  return false;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function by its name, so that the library needs no driver to be loaded.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    constexpr unsigned kFirstVersion = 12000;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kFirstVersion, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (EncodeTiled)found : nullptr;
  }();
  return function;
}

// How the copy engine sees a matrix: rows of memory, in boxes that are 128 bytes wide. False where it cannot.
template <class T>
bool make_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows, CUtensorMap* map) {
  const int64_t pitch = row_stride * (int64_t)sizeof(T);
  if (pitch % 16 || (uintptr_t)data % 16 || row_stride < columns) return false;
  const cuuint64_t extent[] = {(cuuint64_t)columns, (cuuint64_t)rows}, stride[] = {(cuuint64_t)pitch};
  const cuuint32_t box[] = {64, (cuuint32_t)box_rows}, every[] = {1, 1};
  constexpr auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled()(map, type, 2, const_cast<void*>(data), extent, stride, box, every,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
template <class T>
bool make_map(const GemmOperand& o, int64_t mn, int64_t k, int span, CUtensorMap* map) {
  if (o.view.inner != 1 || o.view.col_stride != 1) return false;
  return o.across_k ? make_map<T>(o.view.data, k, mn, o.view.outer_stride, kDepth, map)
                    : make_map<T>(o.view.data, mn, k, o.view.outer_stride, span, map);
}

// Where C's rows do not lie at 16 bytes, lanes write them.
template <class T>
Results make_results(const GemmTask& task) {
  Results r = {};
  const auto map = [&](const void* matrix, CUtensorMap* to) {
    return make_map<T>(matrix, task.m, task.n, task.out.c_stride, kRowsOut, to);
  };
  r.by_engine = map(task.out.c, &r.c) && (!task.out.preactivation || map(task.out.preactivation, &r.preactivation));
  return r;
}

template <class T>
bool start(const GemmTask& task, cudaStream_t stream) {
  const int64_t tiles_m = (task.m + kTileM - 1) / kTileM, tiles_n = (task.n + kTileN - 1) / kTileN;
  // Of an odd number of rows of tiles the last leaves a half of its clusters idle.
  constexpr int kMost = tuning::kHopperCluster;
  const int cluster = tiles_m % kMost == 0 || tiles_m > tuning::kHopperLeastTiles ? kMost : 1;
  CUtensorMap a, b;
  if (!make_map<T>(task.a, task.m, task.k, kTileM, &a) || !make_map<T>(task.b, task.n, task.k, kTileN / cluster, &b))
    return false;
  const int64_t clusters =
      std::min<int64_t>((tiles_m + cluster - 1) / cluster * tiles_n, std::max(1, device().sms / cluster));
  const dim3 grid((unsigned)(clusters * cluster));
  const auto kernel = task.a.across_k ? (task.b.across_k ? gemm_sm90<T, true, true> : gemm_sm90<T, true, false>)
                                      : (task.b.across_k ? gemm_sm90<T, false, true> : gemm_sm90<T, false, false>);
  launch_cluster(kernel, cluster, grid, dim3(kThreads), kSharedBytes, stream, a, b, make_results<T>(task), task);
  return true;
}

}  // namespace

bool launch_gemm_sm90(DType dtype, const GemmTask& task, cudaStream_t stream) {
  if (!built_for_hopper() || device().arch != 90 || !encode_tiled()) return false;
  // Coordinates are of 32 bits.
  if (task.k == 0 || std::max({task.m, task.n, task.k}) > INT_MAX - kTileN) return false;
  if (dtype == DType::bf16) return start<__nv_bfloat16>(task, stream);
  if (dtype == DType::f16) return start<__half>(task, stream);
  return false;
}

}  // namespace rf::cuda
