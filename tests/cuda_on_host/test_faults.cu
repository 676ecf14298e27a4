// Kernels with one mistake each, of every kind that the emulator claims to find, beside the same kernels without it.
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/ptx.cuh"

#include "check.h"
#include "device_memory.h"

namespace test {
namespace {

namespace ptx = rf::ptx;
using cuda_on_host::Fault;
using cuda_on_host::Kind;

constexpr int kThreads = 96;

// ---- kernels: `wrong` plants the mistake ---------------------------------------------------------------------------

__global__ void write_past_end(float* y, bool wrong) { y[threadIdx.x + (wrong ? 1 : 0)] = 1; }
__global__ void read_before_start(const float* x, float* y, bool wrong) {
  y[threadIdx.x] = *(x + (int)threadIdx.x - (wrong ? 1 : 0));
}
struct __attribute__((packed)) Unaligned {
  float value;
};
// By a single byte.
__global__ void read_half_outside(const float* x, float* y, bool wrong) {
  const char* p = (const char*)(x + threadIdx.x);
  y[threadIdx.x] = ((const Unaligned*)(p + (wrong ? 1 : 0)))->value;
}
__global__ void write_input(float* x, bool wrong) {
  if (wrong && threadIdx.x == 7) x[7] = 0;
}
__global__ void misaligned_vector(float* y, bool wrong) {
  if (threadIdx.x == 0) *(float4*)(y + (wrong ? 1 : 0)) = make_float4(1, 2, 3, 4);
}
__global__ void local_array(float* y, bool wrong) {
  float mine[4] = {1, 2, 3, 4};
  mine[threadIdx.x % 4] += 1;
  y[threadIdx.x] = mine[threadIdx.x % 4 + (wrong && threadIdx.x == 3 ? 1 : 0)];
}
__global__ void static_array(float* y, bool wrong) {
  __shared__ float s[kThreads];
  s[threadIdx.x + (wrong ? 1 : 0)] = 1;
  y[threadIdx.x] = s[threadIdx.x + (wrong ? 1 : 0)];
}
__global__ void beyond_dynamic(float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  s[threadIdx.x + (wrong ? 1 : 0)] = 1;
  y[threadIdx.x] = 0;
}
__global__ void unwritten_static(float* y, bool wrong) {
  __shared__ float s[kThreads];
  if (!wrong || threadIdx.x != 5) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
// What a block leaves in shared memory the next block must not read.
__global__ void unwritten_in_second_block(float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  if (!wrong || blockIdx.x == 0) s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void missing_barrier(float* y, bool wrong) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = (float)threadIdx.x;
  if (!wrong) __syncthreads();
  y[threadIdx.x] = threadIdx.x == 0 ? s[0] : s[threadIdx.x - 1];
}
// Reads are done before the barrier; the next round's writes are not kept from them.
__global__ void missing_second_barrier(float* y, bool wrong) {
  __shared__ float s[kThreads];
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = (float)round;
    __syncthreads();
    sum += s[(threadIdx.x + 32) % kThreads];
    if (!wrong) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
__global__ void missing_syncwarp(float* y, bool wrong) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = (float)threadIdx.x;
  if (!wrong) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
// __syncwarp orders a warp, not the block.
__global__ void syncwarp_for_block(float* y, bool wrong) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = (float)threadIdx.x;
  if (wrong)
    __syncwarp();
  else
    __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x + 32) % kThreads];
}
// A broadcast: the lane that writes again has to wait for all readers.
__global__ void write_after_broadcast(float* y, bool wrong) {
  __shared__ float s;
  if (threadIdx.x == 0) s = 1;
  __syncthreads();
  float v = s;
  if (!wrong) __syncthreads();
  if (threadIdx.x == 0) s = 2;
  __syncthreads();
  y[threadIdx.x] = v + s;
}
__global__ void named_barrier(float* y, bool wrong) {
  __shared__ float s[32];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = 1;
    if (!wrong) ptx::barrier_arrive(1, 64);
  } else if (threadIdx.x < 64) {
    if (!wrong) ptx::barrier_sync(1, 64);
    y[threadIdx.x] = s[63 - threadIdx.x];
  }
}
__global__ void atomic_and_plain(float* y, bool wrong) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  __syncthreads();
  if (wrong && threadIdx.x == 40)
    n = 3;
  else
    atomicAdd(&n, 1);
  __syncthreads();
  y[threadIdx.x] = (float)n;
}
__global__ void divergent_barrier(float* y, bool wrong) {
  if (wrong && threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 0;
}
__global__ void barrier_never_reached(float* y, bool wrong) {
  if (wrong && threadIdx.x >= 32) ptx::barrier_sync(2, 96);
  y[threadIdx.x] = 0;
}
__global__ void barrier_in_part_of_warp(float* y, bool wrong) {
  if (threadIdx.x < 64 && (!wrong || threadIdx.x % 2)) ptx::barrier_sync(3, wrong ? 32 : 64);
  y[threadIdx.x] = 0;
  __syncthreads();
}
__global__ void shuffle_without_lane(float* y, bool wrong) {
  float v = 1;
  if (!wrong || threadIdx.x % 32 != 9) v = __shfl_xor_sync(~0u, v, 1);
  __syncthreads();
  y[threadIdx.x] = v;
}
__global__ void shuffle_outside_mask(float* y, bool wrong) {
  float v = 1;
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffu, v, wrong ? 16 : 8);
  y[threadIdx.x] = v;
}
__global__ void mask_without_caller(float* y, bool wrong) {
  y[threadIdx.x] = (float)__ballot_sync(wrong ? 0x7fffffffu : ~0u, 1);
}
__global__ void copy_not_waited_for(const float* x, float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  ptx::cp_async4(s + threadIdx.x, x + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async4(s + kThreads + threadIdx.x, x + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();  // the first group only
  y[threadIdx.x] = s[threadIdx.x + (wrong ? kThreads : 0)];
  ptx::cp_async_wait<0>();
}
__global__ void copy_from_outside(const float* x, float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  ptx::cp_async4(s + threadIdx.x, x + threadIdx.x + (wrong ? 1 : 0), 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x];
}
// The wait makes a copy visible to the thread that issued it, to others only a barrier does.
__global__ void copy_without_barrier(const float* x, float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  ptx::cp_async4(s + threadIdx.x, x + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!wrong) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void copy_into_data_in_use(const float* x, float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
  if (!wrong) __syncthreads();
  ptx::cp_async4(s + threadIdx.x, x + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
__global__ void misaligned_copy(const float* x, float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  if (threadIdx.x == 0) ptx::cp_async16(s, x + (wrong ? 1 : 0));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[threadIdx.x] = 0;
}
__global__ void misaligned_matrix(float* y, bool wrong) {
  uint32_t* s = ptx::dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < 256; i += kThreads) s[i] = 0;
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, s + 4 * (threadIdx.x % 32) + (wrong && threadIdx.x == 4 ? 1 : 0));
  y[threadIdx.x] = (float)r[0];
}
__global__ void failed_assertion(float* y, bool wrong) {
  RF_DEVICE_ASSERT(!wrong || threadIdx.x != 11, "thread 11 is wanted elsewhere");
  y[threadIdx.x] = 0;
}
__global__ void divide_by_zero(int* y, int divisor) { y[threadIdx.x] = (int)threadIdx.x / divisor; }
__global__ void endless_loop(volatile float* y, bool wrong) {
  while (wrong && y[0] < 1) y[1] = y[0];
}
__global__ void remote_without_barrier(float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  s[threadIdx.x] = (float)ptx::cluster_rank();
  if (wrong)
    __syncthreads();
  else
    ptx::cluster_sync();
  y[blockIdx.x * kThreads + threadIdx.x] = ptx::cluster_map(s, ptx::cluster_rank() ^ 1)[threadIdx.x];
  ptx::cluster_sync();
}
__global__ void remote_after_end(float* y, bool wrong) {
  float* s = ptx::dynamic_shared<float>();
  s[threadIdx.x] = 1;
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 0) y[threadIdx.x] = ptx::cluster_map(s, 1)[threadIdx.x];
  if (!wrong) ptx::cluster_sync();
}
// Not wrong, but different each time: a sum in the order in which threads come, and a plain write by all of them.
__global__ void sum_in_any_order(float* y, bool wrong) {
  if (wrong)
    atomicAdd(y, 1.0f / (float)(3 + threadIdx.x));
  else if (threadIdx.x == 0)
    for (int i = 0; i < kThreads; ++i) *y += 1.0f / (float)(3 + i);
}
__global__ void last_block_wins(float* y, bool wrong) {
  if (threadIdx.x == 0) y[wrong ? 0 : blockIdx.x] = (float)blockIdx.x;
}

// ---- what comes of them --------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  Kind kind;  // a missing barrier may also show in that a reader comes before the first writer: unwritten
  void (*launch)(float* x, float* y, bool wrong);
};

template <void (*kernel)(float*, bool), int blocks = 1, int shared = 4 * kThreads>
void on_y(float*, float* y, bool wrong) {
  rf::cuda::launch(kernel, blocks, kThreads, shared, nullptr, y, wrong);
}
template <void (*kernel)(const float*, float*, bool)>
void on_both(float* x, float* y, bool wrong) {
  rf::cuda::launch(kernel, 1, kThreads, 8 * kThreads, nullptr, x, y, wrong);
}
template <void (*kernel)(float*, bool)>
void on_pair(float*, float* y, bool wrong) {
  rf::cuda::launch_cluster(kernel, 2, 2, kThreads, 4 * kThreads, nullptr, y, wrong);
}

const Case kCases[] = {
    {"write past the end", Kind::out_of_bounds, on_y<write_past_end, 1>},
    {"read before the start", Kind::out_of_bounds, on_both<read_before_start>},
    {"read half outside", Kind::out_of_bounds, on_both<read_half_outside>},
    {"write to an input", Kind::read_only,
     [](float* x, float*, bool wrong) { rf::cuda::launch(write_input, 1, kThreads, 0, nullptr, x, wrong); }},
    {"misaligned vector", Kind::misaligned, on_y<misaligned_vector>},
    {"local array", Kind::out_of_bounds, on_y<local_array>},
    {"beyond static shared memory", Kind::out_of_bounds, on_y<static_array>},
    {"beyond dynamic shared memory", Kind::out_of_bounds, on_y<beyond_dynamic>},
    {"unwritten shared memory", Kind::unwritten, on_y<unwritten_static>},
    {"unwritten, second block", Kind::unwritten, on_y<unwritten_in_second_block, 3>},
    {"missing barrier", Kind::race, on_y<missing_barrier>},
    {"missing second barrier", Kind::race, on_y<missing_second_barrier>},
    {"missing __syncwarp", Kind::race, on_y<missing_syncwarp>},
    {"__syncwarp for a block", Kind::race, on_y<syncwarp_for_block>},
    {"write after broadcast", Kind::race, on_y<write_after_broadcast>},
    {"missing named barrier", Kind::race, on_y<named_barrier>},
    {"atomic and plain write", Kind::race, on_y<atomic_and_plain>},
    {"divergent barrier", Kind::divergence, on_y<divergent_barrier>},
    {"barrier never reached", Kind::divergence, on_y<barrier_never_reached>},
    {"barrier in a part of a warp", Kind::divergence, on_y<barrier_in_part_of_warp>},
    {"shuffle without a lane", Kind::divergence, on_y<shuffle_without_lane>},
    {"shuffle from outside the mask", Kind::divergence, on_y<shuffle_outside_mask>},
    {"mask without the caller", Kind::divergence, on_y<mask_without_caller>},
    {"copy not waited for", Kind::copy_under_way, on_both<copy_not_waited_for>},
    {"copy from outside", Kind::out_of_bounds, on_both<copy_from_outside>},
    {"copy without barrier", Kind::race, on_both<copy_without_barrier>},
    {"copy into data in use", Kind::race, on_both<copy_into_data_in_use>},
    {"misaligned copy", Kind::misaligned, on_both<misaligned_copy>},
    {"misaligned matrix", Kind::misaligned, on_y<misaligned_matrix, 1, 1024>},
    {"failed assertion", Kind::assertion, on_y<failed_assertion>},
    {"division by zero", Kind::division,
     [](float*, float* y, bool wrong) {
       rf::cuda::launch(divide_by_zero, 1, kThreads, 0, nullptr, (int*)y, wrong ? 0 : 3);
     }},
    {"endless loop", Kind::hang,
     [](float*, float* y, bool wrong) {
       rf::cuda::launch((void (*)(volatile float*, bool))endless_loop, 1, 1, 0, nullptr, y, wrong);
     }},
    {"too many threads", Kind::launch,
     [](float*, float* y, bool wrong) {
       rf::cuda::launch(write_past_end, 1, wrong ? 1025 : 96, 0, nullptr, y, false);
     }},
    {"too much shared memory", Kind::launch,
     [](float*, float* y, bool wrong) {
       rf::cuda::launch(write_past_end, 1, 96, wrong ? 1 << 20 : 1 << 10, nullptr, y, false);
     }},
};
const Case kClusterCases[] = {
    {"remote without barrier", Kind::race, on_pair<remote_without_barrier>},
    {"remote after the end", Kind::out_of_bounds, on_pair<remote_after_end>},
};

// Without the mistake nothing is found; with it, this kind of fault. Under every schedule, but where none can see it.
void run_case(const Case& c, int* found) {
  for (const bool wrong : {false, true}) {
    describe("planted fault: %s%s", c.name, wrong ? "" : ", corrected");
    // kThreads elements that a kernel may touch, for each block of a cluster.
    const Buffer<float> x = filled<float>(kThreads, [] { return 1.0; });
    Buffer<float> y = filled<float>(2 * kThreads, [] { return 0.0; });
    cuda_on_host::add_buffer(x.data(), 4 * kThreads, false);
    cuda_on_host::add_buffer(y.data(), 4 * kThreads * (found ? 2 : 1));
    bool thrown = false;
    try {
      c.launch((float*)x.data(), y.data(), wrong);
    } catch (const Fault& fault) {
      thrown = true;
      if (!wrong)
        CHECK((std::printf("%s\n", fault.what()), false));
      else if (found)
        *found += fault.kind == c.kind;
      else if (!CHECK(fault.kind == c.kind || (c.kind == Kind::race && fault.kind == Kind::unwritten)))
        std::printf("%s\n", fault.what());
    }
    if (!found) CHECK(thrown == wrong);
    cuda_on_host::remove_buffer(x.data());
    cuda_on_host::remove_buffer(y.data());
  }
}

// What a kernel leaves in y under each schedule.
bool same_under_every_schedule(void (*kernel)(float*, bool), bool wrong, int blocks) {
  std::vector<std::vector<float>> results;
  for (const auto schedule : cuda_on_host::kSchedules) {
    cuda_on_host::set_schedule(schedule);
    Buffer<float> y = filled<float>(kThreads, [] { return 0.0; });
    cuda_on_host::add_buffer(y.data(), 4 * kThreads);
    rf::cuda::launch(kernel, blocks, kThreads, 0, nullptr, y.data(), wrong);
    cuda_on_host::remove_buffer(y.data());
    results.push_back(y.copy());
  }
  return results[0] == results[1] && results[0] == results[2];
}

}  // namespace

TEST(faults) {
  int arch, sms;
  int64_t shared;
  cuda_on_host::get_device(&arch, &sms, &shared);
  for (const Case& c : kCases) run_case(c, nullptr);
  for (const Case& c : kClusterCases) {
    if (arch < 90) {
      describe("clusters on sm_80");
      bool refused = false;
      try {
        c.launch(nullptr, nullptr, false);
      } catch (const Fault& fault) {
        refused = fault.kind == Kind::launch;
      }
      CHECK(refused);
      continue;
    }
    // Blocks that run to their end one after the other never meet: it takes the right schedule to see that.
    int found = 0;
    for (const auto schedule : cuda_on_host::kSchedules)
      for (unsigned seed = 1; seed <= 4; ++seed) {
        cuda_on_host::set_schedule(schedule, seed);
        run_case(c, &found);
      }
    describe("planted fault: %s", c.name);
    CHECK(found > 0);
  }
  for (const auto& kernel : {sum_in_any_order, last_block_wins}) {
    describe("results that depend on the schedule");
    CHECK(same_under_every_schedule(kernel, false, kernel == last_block_wins ? 3 : 1));
    CHECK(!same_under_every_schedule(kernel, true, kernel == last_block_wins ? 3 : 1));
  }
}

}  // namespace test
