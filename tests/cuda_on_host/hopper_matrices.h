// Matrices as Hopper's units are told of them, for tests: written down after the PTX manual and the driver's headers,
// not shared with the kernels under test.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace test {

// Rows of memory that lie together or `pitch` elements apart, of half-precision elements, of which a box has 64
// columns.
inline CUtensorMap matrix_map(const void* data, uint64_t columns, uint64_t rows, uint32_t box_rows,
                              uint64_t pitch = 0) {
  CUtensorMap map;
  const cuuint64_t extent[] = {columns, rows}, stride[] = {(pitch ? pitch : columns) * 2};
  const cuuint32_t box[] = {64, box_rows}, every[] = {1, 1};
  const CUresult result =
      cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), extent, stride, box,
                             every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("matrix_map: the driver refuses it");
  return map;
}

// Bits 0 to 13 are the address, 16 to 29 and 32 to 45 two strides, all in units of 16 bytes; bit 62: swizzled over 128.
inline uint64_t swizzled_matrix(uint32_t address, uint32_t leading, uint32_t stride) {
  return address / 16 | (uint64_t)(leading / 16) << 16 | (uint64_t)(stride / 16) << 32 | uint64_t(1) << 62;
}

// A warpgroup's 64 x 256 sums.
inline void store_sums(const float (&sum)[128], float* y) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  for (int i = 0; i < 128; ++i) {
    const int row = 16 * warp + lane / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    y[row * 256 + column] = sum[i];
  }
}

}  // namespace test
