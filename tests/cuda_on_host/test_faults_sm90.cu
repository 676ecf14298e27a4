// Kernels with one mistake each in how they use Hopper's asynchronous units, beside the same kernels without it.
#include <cuda_bf16.h>

#include <algorithm>
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
  // barriers in memory
  not_initialised,
  no_fence_after_init,
  no_barrier_after_init,
  no_arrivals_wanted,
  misplaced_barrier,
  two_arrivals,
  all_lanes_arrive,
  one_arrival_missing,
  barrier_as_memory,
  third_parity,
  // copies
  read_before_arrival,
  same_parity_for_reader,
  parity_of_reader_for_writer,
  same_parity_for_writer,
  overwrite_before_consumption,
  fewer_bytes_expected,
  more_bytes_expected,
  misplaced_box,
  box_beyond_memory,
  map_beyond_tensor,
  no_map,
  never_waited_for,
  // products
  no_first_fence,
  sums_changed_after_fence,
  sums_read_before_wait,
  no_commit,
  consumed_before_wait,
  warp_left_out,
  thread_left_out,
  other_operands,
  matrix_not_swizzled,
  matrix_between_patterns,
  matrix_stride,
  matrix_beyond_memory,
  // registers
  registers_not_released,
  fewer_than_asked,
  not_a_multiple,
  part_of_warpgroup,
  // what threads have written
  written_without_fence,
  fence_after_barrier,
  written_without_barrier,
  copy_over_written,
  product_under_way_overwritten,
  read_without_wait,
  copy_over_read,
  // clusters
  no_cluster_barrier_after_init,
  other_readers_not_waited_for,
  waited_for_in_own_block,
  block_beyond_cluster,
  copy_to_itself_only,
  no_cluster_barrier_at_end,
};

constexpr int kStages = 2, kTiles = 5, kBytesA = 64 * 128, kStageBytes = kBytesA + 256 * 128;
constexpr int kSharedBytes = kStages * kStageBytes + 1024;

// One warpgroup copies, another multiplies: y[64][256] = a b^T, with K in tiles that go through two stages in turn.
__global__ void pipeline(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, float* y,
                         Mistake wrong) {
  char* const s = ptx::dynamic_shared<char>();
  uint64_t* const arrived = (uint64_t*)(s + kStages * kStageBytes);
  uint64_t* const consumed = arrived + kStages;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      if (wrong != not_initialised) ptx::mbarrier_init(arrived + i, wrong == no_arrivals_wanted ? 0 : 1);
      ptx::mbarrier_init(consumed + i, wrong == one_arrival_missing ? 5 : 4);
    }
    if (wrong == misplaced_barrier) ptx::mbarrier_init((uint64_t*)((char*)consumed + 68), 1);
    if (wrong != no_fence_after_init) ptx::fence_mbarrier_init();
  }
  if (wrong != no_barrier_after_init) __syncthreads();
  if (warpgroup == 0) {
    if (wrong == fewer_than_asked) ptx::more_registers<40>();
    if (wrong == not_a_multiple) ptx::fewer_registers<36>();
    if (wrong != part_of_warpgroup || warp < 3) {
      if (wrong != registers_not_released) ptx::fewer_registers<40>();
    }
    if (threadIdx.x != 0) return;
    if (wrong == barrier_as_memory) arrived[1] = 0;
    for (int t = 0; t < kTiles; ++t) {
      const int stage = t % kStages, parity = t / kStages % 2;
      uint64_t* const barrier = arrived + stage;
      const int wanted = wrong == parity_of_reader_for_writer ? parity
                         : wrong == same_parity_for_writer    ? 1
                                                              : parity ^ 1;
      if (wrong != overwrite_before_consumption)
        ptx::mbarrier_wait(consumed + stage, wrong == third_parity ? 2 : wanted);
      const int more = wrong == fewer_bytes_expected ? -16 : wrong == more_bytes_expected ? 16 : 0;
      ptx::mbarrier_arrive_expect(barrier, kStageBytes + more);
      if (wrong == two_arrivals) ptx::mbarrier_arrive_at(barrier, 0);
      char* const to = s + stage * kStageBytes + (wrong == misplaced_box ? 64 : 0);
      CUtensorMap other = {};
      ptx::copy_box(to, wrong == no_map ? &other : &map_a, t * 64, 0, barrier);
      ptx::copy_box(wrong == box_beyond_memory ? s + kSharedBytes - 8192 : to + kBytesA, &map_b, t * 64, 0, barrier);
    }
    if (wrong == never_waited_for) ptx::copy_box(s, &map_a, 0, 0, arrived + 1);
  } else {
    ptx::more_registers<256>();
    float sum[128];
    for (float& x : sum) x = NAN;
    for (int t = 0; t < kTiles; ++t) {
      const int stage = t % kStages, parity = t / kStages % 2;
      const char* const a = s + stage * kStageBytes;
      if (wrong != read_before_arrival)
        ptx::mbarrier_wait(arrived + stage, wrong == same_parity_for_reader ? 0 : parity);
      if (wrong != no_first_fence) ptx::wgmma_fence();
      if (wrong == sums_changed_after_fence && t == 3) sum[threadIdx.x % 128] += 1;
      if ((wrong != warp_left_out || warp != 3 || t != 2) && (wrong != thread_left_out || threadIdx.x != 200))
        for (int step = 0; step < 4; ++step) {
          uint64_t of_a = swizzled_matrix(ptx::shared_address(a) + 32 * step, 0, 1024);
          if (wrong == matrix_not_swizzled) of_a &= ~(uint64_t(1) << 62);
          if (wrong == matrix_between_patterns) of_a += 128 >> 4;
          if (wrong == matrix_stride) of_a += uint64_t(128 >> 4) << 32;
          if (wrong == matrix_beyond_memory) of_a += uint64_t(131072 >> 4) << 32;
          if (wrong == other_operands && warp == 1) of_a += 32 >> 4;
          const uint64_t of_b = swizzled_matrix(ptx::shared_address(a + kBytesA) + 32 * step, 0, 1024);
          ptx::wgmma_bf16<false, false>(sum, of_a, of_b, t > 0 || step > 0);
        }
      if (wrong != no_commit) ptx::wgmma_commit();
      if (wrong == consumed_before_wait && threadIdx.x % 32 == 0) ptx::mbarrier_arrive_at(consumed + stage, 0);
      if (wrong == sums_read_before_wait && t == kTiles - 1)
        ptx::wgmma_wait<1>();
      else
        ptx::wgmma_wait<0>();
      if (wrong != consumed_before_wait && (threadIdx.x % 32 == 0 || wrong == all_lanes_arrive))
        ptx::mbarrier_arrive_at(consumed + stage, 0);
    }
    store_sums(sum, y);
  }
}

// A product of what threads have put into shared memory, and a copy over it.
__global__ void written_by_threads(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap,
                                   float* y, Mistake wrong) {
  char* const s = ptx::dynamic_shared<char>();
  uint64_t* const arrived = (uint64_t*)(s + kStageBytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(arrived, 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = threadIdx.x; i < kStageBytes / 2; i += 128) ((uint16_t*)s)[i] = 0x3f80;  // 1, wherever it is
  if (wrong != written_without_fence && wrong != fence_after_barrier) ptx::fence_proxy_async();
  if (wrong != written_without_barrier) __syncthreads();
  if (wrong == fence_after_barrier) ptx::fence_proxy_async();
  float sum[128];
  ptx::wgmma_fence();
  ptx::wgmma_bf16<false, false>(sum, swizzled_matrix(ptx::shared_address(s), 0, 1024),
                                swizzled_matrix(ptx::shared_address(s + kBytesA), 0, 1024), false);
  ptx::wgmma_commit();
  if (wrong == product_under_way_overwritten && threadIdx.x == 0) *(float*)s = 0;
  ptx::wgmma_wait<0>();
  __syncthreads();
  ((float*)s)[threadIdx.x] = 0;
  if (wrong != copy_over_written) ptx::fence_proxy_async();
  __syncthreads();
  const auto copy = [&] {
    if (threadIdx.x != 0) return;
    ptx::mbarrier_arrive_expect(arrived, kBytesA);
    ptx::copy_box(s, &map_a, 0, 0, arrived);
  };
  copy();
  if (wrong != read_without_wait) ptx::mbarrier_wait(arrived, 0);
  sum[0] += ((float*)s)[threadIdx.x] * 0;
  if (wrong != copy_over_read) __syncthreads();
  copy();
  ptx::mbarrier_wait(arrived, 1);
  store_sums(sum, y);
}

// The two blocks of a cluster copy half of each tile to both, one tile after another to the same place, and add up what
// they read.
__global__ void shared_tiles(const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap map, float* y,
                             Mistake wrong) {
  constexpr int kHalf = 128 * 128, kRounds = kTiles;
  char* const s = ptx::dynamic_shared<char>();
  uint64_t* const arrived = (uint64_t*)(s + 2 * kHalf);
  uint64_t* const consumed = arrived + 1;
  const int rank = ptx::cluster_rank(), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(arrived, 1);
    ptx::mbarrier_init(consumed, wrong == other_readers_not_waited_for ? 1 : 2);
    ptx::fence_mbarrier_init();
  }
  if (wrong == no_cluster_barrier_after_init)
    __syncthreads();
  else
    ptx::cluster_sync();
  if (threadIdx.x == 0) {
    for (int t = 0; t < kRounds; ++t) {
      if (wrong == waited_for_in_own_block)
        ptx::mbarrier_wait(consumed, t % 2 ^ 1);
      else
        ptx::mbarrier_wait_for_cluster(consumed, t % 2 ^ 1);
      ptx::mbarrier_arrive_expect(arrived, 2 * kHalf);
      ptx::copy_box_to(wrong == block_beyond_cluster  ? 7
                       : wrong == copy_to_itself_only ? 1 << rank
                                                      : 3,
                       s + rank * kHalf, &map, t * 64, rank * 128, arrived);
    }
  } else if (threadIdx.x >= 32) {
    float sum = 0;
    for (int t = 0; t < kRounds; ++t) {
      ptx::mbarrier_wait(arrived, t % 2);
      for (int i = lane; i < kHalf; i += 32) sum += __bfloat162float(((__nv_bfloat16*)s)[i]);
      __syncwarp();
      if (lane < 2 && (wrong != other_readers_not_waited_for || lane == rank)) ptx::mbarrier_arrive_at(consumed, lane);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    for (int i = 32 * rank + lane; i < 64 * 256; i += 64) y[i] = sum;
  }
  if (wrong != no_cluster_barrier_at_end) ptx::cluster_sync();
}

using Case = PlantedFault<Mistake>;

const Case kPipelineCases[] = {
    {"mbarrier not initialised", not_initialised, {Kind::mbarrier}},
    {"no fence after mbarrier.init", no_fence_after_init, {Kind::proxy}},
    {"no barrier after mbarrier.init", no_barrier_after_init, {Kind::race, Kind::mbarrier}},
    {"mbarrier for no arrivals", no_arrivals_wanted, {Kind::mbarrier}},
    {"misaligned mbarrier", misplaced_barrier, {Kind::misaligned}},
    {"two arrivals where one is to be", two_arrivals, {Kind::mbarrier}},
    {"every lane arrives", all_lanes_arrive, {Kind::race, Kind::mbarrier, Kind::divergence}},
    {"an arrival is missing", one_arrival_missing, {Kind::divergence}},
    {"mbarrier used as memory", barrier_as_memory, {Kind::mbarrier}},
    {"a parity of 2", third_parity, {Kind::mbarrier}},
    {"read before the copy arrives", read_before_arrival, {Kind::copy_under_way, Kind::unwritten, Kind::race}},
    {"reader's parity stays", same_parity_for_reader, {Kind::race, Kind::copy_under_way, Kind::divergence}},
    {"writer's parity is the reader's", parity_of_reader_for_writer, {Kind::divergence}},
    {"writer's parity stays", same_parity_for_writer, {Kind::race, Kind::copy_under_way, Kind::mbarrier}},
    {"overwritten before it is consumed",
     overwrite_before_consumption,
     {Kind::race, Kind::copy_under_way, Kind::mbarrier}},
    {"fewer bytes expected than are copied", fewer_bytes_expected, {Kind::divergence, Kind::race}},
    {"more bytes expected than are copied", more_bytes_expected, {Kind::divergence}},
    {"misaligned box", misplaced_box, {Kind::misaligned}},
    {"box beyond shared memory", box_beyond_memory, {Kind::out_of_bounds, Kind::mbarrier}},
    {"tensor map beyond its tensor", map_beyond_tensor, {Kind::out_of_bounds}},
    {"no tensor map", no_map, {Kind::descriptor}},
    {"copy that nobody waits for", never_waited_for, {Kind::copy_under_way, Kind::race}},
    {"no wgmma.fence", no_first_fence, {Kind::registers}},
    {"sums changed after wgmma.fence", sums_changed_after_fence, {Kind::registers}},
    {"sums read before the wait", sums_read_before_wait, {Kind::registers}},
    {"products not committed", no_commit, {Kind::race, Kind::registers}},
    {"consumed before the wait", consumed_before_wait, {Kind::race}},
    {"a warp left out of wgmma", warp_left_out, {Kind::divergence}},
    {"a thread left out of wgmma", thread_left_out, {Kind::divergence}},
    {"a warp with other operands", other_operands, {Kind::divergence}},
    {"a matrix that is not swizzled", matrix_not_swizzled, {Kind::descriptor}},
    {"a matrix between patterns", matrix_between_patterns, {Kind::descriptor}},
    {"a matrix of a wrong stride", matrix_stride, {Kind::descriptor}},
    {"a matrix beyond shared memory", matrix_beyond_memory, {Kind::out_of_bounds}},
    {"more registers than there are", registers_not_released, {Kind::divergence}},
    {"setmaxnreg.inc to fewer", fewer_than_asked, {Kind::registers}},
    {"setmaxnreg of no multiple of 8", not_a_multiple, {Kind::registers}},
    {"setmaxnreg by a part of a warpgroup", part_of_warpgroup, {Kind::divergence}},
};
const Case kThreadCases[] = {
    {"written without fence.proxy.async", written_without_fence, {Kind::proxy}},
    {"fence.proxy.async after the barrier", fence_after_barrier, {Kind::proxy}},
    {"written without a barrier", written_without_barrier, {Kind::race, Kind::unwritten}},
    {"product's operand overwritten", product_under_way_overwritten, {Kind::race}},
    {"copy over what threads have written", copy_over_written, {Kind::proxy}},
    {"copy read without a wait", read_without_wait, {Kind::copy_under_way, Kind::race}},
    {"copy over what is being read", copy_over_read, {Kind::race, Kind::copy_under_way, Kind::divergence}},
};

const Case kClusterCases[] = {
    {"no barrier of the cluster after mbarrier.init", no_cluster_barrier_after_init, {Kind::race, Kind::mbarrier}},
    {"readers of another block not waited for", other_readers_not_waited_for, {Kind::race, Kind::copy_under_way}},
    {"a wait of the block's scope for another's arrivals", waited_for_in_own_block, {Kind::race}},
    {"a copy to a block beyond the cluster", block_beyond_cluster, {Kind::out_of_bounds}},
    {"a copy that leaves another block out", copy_to_itself_only, {Kind::divergence}},
    {"no barrier of the cluster at the end", no_cluster_barrier_at_end, {Kind::out_of_bounds, Kind::copy_under_way}},
};

using Kernel = void (*)(CUtensorMap, CUtensorMap, float*, Mistake);

// Without the mistake nothing is found and y is what `expected` says; with it, one of these kinds of fault.
template <class F>
void run_case(Kernel kernel, int blocks, int threads, const Case& c, F&& expected) {
  constexpr int kK = kTiles * 64;
  Random random(5);
  const auto small = [&] { return (double)random.integer(-8, 8); };  // every sum of products is exact
  const Buffer<bf16> a = filled<bf16>(64 * kK, small), b = filled<bf16>(256 * kK, small);
  describe("planted fault: %s", c.name);
  Buffer<float> y(64 * 256);
  const CUtensorMap map_a = matrix_map(a.data() + (c.mistake == map_beyond_tensor ? 8 : 0), kK, 64, 64);
  const CUtensorMap map_b = matrix_map(b.data(), kK, 256, 256 / blocks);
  const Lent la(a), lb(b);
  cuda_on_host::add_buffer(y.data(), 4 * 64 * 256);
  launch_planted(c, [&] {
    rf::cuda::launch_cluster(kernel, blocks, blocks, threads, kSharedBytes, nullptr, map_a, map_b, y.data(), c.mistake);
  });
  cuda_on_host::remove_buffer(y.data());
  if (c.mistake == none) CHECK(y.copy() == expected(a, b));
}

}  // namespace

TEST(faults_sm90) {
  if (rf::cuda::device().arch < 90) return;
  const auto product = [](const auto& a, const auto& b) {
    std::vector<float> y;
    for (int i = 0; i < 64; ++i)
      for (int j = 0; j < 256; ++j) {
        double sum = 0;
        for (int k = 0; k < kTiles * 64; ++k) sum += a.value(i * kTiles * 64 + k) * b.value(j * kTiles * 64 + k);
        y.push_back((float)sum);
      }
    return y;
  };
  const auto ones = [](const auto&, const auto&) { return std::vector<float>(64 * 256, 16); };
  const auto total = [](const auto&, const auto& b) {
    double sum = 0;
    for (int64_t i = 0; i < b.count(); ++i) sum += b.value(i);
    return std::vector<float>(64 * 256, (float)sum);
  };
  run_case((Kernel)pipeline, 1, 256, {"pipeline, corrected", none, {}}, product);
  for (const Case& c : kPipelineCases) run_case((Kernel)pipeline, 1, 256, c, product);
  run_case((Kernel)written_by_threads, 1, 128, {"written by threads, corrected", none, {}}, ones);
  for (const Case& c : kThreadCases) run_case((Kernel)written_by_threads, 1, 128, c, ones);
  run_case((Kernel)shared_tiles, 2, 64, {"shared tiles, corrected", none, {}}, total);
  for (const Case& c : kClusterCases) run_case((Kernel)shared_tiles, 2, 64, c, total);
}

}  // namespace test
