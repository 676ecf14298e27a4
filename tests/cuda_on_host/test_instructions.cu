// What the emulator makes of instructions whose results are documented: shuffles, votes, conversions, fragments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx.cuh"

#include "check.h"
#include "device_memory.h"
#include "numbers.h"

namespace test {
namespace {

namespace ptx = rf::ptx;

__global__ void warp_functions(int* y) {
  const int lane = threadIdx.x;
  int i = 0;
  const auto put = [&](int v) { y[32 * i++ + lane] = v; };
  put(__shfl_sync(~0u, lane, 5));
  put(__shfl_sync(~0u, lane, 9, 8));  // 9 % 8 of the lane's segment
  put(__shfl_up_sync(~0u, lane, 3, 16));
  put(__shfl_down_sync(~0u, lane, 3, 16));
  put(__shfl_xor_sync(~0u, lane, 12));
  put(__shfl_xor_sync(~0u, lane, 16, 16));  // into the other segment: only towards lower lanes
  put((int)__ballot_sync(~0u, lane % 3 == 0));
  put(__any_sync(~0u, lane == 31));
  put(__all_sync(~0u, lane < 31));
  put(__reduce_add_sync(~0u, lane - 20));
  put((int)__reduce_max_sync(~0u, (unsigned)(lane * 7 % 32)));
  put(__reduce_min_sync(~0u, lane - 20));
  int half = lane;
  if (lane >= 16) half = __reduce_add_sync(0xffff0000u, lane);
  put(half);
  const double d = __shfl_xor_sync(~0u, 1.0 / (lane + 1), 1);
  put(d == 1.0 / ((lane ^ 1) + 1));
}
int expected_warp_function(int function, int lane) {
  switch (function) {
    case 0:
      return 5;
    case 1:
      return lane / 8 * 8 + 1;
    case 2:
      return lane % 16 >= 3 ? lane - 3 : lane;
    case 3:
      return lane % 16 < 13 ? lane + 3 : lane;
    case 4:
      return lane ^ 12;
    case 5:
      return lane < 16 ? lane : lane - 16;
    case 6:
      return 0x49249249;
    case 7:
      return 1;
    case 8:
      return 0;
    case 9:
      return 496 - 640;
    case 10:
      return 31;
    case 11:
      return -20;
    case 12:
      return lane < 16 ? lane : 376;
    default:
      return 1;
  }
}

__global__ void block_votes(int* y) {
  const int i = threadIdx.x;
  y[i] = __syncthreads_count(i % 3 == 0);
  y[96 + i] = __syncthreads_or(i == 95);
  y[192 + i] = __syncthreads_and(i != 50);
}

// A 16x16 times 16x8 product from shared memory, every element of the fragments by ldmatrix, b by its transposing form.
template <class T, bool bf16>
__global__ void product_by_ldmatrix(const T* a, const T* b, float* d) {
  T* s = ptx::dynamic_shared<T>();
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) s[256 + i] = b[i];
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4] = {0, 0, 0, 0};
  ptx::ldmatrix_x4(ra, s + (lane % 16) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2_trans(rb, s + 256 + (lane % 16) * 8);
  if constexpr (bf16)
    ptx::mma_bf16(rd, ra, rb);
  else
    ptx::mma_f16(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = rd[i];
}
// The same for tf32 and float64 with fragments loaded one element at a time, as the PTX manual has them; b is k x 8.
__global__ void product_tf32(const float* a, const float* b, float* d) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  uint32_t ra[4], rb[2];
  float rd[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) ra[i] = ptx::to_tf32(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) rb[i] = ptx::to_tf32(b[(pair + 4 * i) * 8 + group]);
  ptx::mma_tf32(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * pair + i % 2] = rd[i];
}
__global__ void product_f64(const double* a, const double* b, double* d) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  double rd[2] = {1, 1};
  ptx::mma_f64(rd, a[group * 4 + pair], b[pair * 8 + group]);
  for (int i = 0; i < 2; ++i) d[group * 8 + 2 * pair + i] = rd[i];
}

template <class T>
void check_product(const char* what, int m, int k, const Buffer<T>& a, const Buffer<T>& b, const double* d,
                   double start) {
  describe("%s", what);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < 8; ++j) {
      double sum = start;
      for (int l = 0; l < k; ++l) sum += a.value(i * k + l) * b.value(l * 8 + j);
      CHECK(d[i * 8 + j] == sum);
    }
}

// Small integers: every product and sum is exact in every format.
template <class T>
Buffer<T> integers(int count, Random& random) {
  return filled<T>(count, [&] { return (double)random.integer(-8, 8); });
}

template <class T, bool bf16, class DeviceT>
void products_of_halves(Random& random) {
  const Buffer<T> a = integers<T>(256, random), b = integers<T>(128, random);
  Buffer<float> d(128);
  {
    const Lent la(a), lb(b), ld(d);
    rf::cuda::launch(product_by_ldmatrix<DeviceT, bf16>, 1, 32, 768, nullptr, (const DeviceT*)a.data(),
                     (const DeviceT*)b.data(), d.data());
  }
  double results[128];
  for (int i = 0; i < 128; ++i) results[i] = d.value(i);
  check_product(bf16 ? "mma bf16" : "mma f16", 16, 16, a, b, results, 0);
}

template <class T, int m, int k, class Kernel>
void products_of(Kernel kernel, const char* what, Random& random) {
  const Buffer<T> a = integers<T>(m * k, random), b = integers<T>(k * 8, random);
  Buffer<T> d(m * 8);
  {
    const Lent la(a), lb(b), ld(d);
    rf::cuda::launch(kernel, 1, 32, 0, nullptr, a.data(), b.data(), d.data());
  }
  double results[128];
  for (int i = 0; i < m * 8; ++i) results[i] = d.value(i);
  check_product(what, m, k, a, b, results, 1);
}

// Every 16-bit pattern to float, and floats around every half of a unit back.
void conversions() {
  describe("conversions of half types");
  bool right = true;
  for (int i = 0; i < 65536; ++i) {
    const double b = to_double(bf16{(uint16_t)i}), h = to_double(f16{(uint16_t)i});
    const float fb = __bfloat162float({(uint16_t)i}), fh = __half2float({(uint16_t)i});
    right = right && (b == fb || (b != b && fb != fb)) && (h == fh || (h != h && fh != fh));
    if (b == b) right = right && __float2bfloat16_rn((float)b).bits == i;
    if (h == h) right = right && __float2half_rn((float)h).bits == i;
    uint32_t bits = (uint32_t)i << 16 | 0x7fff;
    for (int j = 0; j < 3; ++j, ++bits) {  // below, at and above half way between two of bfloat16
      const float x = __uint_as_float(bits);
      if (x != x) continue;
      right = right && __bfloat162float(__float2bfloat16_rn(x)) == (float)rounded<bf16>(x) &&
              __half2float(__float2half_rn(x)) == (float)rounded<f16>(x);
    }
  }
  Random random(3);
  for (int i = 0; i < 200000; ++i) {
    const float x = (float)((random.chance(0.5) ? 1 : -1) * std::exp2(random.between(-27, 17)));
    right = right && __half2float(__float2half_rn(x)) == (float)rounded<f16>(x);
  }
  CHECK(right);
  CHECK(std::isnan(__bfloat162float(__float2bfloat16_rn(NAN))) && std::isnan(__half2float(__float2half_rn(NAN))));
  // 10 bits of fraction are kept, ties away from zero.
  CHECK(ptx::to_tf32(1 + 0x1p-11f) == __float_as_uint(1 + 0x1p-10f));
  CHECK(ptx::to_tf32(-1 - 0x1p-11f) == __float_as_uint(-1 - 0x1p-10f));
  CHECK(ptx::to_tf32(1 + 0x1.ffcp-12f) == __float_as_uint(1));
}

}  // namespace

TEST(instructions) {
  describe("functions of a warp");
  Buffer<int> y(14 * 32);
  {
    const Lent lent(y);
    rf::cuda::launch(warp_functions, 1, 32, 0, nullptr, y.data());
  }
  for (int f = 0; f < 14; ++f)
    for (int lane = 0; lane < 32; ++lane)
      check(y[32 * f + lane] == expected_warp_function(f, lane), "function %d, lane %d: %d", f, lane, y[32 * f + lane]);

  describe("votes of a block");
  Buffer<int> votes(3 * 96);
  {
    const Lent lent(votes);
    rf::cuda::launch(block_votes, 1, 96, 0, nullptr, votes.data());
  }
  for (int i = 0; i < 96; ++i) CHECK(votes[i] == 32 && votes[96 + i] == 1 && votes[192 + i] == 0);

  Random random(1);
  products_of_halves<bf16, true, __nv_bfloat16>(random);
  products_of_halves<f16, false, __half>(random);
  products_of<float, 16, 8>(product_tf32, "mma tf32", random);
  products_of<double, 8, 4>(product_f64, "mma f64", random);
  conversions();
}

}  // namespace test
