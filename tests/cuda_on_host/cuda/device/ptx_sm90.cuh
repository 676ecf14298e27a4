// What each instruction of csrc/cuda/device/ptx_sm90.cuh does, on the emulator.
#pragma once
#include <cuda.h>

#include "cuda/device/ptx.cuh"

namespace rf::ptx {

constexpr bool kHopper = true;

inline void mbarrier_init(uint64_t* barrier, int arrivals, Site site = Site::here()) {
  cuda_on_host::mbarrier_init(barrier, arrivals, site);
}
inline void fence_mbarrier_init() { cuda_on_host::fence_mbarrier_init(); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, Site site = Site::here()) {
  cuda_on_host::mbarrier_arrive_expect(barrier, bytes, site);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::here()) {
  cuda_on_host::mbarrier_wait(barrier, parity, false, site);
}
inline void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank, Site site = Site::here()) {
  cuda_on_host::mbarrier_arrive_at(barrier, rank, site);
}
inline void mbarrier_wait_for_cluster(uint64_t* barrier, uint32_t parity, Site site = Site::here()) {
  cuda_on_host::mbarrier_wait(barrier, parity, true, site);
}

inline void copy_box(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier, Site site = Site::here()) {
  cuda_on_host::copy_box(shared, map, x, y, barrier, cuda_on_host::kThisBlock, site);
}
inline void copy_box_to(uint16_t blocks, void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                        Site site = Site::here()) {
  cuda_on_host::copy_box(shared, map, x, y, barrier, blocks, site);
}
inline void store_box(const CUtensorMap* map, int x, int y, const void* shared, Site site = Site::here()) {
  cuda_on_host::store_box(map, x, y, shared, site);
}
inline void store_commit() { cuda_on_host::store_commit(); }
template <int pending>
void store_wait_read(Site site = Site::here()) {
  cuda_on_host::store_wait_read(pending, site);
}
inline void prefetch_map(const CUtensorMap* map, Site site = Site::here()) { cuda_on_host::prefetch_map(map, site); }
inline void fence_proxy_async() { cuda_on_host::fence_proxy_async(); }

template <int registers>
void more_registers(Site site = Site::here()) {
  cuda_on_host::set_registers(registers, true, site);
}
template <int registers>
void fewer_registers(Site site = Site::here()) {
  cuda_on_host::set_registers(registers, false, site);
}

inline void wgmma_fence(Site site = Site::here()) { cuda_on_host::wgmma_fence(site); }
inline void wgmma_commit(Site site = Site::here()) { cuda_on_host::wgmma_commit(site); }
template <int pending>
void wgmma_wait(Site site = Site::here()) {
  cuda_on_host::wgmma_wait(pending, site);
}
template <bool a_across, bool b_across>
void wgmma_bf16(float (&d)[128], uint64_t a, uint64_t b, bool add, Site site = Site::here()) {
  cuda_on_host::wgmma(d, a, b, cuda_on_host::Factors::bf16, a_across, b_across, add, site);
}
template <bool a_across, bool b_across>
void wgmma_f16(float (&d)[128], uint64_t a, uint64_t b, bool add, Site site = Site::here()) {
  cuda_on_host::wgmma(d, a, b, cuda_on_host::Factors::f16, a_across, b_across, add, site);
}

}  // namespace rf::ptx
