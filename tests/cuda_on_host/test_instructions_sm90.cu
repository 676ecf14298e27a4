// What the emulator makes of Hopper's copies by tensor map and products of a warpgroup, against their documentation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx_sm90.cuh"

#include "check.h"
#include "device_memory.h"
#include "hopper_matrices.h"
#include "numbers.h"

namespace test {
namespace {

namespace ptx = rf::ptx;

// ---- copies --------------------------------------------------------------------------------------------------------

constexpr int kBoxRows = 24, kBoxBytes = kBoxRows * 128;

// A box as it lies in shared memory, in order of addresses.
__global__ void copied_box(const __grid_constant__ CUtensorMap map, int x, int y, uint16_t* out) {
  uint16_t* const box = ptx::dynamic_shared<uint16_t>();
  uint64_t* const arrived = (uint64_t*)(box + kBoxBytes / 2);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&map);
    ptx::mbarrier_init(arrived, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(arrived, kBoxBytes);
    ptx::copy_box(box, &map, x, y, arrived);
  }
  __syncthreads();
  ptx::mbarrier_wait(arrived, 0);
  for (int i = threadIdx.x; i < kBoxBytes / 2; i += 32) out[i] = box[i];
}

// 16 bytes are the unit; those of a row of 128 are exchanged by the row's number.
void boxes() {
  constexpr int kColumns = 72, kRows = 30;
  int next = 0;
  const Buffer<bf16> from = filled<bf16>(kColumns * kRows, [&] { return (double)(next++ % 251 + 1); });
  const CUtensorMap map = matrix_map(from.data(), kColumns, kRows, kBoxRows);
  struct Corner {
    int x, y;
  };
  // Inside; beyond the last column and row; before the first; wholly outside.
  for (const Corner c : {Corner{0, 0}, Corner{40, 16}, Corner{-5, -7}, Corner{100, 50}}) {
    describe("copy of the box at (%d, %d)", c.x, c.y);
    Buffer<bf16> out(kBoxBytes / 2);
    {
      const Lent lf(from), lo(out);
      rf::cuda::launch(copied_box, 1, 32, kBoxBytes + 8, nullptr, map, c.x, c.y, (uint16_t*)out.data());
    }
    for (int r = 0; r < kBoxRows; ++r)
      for (int i = 0; i < 64; ++i) {
        const int x = c.x + i, y = c.y + r;
        const bool inside = 0 <= x && x < kColumns && 0 <= y && y < kRows;
        CHECK(out.value(r * 64 + ((i / 8) ^ (r % 8)) * 8 + i % 8) == (inside ? from.value(y * kColumns + x) : 0));
      }
  }
}

// The way back: a box of the numbers from 1 on, in order of addresses.
__global__ void stored_box(const __grid_constant__ CUtensorMap map, int x, int y) {
  uint16_t* const box = ptx::dynamic_shared<uint16_t>();
  for (int i = threadIdx.x; i < kBoxBytes / 2; i += 32)
    ((__nv_bfloat16*)box)[i] = __float2bfloat16_rn((float)(i % 251 + 1));
  ptx::fence_proxy_async();
  __syncwarp();
  if (threadIdx.x != 0) return;
  ptx::store_box(&map, x, y, box);
  ptx::store_commit();
  ptx::store_wait_read<0>();
}

void stored_boxes() {
  constexpr int kColumns = 67, kPitch = 72, kRows = 30;
  struct Corner {
    int x, y;
  };
  for (const Corner c : {Corner{0, 0}, Corner{40, 16}, Corner{-5, -7}, Corner{100, 50}}) {
    describe("store of the box at (%d, %d)", c.x, c.y);
    Buffer<bf16> to(kPitch * kRows);
    const CUtensorMap map = matrix_map(to.data(), kColumns, kRows, kBoxRows, kPitch);
    {
      const Lent lent(to);
      rf::cuda::launch(stored_box, 1, 32, kBoxBytes, nullptr, map, c.x, c.y);
    }
    for (int r = 0; r < kBoxRows; ++r)
      for (int i = 0; i < 64; ++i) {
        const int x = c.x + i, y = c.y + r;
        if (0 <= x && x < kColumns && 0 <= y && y < kRows)
          CHECK(to.result(y * kPitch + x) == (r * 64 + ((i / 8) ^ (r % 8)) * 8 + i % 8) % 251 + 1);
      }
    CHECK(to.rest_untouched());
  }
}

// What the driver refuses, one requirement at a time.
void refused_maps() {
  describe("cuTensorMapEncodeTiled");
  alignas(16) static char memory[1024];
  alignas(64) char room[sizeof(CUtensorMap) + 64];
  struct Arguments {
    int map_shift = 0, rank = 2, shift = 0;
    cuuint64_t columns = 64, rows = 4, stride = 128;
    cuuint32_t box_columns = 64, box_rows = 4, every = 1;
  };
  const auto encode = [&](const Arguments& a) {
    const cuuint64_t extent[] = {a.columns, a.rows}, stride[] = {a.stride};
    const cuuint32_t box[] = {a.box_columns, a.box_rows}, every[] = {1, a.every};
    return cuTensorMapEncodeTiled((CUtensorMap*)(room + a.map_shift), CU_TENSOR_MAP_DATA_TYPE_FLOAT16, a.rank,
                                  memory + a.shift, extent, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  const auto refused = [&](auto&& change) {
    Arguments a;
    change(a);
    return encode(a) == CUDA_ERROR_INVALID_VALUE;
  };
  CHECK(encode({}) == CUDA_SUCCESS);
  CHECK(refused([](Arguments& a) { a.map_shift = 32; }));
  CHECK(refused([](Arguments& a) { a.rank = 0; }));
  CHECK(refused([](Arguments& a) { a.shift = 8; }));
  CHECK(refused([](Arguments& a) { a.columns = 0; }));
  CHECK(refused([](Arguments& a) { a.rows = (cuuint64_t(1) << 32) + 1; }));
  CHECK(refused([](Arguments& a) { a.stride = 136; }));
  CHECK(refused([](Arguments& a) { a.stride = cuuint64_t(1) << 40; }));
  CHECK(refused([](Arguments& a) { a.stride = 112; }));
  CHECK(refused([](Arguments& a) { a.box_rows = 257; }));
  CHECK(refused([](Arguments& a) { a.box_rows = 0; }));
  CHECK(refused([](Arguments& a) { a.box_columns = 60; }));
  CHECK(refused([](Arguments& a) { a.box_columns = 128; }));
  CHECK(refused([](Arguments& a) { a.every = 9; }));
}

// ---- products ------------------------------------------------------------------------------------------------------

constexpr int kBytesA = 64 * 128, kBytesB = 256 * 128, kProductBytes = kBytesA + kBytesB;

// Where element (mn, k) of an operand lies whose K is 64: in blocks of 64 across K, if rows of memory run across it.
__device__ uint32_t place(bool across, int mn, int k) {
  const int row = across ? mn / 64 * 64 + k : mn, column = across ? mn % 64 : k;
  return row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2;
}

// y += a b^T twice over, for a[64][64] and b[256][64], from what threads have put where `place` says.
template <bool bf16, bool a_across, bool b_across>
__global__ void product(const uint16_t* a, const uint16_t* b, float* y) {
  char* const s = ptx::dynamic_shared<char>();
  for (int i = threadIdx.x; i < 64 * 64; i += 128) *(uint16_t*)(s + place(a_across, i / 64, i % 64)) = a[i];
  for (int i = threadIdx.x; i < 256 * 64; i += 128) *(uint16_t*)(s + kBytesA + place(b_across, i / 64, i % 64)) = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float sum[128];
  for (float& x : sum) x = NAN;  // the first product does not add to it
  ptx::wgmma_fence();
  for (int i = 0; i < 8; ++i) {
    const int step = i % 4;  // 16 of K: two chunks of a row, or sixteen rows
    const uint32_t of_a = ptx::shared_address(s) + (a_across ? 2048 : 32) * step;
    const uint32_t of_b = ptx::shared_address(s + kBytesA) + (b_across ? 2048 : 32) * step;
    const uint64_t da = swizzled_matrix(of_a, a_across ? 8192 : 0, 1024);
    const uint64_t db = swizzled_matrix(of_b, b_across ? 8192 : 0, 1024);
    if constexpr (bf16)
      ptx::wgmma_bf16<a_across, b_across>(sum, da, db, i > 0);
    else
      ptx::wgmma_f16<a_across, b_across>(sum, da, db, i > 0);
    if (step == 3) ptx::wgmma_commit();
  }
  ptx::wgmma_wait<0>();
  store_sums(sum, y);
}

template <class T, bool a_across, bool b_across>
void check_product(Random& random) {
  describe("wgmma %s, a %s, b %s", Format<T>::name, a_across ? "across K" : "along K",
           b_across ? "across K" : "along K");
  const auto small = [&] { return (double)random.integer(-8, 8); };  // every sum of products is exact
  const Buffer<T> a = filled<T>(64 * 64, small), b = filled<T>(256 * 64, small);
  Buffer<float> y(64 * 256);
  {
    const Lent la(a), lb(b), ly(y);
    rf::cuda::launch(product<std::is_same_v<T, bf16>, a_across, b_across>, 1, 128, kProductBytes, nullptr,
                     (const uint16_t*)a.data(), (const uint16_t*)b.data(), y.data());
  }
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 256; ++j) {
      double sum = 0;
      for (int k = 0; k < 64; ++k) sum += 2 * a.value(i * 64 + k) * b.value(j * 64 + k);
      CHECK(y.value(i * 256 + j) == sum);
    }
}

template <class T>
void products(Random& random) {
  check_product<T, false, false>(random);
  check_product<T, false, true>(random);
  check_product<T, true, false>(random);
  check_product<T, true, true>(random);
}

}  // namespace

TEST(instructions_sm90) {
  if (rf::cuda::device().arch < 90) return;
  boxes();
  stored_boxes();
  refused_maps();
  Random random(2);
  products<bf16>(random);
  products<f16>(random);
}

}  // namespace test
