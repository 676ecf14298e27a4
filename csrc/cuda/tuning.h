// What the CUDA kernels are tuned by: constants, each with its reason. None has been measured yet: they follow from the
// sizes of registers, shared memory and caches. `python -m regfast prove` prints what a GPU makes of them.
#pragma once
#include <cstdint>

#include "shared/types.h"

namespace rf::cuda::tuning {

// The largest power of two that is at most x, within [least, most], themselves powers of two.
constexpr int64_t power_of_two(int64_t x, int64_t least, int64_t most) {
  int64_t p = least;
  while (p < most && 2 * p <= x) p *= 2;
  return p;
}

// ---- rows: softmax and cross-entropy -------------------------------------------------------------------------------

// A row of up to 32 x 4 vectors of 16 bytes (1024 half-precision classes) is kept in the registers of a warp's lanes:
// 16 registers of 64, and four loads in flight per lane, 64 KiB per SM at half occupancy, where 3.3 TB/s times 700 ns
// over 132 SMs needs 18.
constexpr int kVectorsPerLane = 4;
constexpr int kLanesThreads = 128;

// Vectors that a thread of a longer row loads before it uses the first: the same four.
constexpr int kLoadsAhead = 4;

// Threads of a block per row: one for each 16 of its vectors, so that a thread has something to add up between the two
// barriers of a row; 64 KiB of a row take 256 threads, of which 80 registers each would fit an SM as often as 64 KiB
// do. 512 threads, all that a row of the whole shared memory gets, keep 32 KiB in flight.
constexpr int kMostThreads = 512, kLeastThreads = 128;
constexpr int64_t kVectorsPerThread = 16;

// A part of a row that is kept in shared memory: with 64 KiB at most, three blocks share an SM (227 KiB on sm_90), one
// loading while another waits at its barrier and a third writes. Longer rows are cut among a cluster's blocks.
constexpr int64_t kSharedPart = 64 << 10;
constexpr int kMostParts = 16, kMostPortableParts = 8;

// Few long rows are cut among a cluster's blocks as well, until there is a block for each SM or a part is so short that
// the cluster's two barriers (about 1 us) would take longer than it.
constexpr int64_t kLeastPartVectors = 1024;

// Vectors of a row for a block that writes without reducing: 64 KiB, so that reading the row's numbers first (two
// dependent loads, 1 us) is a tenth of its time even if nothing else ran on the SM.
constexpr int64_t kMapVectors = 4096;

// Rows of which the elements lie far apart: a warp's lanes are neighbouring rows, so that each load is of 64 or 128
// adjacent bytes; up to 8 warps divide a row's classes (with 16, registers do not suffice on sm_100
// and sm_120), and blocks have 128 threads at least. A thread loads 8 elements before it uses the first: 16 or 32 KiB
// in flight for half of an SM's threads.
constexpr int kColumnsThreads = 256, kColumnsBlock = 128, kElementsAhead = 8;

// Rows of losses that a block adds up, so that the second kernel, over the blocks' sums, has few to add; one block does
// up to so many alone.
constexpr int kTotalThreads = 512;
constexpr int64_t kTotalRows = 8192;

// ---- elementwise ---------------------------------------------------------------------------------------------------

// A vector of 16 bytes per thread: at full occupancy 32 KiB per SM are in flight, and 18 suffice (above).
constexpr int kElementwiseThreads = 256;

// Vectors that a thread adds up before its block does: 64 additions in float32 at most, each a load of its own, and a
// block's reduction (2 barriers, 1 us) for 32 KiB of each operand.
constexpr int kSumThreads = 256, kSumVectors = 8;

// Column sums: blocks for each SM (256 threads of 64 registers: four fill it); rows that a thread adds up at least, so
// that reducing over a block's threads is a small part; parts at most, which a column's second sum goes through in 32
// steps.
constexpr int kColumnSumBlocksPerSm = 4, kColumnSumLeastRows = 8, kColumnSumMostParts = 256;

// ---- phm_linear ----------------------------------------------------------------------------------------------------

// Rows are mixed as long as what they become takes so much, which stays in the L2 of the large GPUs (40 MB on A100, 50
// on H100) until it is multiplied; but so many mixed rows at least, whose tiles of 128 x 128 fill 132 SMs where S has
// 1024 rows.
constexpr int64_t kMixedBytes = 16 << 20, kLeastMixedRows = 2048;

// Parts of the result for which a thread reads each part of a row once, a vector of sums for each; and the square of
// parts whose products a block has, so that a thread reads 8 parts for 16 sums.
constexpr int kPhmParts = 8, kPhmTile = 4;

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// Bytes of K in a stage: two steps of the tensor core instructions, so that fragments of one are loaded while those of
// the other are multiplied.
constexpr int kGemmDepthBytes = 64;

// Tiles of C for a block and for a warp, stages of K, blocks that share an SM. Large: 4 warps of 64 x 64 read 4 KiB of
// shared memory for 32 instructions, half of what it delivers while an A100 executes them; 128 sums and 64 fragment
// registers a thread allow two blocks on an SM, and 3 stages (48 KiB) fit twice in the 100 KiB of sm_86, sm_89 and
// sm_120. In tf32 the fragments' conversion and, across K, their addresses need more registers than are left: 8 warps
// of 64 x 32 in one block instead, with the shared memory of two. Small: when large tiles would leave SMs idle; a
// fourth stage, since a block has a quarter of the arithmetic to hide a load behind.
struct GemmLarge {
  static constexpr int M = 128, N = 128, WarpM = 64, WarpN = 64, Stages = 3, Blocks = 2;
};
struct GemmLargeTf32 {
  static constexpr int M = 128, N = 128, WarpM = 64, WarpN = 32, Stages = 5, Blocks = 1;
};
struct GemmSmall {
  static constexpr int M = 64, N = 64, WarpM = 32, WarpN = 32, Stages = 4, Blocks = 2;
};

// Hopper's own kernel: a tile of two warpgroups' 64 rows each, as wide as wgmma is; 64 half elements of K are the 128
// bytes that the swizzle is over. A stage is 48 KiB of operands, and 4 of them leave 35 KiB of the 227 that a block can
// have. Through 32 of these results leave: each of 8 warps has two boxes of 16 rows by 64 columns (2 KiB), one of which
// it fills while the copy engine reads the other.
constexpr int kHopperTileM = 128, kHopperTileN = 256, kHopperDepth = 64, kHopperStages = 4, kHopperBoxesOut = 2;
// Blocks of a cluster, whose tiles lie below one another and share columns of B: each reads 32 KiB from L2 for a stage
// instead of 48, in the 1024 cycles that wgmma takes for it; L2 has about 30 bytes a cycle for each SM. Beyond so many
// rows of tiles, a last one alone in its cluster is a small part.
constexpr int kHopperCluster = 2, kHopperLeastTiles = 8;
// Of 65536 registers: launch bounds give each thread 168, which the producers hand over.
constexpr int kHopperProducerRegisters = 40, kHopperConsumerRegisters = 232;

// The same without tensor cores (float32 without tf32, float64): 16 x 16 threads, each with 8 x 8 sums of a large tile.
constexpr int kSimtSide = 16;
struct SimtLarge {
  static constexpr int M = 128, N = 128, Depth = 8, Stages = 3;
};
struct SimtSmall {
  static constexpr int M = 64, N = 64, Depth = 8, Stages = 4;
};

// Tiles down before the next to the right: with 8, the 216 blocks that an A100 runs at a time share 8 + 27 panels of
// 128 rows or columns instead of 216 / N's + all of them.
constexpr int kGemmGroup = 8;

// K is split where tiles alone do not fill the SMs, into no more parts than fill them once, with at least so many
// stages in each: the sums of a part go through memory, 8 bytes for each of C, against 2 * kDepth * stages products.
constexpr int kGemmBlocksPerSm = 2;
constexpr int64_t kGemmLeastStages = 16;
constexpr int64_t kGemmMostSplits = 64;
// Threads of a block that adds up the parts, a vector of C each.
constexpr int kFinishThreads = 256;

// Whose GEMM takes a product: ATen's, until `python -m regfast prove` has found another to be right and faster on the
// GPU at hand, for an arithmetic and a size. REGFAST_CUDA_GEMM=aten|sm80|sm90 overrides what it found.
enum class GemmKernel : uint8_t { aten, sm80, sm90 };
constexpr const char* kGemmKernelNames[] = {"aten", "sm80", "sm90"};

// Sizes that have their own winner: skinny products are bound by reading the long operand, small ones fill no more than
// a wave or two of tiles (2^32 multiplications are 0.03 ms of an A100's tensor cores), large ones run at the peak.
enum class GemmSize { skinny, small, large };
constexpr const char* kGemmSizeNames[] = {"skinny", "small", "large"};
constexpr int kGemmSizes = 3;
constexpr int64_t kGemmSkinny = 64, kGemmSmall = int64_t(1) << 32;
constexpr GemmSize gemm_size(int64_t m, int64_t n, int64_t k) {
  return (m < n ? m : n) <= kGemmSkinny         ? GemmSize::skinny
         : m * n < kGemmSmall / (k > 0 ? k : 1) ? GemmSize::small
                                                : GemmSize::large;
}

}  // namespace rf::cuda::tuning
