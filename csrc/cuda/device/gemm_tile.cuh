// An operand's tile on its way to the tensor cores: from global memory to shared memory, swizzled so that neither the
// copies nor the loads of fragments conflict, and from there to registers.
#pragma once
#include "cuda/device/gemm_task.h"
#include "cuda/device/ptx.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/tuning.h"

namespace rf::cuda {

constexpr int kChunkBytes = 16;
constexpr int kDepthBytes = tuning::kGemmDepthBytes;  // of K in a stage
constexpr int kDepthChunks = kDepthBytes / kChunkBytes;
constexpr int kStepBytes = 32;  // of K in a tensor core instruction: 16 half elements, 8 of tf32
static_assert(kDepthChunks == 4, "the swizzle of tiles along K is for rows of 64 bytes");

template <class T>
constexpr int kDepth = kDepthBytes / (int)sizeof(T);

enum class Memory { elements, along_k, across_k };

// `Span` rows of A (columns of B) by kDepth of K in shared memory: a row of 64 bytes for each of the former or, where
// memory runs across K, a row of Span elements for each k. 16-byte chunks of a row are permuted by its number.
template <class T, int Span, Memory memory, int Threads>
struct Tile {
  static constexpr int kBytes = Span * kDepthBytes, kChunks = kBytes / kChunkBytes, kEach = kChunks / Threads;
  static constexpr int kRowChunks = memory == Memory::across_k ? Span * (int)sizeof(T) / kChunkBytes : kDepthChunks;
  static_assert(kChunks % Threads == 0, "every thread copies the same number of chunks");

  static_assert(Threads % kRowChunks == 0, "a thread's chunks lie below one another");
  // tf32 across K has no ldmatrix: lanes read single elements, of four rows eight neighbours each.
  static constexpr bool kSingles = memory == Memory::across_k && sizeof(T) == 4;

  // Where a chunk lies.
  static constexpr int place(int row, int chunk) {
    const int flip = memory != Memory::across_k ? row >> 1 & 3 : kSingles ? (row & 3) << 1 : row & 7;
    return (row * kRowChunks + (chunk ^ flip)) * kChunkBytes;
  }

  const GemmOperand& operand;
  const int64_t first;  // row (column) of the matrix
  const int count;      // of the rows (columns) from there on, those that exist, up to Span
  int64_t k;            // of the next tile to fetch
  const T* from;        // the thread's first chunk of it

  __device__ __forceinline__ Tile(const GemmOperand& o, int64_t begin, int64_t end, int64_t k_begin)
      : operand(o), first(begin), count((int)(end - begin < Span ? end - begin : Span)), k(k_begin) {
    const int64_t r = (int)threadIdx.x / kRowChunks, c = (int)threadIdx.x % kRowChunks * kWidth<T>;
    from = (const T*)o.view.data;
    if constexpr (memory == Memory::along_k) from += (begin + r) * o.view.outer_stride + k + c;
    if constexpr (memory == Memory::across_k) from += (k + r) * o.view.outer_stride + begin + c;
  }

  // The next tile of K, of which the first `depth` are there and the others zero. Chunks are under way when this
  // returns; single elements have arrived.
  __device__ __forceinline__ void fetch(char* tile, int depth) {
    if constexpr (memory == Memory::elements) {
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) gather(tile, (int)threadIdx.x + i * Threads, depth);
      k += kDepth<T>;
    } else {
      const int rows = memory == Memory::along_k ? count : depth, columns = memory == Memory::along_k ? depth : count;
      const int r = (int)threadIdx.x / kRowChunks, c = (int)threadIdx.x % kRowChunks;
      const int left = (columns - c * kWidth<T>)*(int)sizeof(T);
      const int valid = left < 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
      constexpr int kStep = Threads / kRowChunks;
      const T* p = from;
#pragma unroll
      for (int i = 0; i < kEach; ++i, p += kStep * operand.view.outer_stride) {
        const int bytes = r + i * kStep < rows ? valid : 0;
        ptx::cp_async16(tile + place(r + i * kStep, c), bytes ? p : (const T*)operand.view.data, bytes);
      }
      from += memory == Memory::along_k ? kDepth<T> : kDepth<T> * operand.view.outer_stride;
    }
  }

  // One chunk along K. Neighbouring threads take neighbours in memory: chunks of a row, or rows where it runs across K.
  __device__ __forceinline__ void gather(char* tile, int index, int depth) const {
    const int r = operand.across_k ? index % Span : index / kDepthChunks;
    const int c = operand.across_k ? index / Span : index % kDepthChunks;
    T lane[kWidth<T>];
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      const int kk = c * kWidth<T> + j;
      lane[j] = r < count && kk < depth ? from[operand.offset(first + r, k + kk)] : narrowed<T>(0);
    }
    memcpy(tile + place(r, c), lane, kChunkBytes);
  }

  // The fragments of 16 rows (columns) from `at` on for one step of K: rows 0-7 and 8-15 of its first half, then of its
  // second.
  static __device__ __forceinline__ void load(uint32_t (&r)[4], const char* tile, int at, int step) {
    const int lane = (int)threadIdx.x % 32;
    if constexpr (memory != Memory::across_k) {
      ptx::ldmatrix_x4(r, tile + place(at + lane % 16, step * (kStepBytes / kChunkBytes) + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix_x4_trans(r, tile + place(k, at / 8 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = step * 8 + lane % 4 + i / 2 * 4, mn = at + lane / 4 + i % 2 * 8;
        memcpy(&r[i], tile + place(k, mn / 4) + mn % 4 * 4, 4);
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = ptx::to_tf32(__uint_as_float(r[i]));
    }
  }
};

// Whether the 128 bytes that eight lanes of ldmatrix, or a warp of single loads, read together lie in all 32 banks.
template <class Tile>
constexpr bool free_of_conflicts() {
  constexpr int kRows = Tile::kSingles ? 4 : 8, kChunks = 8 / kRows;
  for (int row = 0; row < 16; row += kRows)
    for (int chunk = 0; chunk < Tile::kRowChunks; chunk += kChunks) {
      unsigned banks = 0;  // a bit for each group of four
      for (int i = 0; i < 8; ++i) banks |= 1u << Tile::place(row + i % kRows, chunk + i / kRows) / kChunkBytes % 8;
      if (banks != 0xff) return false;
    }
  return true;
}

}  // namespace rf::cuda
