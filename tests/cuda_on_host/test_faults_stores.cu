// Kernels with one mistake each in how they have boxes stored out of shared memory, beside the same kernel without it.
#include <cuda_bf16.h>

#include <vector>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx_sm90.cuh"

#include "check.h"
#include "device_memory.h"
#include "hopper_matrices.h"
#include "planted_faults.h"

namespace test {
namespace {

namespace ptx = rf::ptx;
using cuda_on_host::Kind;

enum Mistake {
  none,
  no_fence,
  fence_by_one_lane,
  fence_after_barrier,
  no_barrier_after_writing,
  nothing_written,
  no_wait,
  waits_for_too_few,
  another_lane_waits,
  no_barrier_after_wait,
  no_commit,
  no_wait_at_end,
  no_commit_at_end,
  misplaced_box,
  box_beyond_memory,
  map_beyond_tensor,
  map_of_an_input,
  no_map,
  copy_into_box,
  copy_over_box,
};

constexpr int kRows = 120, kColumns = 60, kPitch = 64, kTiles = 4, kBoxBytes = 16 * 128;
constexpr int kSharedBytes = 4 * kBoxBytes + 8;

// Two warps fill y's rows from the number of each element, 16 rows at a time, each through two boxes in turn.
__global__ void stores(const __grid_constant__ CUtensorMap map, Mistake wrong) {
  char* const s = ptx::dynamic_shared<char>();
  uint64_t* const arrived = (uint64_t*)(s + 4 * kBoxBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(arrived, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int t = 0; t < kTiles; ++t) {
    char* const to = s + (warp * 2 + t % 2) * kBoxBytes;
    const int first = (t * 2 + warp) * 16;
    if (wrong != no_wait && lane == (wrong == another_lane_waits ? 1 : 0)) {
      if (wrong == waits_for_too_few)
        ptx::store_wait_read<2>();
      else
        ptx::store_wait_read<1>();
    }
    if (wrong != no_barrier_after_wait) __syncwarp();
    for (int i = lane; i < 16 * 64 && (wrong != nothing_written || lane != 7); i += 32) {
      const int row = i / 64, column = i % 64;
      const auto value = __float2bfloat16_rn((float)((first + row) * 7 + column) / 4);
      *(__nv_bfloat16*)(to + row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2) = value;
    }
    if (wrong != no_fence && wrong != fence_after_barrier && (wrong != fence_by_one_lane || lane == 0))
      ptx::fence_proxy_async();
    if (wrong != no_barrier_after_writing) __syncwarp();
    if (lane != 0) continue;
    if (wrong == fence_after_barrier) ptx::fence_proxy_async();
    const bool copies = t == 3 && warp == 0;
    if (wrong == copy_into_box && copies) {
      ptx::store_wait_read<0>();
      ptx::mbarrier_arrive_expect(arrived, kBoxBytes);
      ptx::copy_box(to, &map, 0, 0, arrived);
    }
    const CUtensorMap other = {};
    ptx::store_box(wrong == no_map ? &other : &map, 0, first,
                   wrong == misplaced_box       ? to + 64
                   : wrong == box_beyond_memory ? s + 3 * kBoxBytes + 128
                                                : to);
    if (wrong != no_commit && (wrong != no_commit_at_end || t < 3)) ptx::store_commit();
    if (wrong == copy_over_box && copies) {
      ptx::mbarrier_arrive_expect(arrived, kBoxBytes);
      ptx::copy_box(to, &map, 0, 0, arrived);
    }
  }
  if (wrong != no_wait_at_end && lane == 0) ptx::store_wait_read<0>();
}

using Case = PlantedFault<Mistake>;

const Case kCases[] = {
    {"no fence.proxy.async", no_fence, {Kind::proxy}},
    {"fence.proxy.async by one lane for all", fence_by_one_lane, {Kind::proxy}},
    {"fence.proxy.async after the barrier", fence_after_barrier, {Kind::proxy}},
    {"no barrier between writing and the store", no_barrier_after_writing, {Kind::race, Kind::unwritten}},
    {"a part of the box that nobody has written", nothing_written, {Kind::unwritten}},
    {"a box written again with no wait", no_wait, {Kind::race}},
    {"a wait for too few groups", waits_for_too_few, {Kind::race}},
    {"a wait by a lane that has stored nothing", another_lane_waits, {Kind::race}},
    {"no barrier after the wait", no_barrier_after_wait, {Kind::race}},
    {"stores not committed", no_commit, {Kind::race}},
    {"no wait at the end", no_wait_at_end, {Kind::copy_under_way}},
    {"the last store not committed", no_commit_at_end, {Kind::copy_under_way}},
    {"a misaligned box", misplaced_box, {Kind::misaligned}},
    {"a box beyond shared memory", box_beyond_memory, {Kind::out_of_bounds}},
    {"a tensor map beyond its tensor", map_beyond_tensor, {Kind::out_of_bounds}},
    {"a tensor map of an input", map_of_an_input, {Kind::read_only}},
    {"no tensor map", no_map, {Kind::descriptor}},
    {"a copy under way into the box", copy_into_box, {Kind::copy_under_way, Kind::race}},
    {"a copy over a box that is being stored", copy_over_box, {Kind::race}},
};

// Without the mistake nothing is found, and of y is written what the map has; with it, one of these kinds of fault.
void run_case(const Case& c) {
  describe("planted fault in stores: %s", c.name);
  Buffer<bf16> y(kRows * kPitch, Guard::behind);
  const CUtensorMap map = matrix_map(y.data(), kColumns, kRows + (c.mistake == map_beyond_tensor), 16, kPitch);
  cuda_on_host::add_buffer(y.data(), 2 * kRows * kPitch, c.mistake != map_of_an_input);
  const int64_t before = cuda_on_host::boxes_stored();
  launch_planted(c, [&] { rf::cuda::launch(stores, 1, 64, kSharedBytes, nullptr, map, c.mistake); });
  cuda_on_host::remove_buffer(y.data());
  if (c.mistake != none) return;
  CHECK(cuda_on_host::boxes_stored() == before + 2 * kTiles);
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column)
      CHECK(y.result(row * kPitch + column) == to_double(from_double<bf16>((row * 7 + column) / 4.0)));
  CHECK(y.rest_untouched());
}

}  // namespace

TEST(faults_stores) {
  if (rf::cuda::device().arch < 90) return;
  run_case({"corrected", none, {}});
  for (const Case& c : kCases) run_case(c);
}

}  // namespace test
