// What the threads of a row have gathered, combined in an order that depends on the launch alone, so that every run
// gives the same bits, and every thread of the row gets the same result. A State is trivially copyable, its default
// value is that of no elements, and merge(into, other) adds what comes after `into`.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/device/ptx.cuh"

namespace rf::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The state of a plain sum.
template <class A>
struct Sum {
  A sum = A(0);
};
template <class A>
__device__ __forceinline__ void merge(Sum<A>& into, const Sum<A>& other) {
  into.sum += other.sum;
}

// That of a sum of any number of doubles, as exact as a few: as csrc/cpu/compensated_sum.h.
struct CompensatedSum {
  double sum = 0, lost = 0;

  __device__ __forceinline__ void add(double x) {
    const double next = sum + x, part = next - sum;
    lost += (sum - (next - part)) + (x - part);
    sum = next;
  }
  // What was lost of an infinite sum is NaN.
  __device__ __forceinline__ double value() const { return lost - lost == 0 ? sum + lost : sum; }
};
__device__ __forceinline__ void merge(CompensatedSum& into, const CompensatedSum& other) {
  into.add(other.sum);
  into.lost += other.lost;
}

// Applies one shuffle to each 32-bit word of a state.
template <class State, class Shuffle>
__device__ __forceinline__ State shuffled(const State& s, Shuffle&& shuffle) {
  static_assert(sizeof(State) % 4 == 0, "a state is shuffled in words of 32 bits");
  unsigned word[sizeof(State) / 4];
  memcpy(word, &s, sizeof(State));
#pragma unroll
  for (unsigned& w : word) w = shuffle(w);
  State result;
  memcpy(&result, word, sizeof(State));
  return result;
}

// Over each group of `lanes` (a power of two) neighbouring lanes; all lanes of the warp take part.
template <class State>
__device__ __forceinline__ State reduce_lanes(State s, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    merge(s, shuffled(s, [&](unsigned w) { return __shfl_down_sync(kAllLanes, w, offset, lanes); }));
  return shuffled(s, [&](unsigned w) { return __shfl_sync(kAllLanes, w, 0, lanes); });
}

// Over a block of whole warps, once per `scratch`, which holds a state for each of 32 warps.
template <class State>
__device__ __forceinline__ State reduce_block(State s, State* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  s = reduce_lanes(s, kWarp);
  if (lane == 0) scratch[warp] = s;
  __syncthreads();
  return reduce_lanes(lane < warps ? scratch[lane] : State(), kWarp);
}

// Over the blocks of a cluster, given the block's state; `slot` lies in dynamic shared memory, and no block may leave
// before a further cluster_sync.
template <class State>
__device__ __forceinline__ State reduce_cluster(State s, State* slot) {
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) *slot = s;
  ptx::cluster_sync();
  return reduce_lanes(lane < (int)ptx::cluster_size() ? *ptx::cluster_map(slot, lane) : State(), kWarp);
}

// Over the threads of a block that share threadIdx.x, once per `scratch`, which holds a state for each thread. Pairs of
// neighbours, then pairs of pairs: a single column has up to 256 threads.
template <class State>
__device__ __forceinline__ State reduce_columns(State s, State* scratch) {
  State* mine = scratch + threadIdx.y * blockDim.x + threadIdx.x;
  *mine = s;
  for (int step = 1; step < (int)blockDim.y; step *= 2) {
    __syncthreads();
    if (threadIdx.y % (2 * step) != 0 || threadIdx.y + step >= blockDim.y) continue;
    merge(s, mine[step * blockDim.x]);
    *mine = s;
  }
  __syncthreads();
  return scratch[threadIdx.x];
}

}  // namespace rf::cuda
