// Every tuning constant of the CUDA kernels, each with its reason. None has been measured yet: they follow from the
// sizes of registers, shared memory and caches, and `make gpu` is to confirm or correct them.
#pragma once
#include <cstdint>

#include "../cpu/types.h"

namespace rf::cuda::tuning {

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// Bytes of K in a stage: two steps of the tensor core instructions, so that fragments of one are loaded while those of
// the other are multiplied.
constexpr int kGemmDepthBytes = 64;

// Tiles of C for a block and for a warp. Large: 4 warps of 64 x 64 read 4 KiB of shared memory for 32 instructions, half
// of what it delivers while an A100 executes them; 128 sums and 64 fragment registers a thread allow two blocks on an SM,
// and 3 stages (48 KiB) fit twice in the 100 KiB of sm_86, sm_89 and sm_120. Small: when large tiles would leave SMs
// idle; a fourth stage, since a block has a quarter of the arithmetic to hide a load behind.
struct GemmLarge {
  static constexpr int M = 128, N = 128, WarpM = 64, WarpN = 64, Stages = 3;
};
struct GemmSmall {
  static constexpr int M = 64, N = 64, WarpM = 32, WarpN = 32, Stages = 4;
};

// The same without tensor cores (float32 without tf32, float64): 16 x 16 threads, an eighth of M or N each way.
struct SimtLarge {
  static constexpr int M = 128, N = 128, Depth = 8, Stages = 3;
};
struct SimtSmall {
  static constexpr int M = 64, N = 64, Depth = 8, Stages = 4;
};

// Tiles down before the next to the right: with 8, the 216 blocks that an A100 runs at a time share 8 + 27 panels of
// 128 rows or columns instead of 216 / N's + all of them.
constexpr int kGemmGroup = 8;

// K is split where tiles alone do not fill the SMs, into no more parts than fill them once, with at least so many stages
// in each: the sums of a part go through memory, 8 bytes for each of C, against 2 * kDepth * stages products.
constexpr int kGemmBlocksPerSm = 2;
constexpr int64_t kGemmLeastStages = 16;
constexpr int64_t kGemmMostSplits = 64;

// Whose GEMM takes a product. A row is added here when `make gpu` has measured it, with the figure and the results file;
// until then all products are ATen's. REGFAST_CUDA_GEMM=aten|sm80|sm90 overrides the table.
enum class GemmKernel { aten, sm80, sm90 };
constexpr GemmKernel gemm_kernel(int /*arch*/, DType, bool /*tf32*/, int64_t /*m*/, int64_t /*n*/, int64_t /*k*/) {
  return GemmKernel::aten;
}

}  // namespace rf::cuda::tuning
