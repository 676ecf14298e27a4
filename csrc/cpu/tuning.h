// What the CPU's kernels and drivers are tuned by: constants, each with its reason. The fuzzer draws sizes around them.
#pragma once
#include <cstdint>

#include "shared/types.h"

namespace rf::tuning {

// Softmax family: vectors of a row handled at a time. On AVX-512 they are 8 KiB of floats: the maximum's pass leaves
// them in L1 for the exponentials' pass, together with a staged copy of half-precision or soft-capped logits and one of
// weights. A lane of a row's sum has half as many additions, since there are two of them.
constexpr int64_t kBlockVectors = 128;

// Additions of a lane of any other sum before it is put aside in double precision. Of equal terms, of which each
// addition may err to the same side, 128 were off by 8 eps, 32 by 3.
constexpr int64_t kSumVectors = 32;

// What forward leaves for backward of a row (kernels/cross_entropy.inl.h): an exponential of each class, and the
// maximum so far of each block of classes, of which there are no more than this.
constexpr int64_t exponentials_of_row(int64_t classes) { return classes + classes / kBlockVectors + 1; }

// Rows gathered at a time when classes are not adjacent in memory: one 64-byte line of floats.
constexpr int64_t kTileRows = 16;
// Room for a tile each of logits, probabilities and the probabilities' gradient, in either accumulator type.
constexpr int64_t tile_scratch_bytes(int64_t classes) { return 3 * kTileRows * classes * 8; }

// So few rows of a tile are gathered and scattered one by one: squares of vectors would be empty but for a few lanes.
constexpr int64_t kRowByRow = 2;

// Classes that are not adjacent in memory, while rows are: up to this many, softmax takes a vector of rows at a time
// where they lie; more would be read again from memory, and it goes through tiles of kFewColumns classes, twice. Where
// each class goes on is asked for so many vectors ahead: (2, 32, 171, 115), Zen 4, one core: 1.33 ms without, 0.60.
constexpr int64_t kLaneClasses = 512, kLaneAhead = 4;

// Rows of up to kFewColumns classes, or features and outputs of a layer, are handled a vector of rows at a time: one of
// 10 classes would leave a vector's lanes idle and pay for two reductions (37 ns a row, against 12). They are
// transposed into tiles of kLaneRows rows, so that each is read once, a few lines of a class at a time, however far
// classes are apart: in planes of 2^16 bytes, 21 of them fall into one set of every cache. softmax's backward of (4,
// 21, 128, 128), Zen 5, one core: 754 us in tiles of 32 rows, 457 of 64, 528 of 128. Products have both sides short up
// to kFewSides.
constexpr int64_t kFewColumns = 64, kFewSides = 32, kLaneRows = 64;
// Of adjacent classes, softmax has a lane to a row up to so many, longer rows are held in registers or read by blocks:
// 2000 rows of 17 take 26 us so and 29 in registers, of 24 28 both, of 32 36 and 29; log-softmax of 24 31 and 44, of 48
// 57 and 53 (float32, Zen 4, one core). Backward, which has no maximum to find, of 32 0.20 ms so and 0.11 row by row,
// of 24 0.13 and 0.14 (40,000 rows, Zen 5, 2 cores).
constexpr int64_t kLaneForward = 24, kLaneLonger = 48, kLaneBackward = 24;  // kLaneLonger: beyond the registers
// From so many classes on, rows of adjacent classes are transposed by squares of vectors, below by single numbers.
constexpr int64_t kLoadSquares = 3, kStoreSquares = 5;
// Up to so many classes, or with planes that are not whole pages apart, a vector's classes stay in L1 where they lie.
constexpr int64_t kCacheWays = 8, kPageBytes = 4096;
// Products of fewer rows than kLeastLanes would leave lanes idle. Sums over rows are taken over so many at a time, for
// any number of threads.
constexpr int64_t kLeastLanes = 16, kLaneSumRows = 2048;
// Up to so many columns, dot products of rows of a few vectors are taken one column after another, and take less than
// lanes if rows have more bytes, as the accumulator's type: 10048 x 15 -> 1 of doubles, Zen 4, one core, 20 us and 46,
// of float32 14 and 28, of bfloat16 12 and 26; x 8 -> 3 37 and 41, 47 and 34, 37 and 27.
constexpr int64_t kShortDots = 4, kShortDotBytes = 32;
// Rows of up to so many columns leave dot products with a lane to a row; longer ones are whole vectors.
constexpr int64_t kLaneOutputs = 8;
// What a row of them costs besides its classes' exponentials, counted in these.
constexpr int64_t kRowElements = 16;

// A row up to this many accumulator bytes is exponentiated once and scaled while still in L2; longer rows are cheaper
// to exponentiate twice than to read back.
constexpr int64_t kCachedRowBytes = 256 * 1024;

// Rows whose sums' logarithms are taken together are read again after that, from L1.
constexpr int64_t kRowGroupBytes = 16 * 1024;

// mse_loss copies elements that are not adjacent together by itself, so many at a time, which stay in L1: runs of so
// many at least, and no further apart than so many numbers, that lines of memory are used. Up to kShortRun numbers are
// copied by moves.
constexpr int64_t kGatherPiece = 2048, kGatherRun = 2, kGatherStep = 4;
// Where nothing is added up, runs of kLongRun numbers are read in place.
constexpr int64_t kLongRun = 256;
constexpr int kShortRun = 16;

// Elements below which a second thread costs more than it brings (a fork and join of the pool is about 3 us, and a
// core does about four exponentials a nanosecond).
constexpr int64_t kParallelElements = 16 * 1024;

// Partial sums are taken over blocks of rows whose size depends on the shape alone, never on the number of threads, so
// that sums have the same bits with any number of them.
constexpr int64_t kSumRows = 1024;
constexpr int64_t rows_per_sum(int64_t classes) {
  int64_t rows = 32768 / (classes > 0 ? classes : 1);
  return rows < 1 ? 1 : rows > kSumRows ? kSumRows : rows;
}
constexpr int64_t kSumElements = 16 * 1024;

// Terms that one accumulator lane adds up before its sum is put aside, where K or the number of rows is not blocked for
// other reasons: rounding errors grow with the length of a chain of additions.
constexpr int64_t kChain = 128;
constexpr int64_t kColumnSumRows = 32;

// Results from this size on lie in buffers that are kept when they are freed (large_buffers.cpp), and on huge pages: at
// first touch these cost a quarter (Zen 3, 32 MB: 2.4 against 11 ms) to a half (Sapphire Rapids, 500 MB: 45 against 96
// ms) of small ones, but where a hypervisor takes back free huge pages 32 MB have taken 42 ms. Of smaller results,
// malloc keeps the memory.
constexpr int64_t kLargeBytes = 4 << 20;
// Buffers that are kept: at most this share of the machine's memory, for as many seconds; one is taken for a result
// that is smaller by up to this part.
constexpr int64_t kKeptShareOfMemory = 8, kKeptSeconds = 30, kBufferSlack = 4;

// Outputs from this size on are written past the caches. Smaller ones are likely to be read from them next.
constexpr int64_t kStreamBytes = 64 << 20;

// Products of pairs of bf16 take subnormal numbers for zero and round factors that are not bf16. ATen's take the
// library that does so beyond as many multiplications, and so do we; fewer take no time either way.
constexpr int64_t kFewPairs = 16 * 16 * 16;

// Register tiles of the GEMM: rows x vectors accumulators, one row of B and a broadcast of A fill the registers (16 on
// AVX2; 32 on AVX-512 and NEON). The scalar tile only bounds the loop overhead.
// dot_rows: rows of the longer side that a dot product of unpacked rows keeps in registers, times 4 of the shorter one.
struct RegisterTile {
  int rows, vectors, dot_rows;
};
constexpr RegisterTile kTileScalar = {4, 4, 2}, kTileAvx2 = {6, 2, 3}, kTileAvx512 = {14, 2, 4}, kTileNeon = {8, 3, 4};

// Multiplications that are worth another thread: it does 50 to 100 a nanosecond, and takes about 3 us to join.
constexpr double kProductsPerThread = 400e3;
// AMX does ten times as many: 128^3 takes 9 us on one thread and 19 on two, 300 x 128 -> 300 46 either way.
constexpr double kAmxProductsPerThread = 10e6;

// Of what takes the place of ATen's in half types: numbers of an image's patches made at a time, for one image at
// least; scores of attention made at a time, which stay in L2 twice, for so many rows of queries at least.
constexpr int64_t kPatchNumbers = 1 << 21, kScores = 1 << 16, kScoreRows = 32;

// GEMM: the micro-kernel's chain of additions, cut for the sake of rounding errors and so that a chain of a panel of B
// (16 KiB on AVX2) stays in L1 while rows of A pass by from L2. On Zen 3, 192 to 1024 are within 2% of each other; a
// chain costs 25 ns beside its 500.
constexpr int64_t kGemmChain = 256;
// Up to so many slots of K, storing C takes longer than multiplying: its tiles do not wait for the rest of their block.
constexpr int64_t kShortK = 64;
// Rows of A and of B's panels that are multiplied at a time: one chain of both and their tiles' sums take 280 KiB of
// L2.
constexpr int64_t kBlockRows = 96, kGroupColumns = 128;
// The same of AMX, whose products take a tenth of the time that loads and stores of their sums go with. Sapphire
// Rapids, one core, 2048 x 1024 x 4096: 2 to 5% more than by 96 rows and 128 columns, 4% more than in chains of 256.
constexpr int64_t kAmxChain = 512, kAmxBlockRows = 64, kAmxGroupColumns = 512;
// A W in place, whose C is transposed, takes less than a packed one if K is so many times as long as C has rows.
constexpr int64_t kRowsOfTransposed = 4;
// Where K is short, so many columns of a register tile's rows are finished while they are in L1.
constexpr int64_t kAmxShortColumns = 256;
// Where C is computed transposed, so many tiles are turned into pieces of C's rows at a time: on AVX2 96 numbers, whole
// lines of memory, of each of 16 rows, whose strip of 7 KiB leaves room for the tiles in L1.
constexpr int64_t kStripTiles = 16;
// K blocks. Sums wait in C between them: where nothing is copied for a block it may be long; the longer side's panels,
// 512 columns of a block, take 512 KiB.
constexpr int64_t kBlockKInPlace = 4096, kBlockK = 256;
// The same where rows of that side lie along k: then K blocks may be deep, and C's half-type sums wait less often.
constexpr int64_t kDeepBlockK = 1024, kDeepTaskColumns = 128;
// Columns that are packed for all threads at a time: 2 MiB at K = 1024. 2048 of them were 5 to 10% slower.
constexpr int64_t kPackedColumns = 512;
// What is packed for all threads at a time takes at most this part of the last-level cache.
constexpr int64_t kCacheShare = 4;
// Where the system does not tell its caches' sizes.
constexpr int64_t kUsualL2 = 512 << 10, kUsualLastLevelCache = 8 << 20;
// Tasks to a thread, so that one that is held up leaves its work to the others; at least so many of A's tiles and at
// most so many columns to a task. Where A has few rows, a thread has one task: packing decides, and on rows that are a
// page apart it takes half as long in pieces of 2 KiB as of 512 bytes.
constexpr int64_t kTasksPerThread = 8, kTaskTiles = 8, kTaskColumns = 512, kPackingDecides = 256;
// Up to so many columns of a W across K, each task takes whole groups of them: narrower pieces would read X's rows,
// long and in memory, once for each (480 x 32000 -> 256: 59 to 65% of the peak).
constexpr int64_t kNarrowColumns = 256;
// Up to so many outputs (a few dozen register tiles, neither side long) K is cut into parts of at least kSplitK.
constexpr int64_t kSplitOutputs = 4096, kSplitSide = 128, kSplitK = 4096, kMostSplits = 16;
// Elements to a packing task.
constexpr int64_t kPackTask = 16 * 1024;
// Rows across K are packed so many k at a time: a line of a row is read once, and 4 lines of a panel are written.
// Rows lie on pages of their own, where no prefetcher follows: those 8 k on are asked for.
constexpr int64_t kPackDepth = 4, kPackAhead = 8;

// Up to so many outputs (kSkinny) or rows (kFewRows), dot products of unpacked rows may beat packing (gemm.cpp's
// dots_win and gemm_path): it would cost more than the product, and the register tile would be padded. The same bound
// on M or K sends the backward products to B in place.
constexpr int64_t kSkinny = 32;
constexpr int64_t kFewRows = 8;
// The engine pads the shorter side to whole panels, 32 numbers on AVX-512: 9 rows x 1783 -> 257 took as long as 32. Of
// rows along K on both sides, as long as kDotK, up to two thirds of a panel are dot products too, and beside fewer than
// kFewPanels panels a rest of half a panel, or less where K is short. Zen 4, one core, float32: 9, 16 and 20 x 1783 ->
// 257 take 120, 174 and 211 us, and took 265; 1000 x 257 -> 33, 40, 48 189, 240, 301, and took 299, 304, 353.
constexpr int64_t kFewPanels = 4, kDotK = 128;
// Of more than kFewColumnsOfDots columns, a vector of dot products is counted as kDotVector multiply-adds of the packed
// engine's and a sum as kDotSum; packing wins where a panel is mostly filled and K is not long. Zen 4, one core, 4000 x
// 33 -> 32: 139 us packed and 400 of dot products (PyTorch 159), x 64 -> 18 163 and 175, x 256 -> 18 783 and 580.
constexpr int64_t kFewColumnsOfDots = 8;
constexpr double kDotVector = 1.2, kDotSum = 2.5;
// The same of pairs of bf16, whose dot products take a load and an instruction for 32 numbers: a core of Zen 4 takes 24
// x 512 -> 512 in 73 us, packed in 81; and 4 x 512 -> 512's gradient of x with widened rows in place in 71, packed 59.
constexpr int64_t kFewRowsOfPairs = 24;
// Rows or columns that leave AMX's squares of 16 emptier than dot products take.
constexpr int64_t kFewForSquares = 4;
// Products of bf16 up to so many multiplications are ours on AMX, beyond them the library's, unless both factors are
// transposed by whoever multiplies (dW); those with a short K are ours from so many results on. Sapphire Rapids, one
// core, PyTorch's time / ours: 12 x 512 -> 512 3.3, 128^3 3.5, 300 x 300 -> 128 1.3, 256 x 784 -> 512 1.3, 1024^3 0.84
// to 0.97, 2048 x 1024 -> 4096 0.77, dW of these 1.34 and 1.46; 4096 x 33 -> 256 0.55, 10000 x 20 -> 40 0.6, dW of 32 x
// 4096 -> 4096 3.7.
constexpr int64_t kSquaresProducts = 64 << 20, kSquaresResults = 4 << 20;
// Rows of fewer bytes are read in order before their dot products, if they come from memory: 200,000 x 100 -> 4
// took 2.8 instead of 6.3 ms (Zen 5). Prefetchers follow rows of a page and more side by side.
constexpr int64_t kShortRow = 4096;
// B in place, along so many columns: so many of its rows at a time where K is longer than kSkinny and B beyond the L2
// of two cores.
constexpr int64_t kDirectK = 32, kDirectColumns = 512;

// Products that are left to ATen's GEMM, from this many multiplications on (below, the call costs more than it saves)
// and where neither side is skinny. On Sapphire Rapids, 2 cores, ours as a multiple of PyTorch's speed:
//   float32, Intel with AVX-512 (MKL)     2048 x 1024 x 4096 forward 0.83, 1024^3 0.91
//   bf16, AMX or AVX512-BF16 without our kernels for them (oneDNN)         1024^3 forward 0.25
//   fp16, AVX512-FP16 (oneDNN)            1024^3 forward 0.94, forward + backward 0.90
// Elsewhere ours was measured faster (bf16 without instructions: 4 to 60 times) or there is no measurement.
constexpr int64_t kLibraryProducts = 1 << 20;

// Likelihoods of up to so many outputs are computed in one pass over x, so many of its rows at a time: 100 features of
// them take 13 KiB of L1.
constexpr int64_t kFewOutputs = 8, kPassRows = 32;
// Rows to a partial sum there: enough of them for any number of threads, few enough additions in a chain for float32.
// All partial sums together take at most so many bytes; a larger weight is left to the GEMMs.
constexpr int64_t kFewSumRows = 4096, kFewSumBytes = 8 << 20;

// linear_cross_entropy: bytes that it may take besides inputs and gradients, for each core of the machine (not each
// thread in use, so that sums over chunks have the same bits with any number), and at most. A chunk reads and writes
// all of dW, which at 256 rows takes a tenth of its products' time on two cores; more cores multiply faster, but share
// the memory. Chunks of fewer rows would be all packing.
constexpr int64_t kCoreBudget = 32 << 20, kMostBudget = 1 << 30, kLeastChunkRows = 16;
// Where the weight is small, what a chunk reads again, its rows of X and its panel, stays in L2: 2 MiB of them. Zen 4
// with 1 MiB of L2, one core, linear_mse_loss forward + backward in chunks of as many rows as the budget allows, and in
// these: 65536 x 784 -> 10 76 and 62 ms, 32768 x 64 -> 64 13 and 11, 32768 x 2 -> 183 15.6 and 8.0; 20000 x 512 -> 512,
// whose weight is 1 MiB, 304 and 316.
constexpr int64_t kCachedChunkBytes = 2 << 20, kCachedWeightBytes = 256 << 10;

// phm_linear: bytes of mixed rows at a time, and at least so many rows, each of whose chunks reads S again. Zen 5, a
// core with 1 MiB of L2: 2048 x 1024 -> 4096 with n = 4 takes 89 ms with 2 MiB, 91 with 4 or 8; 4096 -> 1024 87 with 2
// MiB, 92 with 8, 115 with 64.
constexpr int64_t kMixedBytes = 2 << 20, kLeastMixedRows = 128;
// Beside more rows W, which is smaller than they are, is made an n-th at a time, and all of so many bytes at once: the
// products of an n-th read x n times.
constexpr int64_t kPhmWeightBytes = 1 << 20;
// Up to so many mixed rows S is read where it lies by dot products, kSkinny of them at a time: 48 take 0.94 ms of a
// core for 1024 -> 4096, 64 take 1.20 and packed, with four more, 1.10.
constexpr int64_t kFewMixedRows = 48;

// Gradients of which at most so much is left by filter_eps are multiplied entry by entry. That runs at a twentieth of
// the dense product's rate, since each entry reads a row of W or X from wherever it lies.
constexpr double kSparseShare = 0.03;
// Rows of entries lie anywhere, where no prefetcher follows: those of so many entries ahead are asked for.
constexpr int64_t kSparseAhead = 8;

}  // namespace rf::tuning
