// What kernels use of CUDA C++, for g++: qualifiers, vector types, built-in variables, warp and block functions,
// atomics, arithmetic. Stands in for the toolkit's header of this name; what a thread does lies behind emulator.h.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
// The thread-local memory of a module is one range of addresses, apart from all other static data: that makes it known
// as shared memory. All threads of a block run on one thread of the host.
#define __shared__ static thread_local

// ---- types ---------------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define RF_VECTORS(type, name)                                                                \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
RF_VECTORS(char, char)
RF_VECTORS(unsigned char, uchar)
RF_VECTORS(short, short)
RF_VECTORS(unsigned short, ushort)
RF_VECTORS(int, int)
RF_VECTORS(unsigned, uint)
RF_VECTORS(long long, longlong)
RF_VECTORS(unsigned long long, ulonglong)
RF_VECTORS(float, float)
RF_VECTORS(double, double)
#undef RF_VECTORS

using cudaStream_t = struct CUstream_st*;

// The architectures that code is there for.
#define __CUDA_ARCH_LIST__ 800, 900

// A function of the driver by its name: those of cuda.h.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum cudaDriverEntryPointFlags { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

// ---- where a thread is ---------------------------------------------------------------------------------------------

#define threadIdx (::cuda_on_host::thread_index())
#define blockIdx (::cuda_on_host::block_index())
#define blockDim (::cuda_on_host::block_shape())
#define gridDim (::cuda_on_host::grid_shape())
constexpr int warpSize = 32;

// ---- barriers ------------------------------------------------------------------------------------------------------

inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::block_barrier(0, cuda_on_host::kWholeBlock, true, 0, "__syncthreads", site);
}
inline int __syncthreads_or(int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(0, cuda_on_host::kWholeBlock, true, value != 0, "__syncthreads_or", site) > 0;
}
inline int __syncthreads_count(int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(0, cuda_on_host::kWholeBlock, true, value != 0, "__syncthreads_count", site);
}
inline int __syncthreads_and(int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(0, cuda_on_host::kWholeBlock, true, value == 0, "__syncthreads_and", site) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::warp_barrier(mask, site);
}
// Accesses of the emulated threads reach memory in the order in which they are made.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- what the lanes of a warp tell one another ---------------------------------------------------------------------

namespace cuda_on_host {

inline uint64_t bits_of(const void* p, size_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, p, size);
  return bits;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source, bool valid, const char* what, Site site) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  const uint64_t bits = shuffle_bits(mask, bits_of(&value, sizeof value), valid ? source : lane_index(), what, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned segment(unsigned lane, int width) { return lane & ~(unsigned)(width - 1); }

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const unsigned lane = cuda_on_host::lane_index();
  const unsigned from = cuda_on_host::segment(lane, width) + ((unsigned)source & (unsigned)(width - 1));
  return cuda_on_host::shuffle(mask, value, from, true, "__shfl_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const unsigned lane = cuda_on_host::lane_index();
  const bool valid = lane - cuda_on_host::segment(lane, width) >= delta;
  return cuda_on_host::shuffle(mask, value, lane - delta, valid, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const unsigned lane = cuda_on_host::lane_index();
  const bool valid = lane - cuda_on_host::segment(lane, width) + delta < (unsigned)width;
  return cuda_on_host::shuffle(mask, value, lane + delta, valid, "__shfl_down_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  cuda_on_host::Site site = cuda_on_host::Site::here()) {
  // A source in a later segment is not valid; one in an earlier segment is.
  const unsigned lane = cuda_on_host::lane_index(), source = lane ^ (unsigned)lanes;
  const bool valid = source < cuda_on_host::segment(lane, width) + (unsigned)width;
  return cuda_on_host::shuffle(mask, value, source, valid, "__shfl_xor_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::ballot(mask, value != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::ballot(mask, value != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::ballot(mask, value == 0, "__all_sync", site) == 0;
}

#define RF_REDUCE(type, name, kind)                                                          \
  inline type __reduce_##name##_sync(unsigned mask, type value,                              \
                                     cuda_on_host::Site site = cuda_on_host::Site::here()) { \
    return (type)cuda_on_host::reduce_bits(mask, (int64_t)value, cuda_on_host::Reduce::kind, \
                                           "__reduce_" #name "_sync", site);                 \
  }
RF_REDUCE(unsigned, add, add)
RF_REDUCE(unsigned, min, min)
RF_REDUCE(unsigned, max, max)
RF_REDUCE(int, add, add)
RF_REDUCE(int, min, min)
RF_REDUCE(int, max, max)
RF_REDUCE(unsigned, and, bit_and)
RF_REDUCE(unsigned, or, bit_or)
RF_REDUCE(unsigned, xor, bit_xor)
#undef RF_REDUCE

// ---- atomics -------------------------------------------------------------------------------------------------------

namespace cuda_on_host {
template <class T, class F>
T atomic(T* p, F&& next) {
  AtomicAccess access(p, sizeof(T));
  T before, after;
  access.load(&before);
  after = next(before);
  access.store(&after);
  return before;
}
}  // namespace cuda_on_host

template <class T>
T atomicAdd(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return (T)(old + v); });
}
template <class T>
T atomicMax(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return v < old ? v : old; });
}
template <class T>
T atomicExch(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return old == expected ? v : old; });
}
template <class T>
T atomicOr(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return (T)(old | v); });
}
template <class T>
T atomicAnd(T* p, T v) {
  return cuda_on_host::atomic(p, [&](T old) { return (T)(old & v); });
}
// Wraps at `most`, as in CUDA.
inline unsigned atomicInc(unsigned* p, unsigned most) {
  return cuda_on_host::atomic(p, [&](unsigned old) { return old >= most ? 0u : old + 1; });
}

// ---- loads and stores with a hint to the caches --------------------------------------------------------------------

#define RF_LOAD(name)  \
  template <class T>   \
  T name(const T* p) { \
    return *p;         \
  }
#define RF_STORE(name)   \
  template <class T>     \
  void name(T* p, T v) { \
    *p = v;              \
  }
RF_LOAD(__ldg)
RF_LOAD(__ldcs)
RF_LOAD(__ldcg)
RF_LOAD(__ldca)
RF_LOAD(__ldlu)
RF_STORE(__stcs)
RF_STORE(__stcg)
RF_STORE(__stwb)
RF_STORE(__stwt)
#undef RF_LOAD
#undef RF_STORE

// ---- arithmetic ----------------------------------------------------------------------------------------------------

namespace cuda_on_host {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_on_host

inline unsigned __float_as_uint(float x) { return cuda_on_host::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_host::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::bit_cast<float>(x); }
inline float __int_as_float(int x) { return cuda_on_host::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_host::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_host::bit_cast<double>(x); }

// The approximate functions as the exact ones: what their error does to a result only a GPU can tell.
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-0.70710678118654752440f * x); }
inline double normcdf(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }
inline float __double2float_rn(double x) { return (float)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

// CUDA's overloads of min and max promote as arithmetic does; a NaN loses.
#define RF_MIN_MAX(type)                                    \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
RF_MIN_MAX(int)
RF_MIN_MAX(unsigned)
RF_MIN_MAX(long)
RF_MIN_MAX(unsigned long)
RF_MIN_MAX(long long)
RF_MIN_MAX(unsigned long long)
#undef RF_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
