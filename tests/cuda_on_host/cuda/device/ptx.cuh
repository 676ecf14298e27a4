// What each instruction of csrc/cuda/device/ptx.cuh does, on the emulator.
#pragma once
#include <cuda_runtime.h>

#define RF_DEVICE_ASSERT(condition, text)                                                                  \
  do {                                                                                                     \
    if (!(condition)) ::cuda_on_host::assertion(text, __func__, ::cuda_on_host::Site{__FILE__, __LINE__}); \
  } while (0)

namespace rf::ptx {

constexpr bool kBlackwell = false;

using cuda_on_host::Site;

template <class T>
T* dynamic_shared() {
  return (T*)cuda_on_host::dynamic_shared();
}

inline uint32_t shared_address(const void* p) { return cuda_on_host::shared_address(p); }

inline void cp_async16(void* shared, const void* global, int valid = 16, Site site = Site::here()) {
  cuda_on_host::copy_async(shared, global, 16, valid, site);
}
inline void cp_async8(void* shared, const void* global, int valid = 8, Site site = Site::here()) {
  cuda_on_host::copy_async(shared, global, 8, valid, site);
}
inline void cp_async4(void* shared, const void* global, int valid = 4, Site site = Site::here()) {
  cuda_on_host::copy_async(shared, global, 4, valid, site);
}
inline void cp_async_commit() { cuda_on_host::copy_async_commit(); }
template <int pending>
void cp_async_wait() {
  cuda_on_host::copy_async_wait(pending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  cuda_on_host::load_matrix(r, row, 4, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  cuda_on_host::load_matrix(r, row, 4, true, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  cuda_on_host::load_matrix(r, row, 2, false, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  cuda_on_host::load_matrix(r, row, 2, true, site);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  cuda_on_host::multiply(d, a, b, cuda_on_host::Factors::bf16, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  cuda_on_host::multiply(d, a, b, cuda_on_host::Factors::f16, site);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  cuda_on_host::multiply(d, a, b, cuda_on_host::Factors::tf32, site);
}
inline void mma_f64(double (&d)[2], double a, double b, Site site = Site::here()) {
  cuda_on_host::multiply_f64(d, a, b, site);
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  // NaN and infinity stay; a tie goes away from zero, which half a unit of the 10 bits kept does for either sign.
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void barrier_sync(int id, int threads, Site site = Site::here()) {
  cuda_on_host::block_barrier(id, threads, true, 0, "barrier_sync", site);
}
inline void barrier_arrive(int id, int threads, Site site = Site::here()) {
  cuda_on_host::block_barrier(id, threads, false, 0, "barrier_arrive", site);
}

inline uint32_t cluster_rank() { return cuda_on_host::cluster_rank(); }
inline uint32_t cluster_size() { return cuda_on_host::cluster_size(); }
inline void cluster_sync(Site site = Site::here()) { cuda_on_host::cluster_barrier(site); }
template <class T>
T* cluster_map(T* p, uint32_t rank, Site site = Site::here()) {
  return (T*)cuda_on_host::cluster_map(p, rank, site);
}

template <class V>
V load_streaming(const V* p) {
  return *p;
}
template <class V>
void store_streaming(V* p, V v) {
  *p = v;
}

inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace rf::ptx
