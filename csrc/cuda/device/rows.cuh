// Kernels that reduce a row and then write one, over "programs" that say what is reduced and what is written: softmax,
// cross-entropy and their gradients. A row is read from memory once wherever it fits on the chip:
//   lanes_kernel    a short row by some lanes of a warp, kept in their registers
//   block_kernel    a row by a block, or by a cluster of blocks, kept in shared memory; a longer row is read again
//   columns_kernel  rows that are adjacent while their elements are far apart: a row per thread column, read twice
//
// A program P is a kernel argument with
//   rows, classes, reduces, emits, planes       planes: vectors that make an Item
//   Element, State, Item { Vec<Element> plane[most]; }, Row { bool reads; int64_t first; ... }
//   bool idle()                                 nothing to do at all
//   Row row(r)                                  pointers and numbers of row r; first: see first_vector
//   Item load(row, j), Item blank()             the vectors at element j; those of a row that need not be read
//   add(state, row, item, j)                    reduces them
//   finish(row, state, r, leader)               completes row after the reduction (before emitting, where there is
//                                               none); the leader alone writes what there is one of per row
//   emit(row, item, j)                          writes the vectors at element j, which may be those that were loaded
#pragma once
#include <algorithm>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/tuning.h"

namespace rf::cuda {

// The vectors begin + step * i < end of a row, some loads ahead of their use.
template <int kAhead, class P, class Use>
__device__ __forceinline__ void for_vectors(const P& p, const typename P::Row& row, int64_t begin, int64_t end,
                                            int64_t step, Use&& use) {
  constexpr int kW = kWidth<typename P::Element>;
  for (int64_t v = begin; v < end; v += kAhead * step) {
    typename P::Item item[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (v + i * step < end) item[i] = row.reads ? p.load(row, row.first + (v + i * step) * kW) : p.blank();
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (v + i * step < end) use(item[i], v + i * step);
  }
}

template <class P>
__global__ void __launch_bounds__(tuning::kLanesThreads, 1) lanes_kernel(P p, int lanes) {
  constexpr int kMost = tuning::kVectorsPerLane, kW = kWidth<typename P::Element>;
  if (p.idle()) return;
  const int64_t r = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const bool live = r < p.rows;
  typename P::Row row = {};
  typename P::Item item[kMost];
  const auto element = [&](int i) { return row.first + (int64_t)(lane + i * lanes) * kW; };
  if (live) {
    row = p.row(r);
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (element(i) < p.classes) item[i] = row.reads ? p.load(row, element(i)) : p.blank();
  }
  typename P::State s;
  if (p.reduces) {
    if (live && row.reads) {
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (element(i) < p.classes) p.add(s, row, item[i], element(i));
    }
    s = reduce_lanes(s, lanes);
  }
  if (!live) return;
  p.finish(row, s, r, lane == 0);
  if (!p.emits) return;
#pragma unroll
  for (int i = 0; i < kMost; ++i)
    if (element(i) < p.classes) p.emit(row, item[i], element(i));
}

// Of the states in front of a block's vectors in shared memory: one for the cluster, one for each warp.
template <class State>
constexpr int64_t kStateBytes = (int64_t)(sizeof(State) * (1 + kWarp) + 15) / 16 * 16;

// Vectors in shared memory: a plane of them behind another, so that a warp's accesses are adjacent.
template <class P>
__device__ __forceinline__ void keep(const P& p, const typename P::Item& item, int4* kept, int64_t plane) {
#pragma unroll
  for (int k = 0; k < P::kPlanes; ++k)
    if (k < p.planes) kept[k * plane] = item.plane[k].raw;
}
template <class P>
__device__ __forceinline__ typename P::Item kept_item(const P& p, const int4* kept, int64_t plane) {
  typename P::Item item = p.blank();
#pragma unroll
  for (int k = 0; k < P::kPlanes; ++k)
    if (k < p.planes) item.plane[k].raw = kept[k * plane];
  return item;
}

// `parts` blocks to a row: a cluster where there is a reduction. resident: vectors of a plane that fit shared memory.
template <class P>
__global__ void __launch_bounds__(tuning::kMostThreads, 1) block_kernel(P p, int parts, int64_t resident) {
  using Item = typename P::Item;
  using State = typename P::State;
  constexpr int kW = kWidth<typename P::Element>, kAhead = tuning::kLoadsAhead / P::kPlanes;
  if (p.idle()) return;
  State* states = ptx::dynamic_shared<State>();
  int4* kept = ptx::dynamic_shared<int4>() + kStateBytes<State> / 16;

  const int64_t r = blockIdx.x / parts, part = blockIdx.x % parts;
  typename P::Row row = p.row(r);
  const int64_t vectors = ceil_div(p.classes - row.first, kW), share = ceil_div(vectors, parts);
  const int64_t begin = part * share, end = min(vectors, begin + share);
  State s;
  if (p.reduces) {
    if (row.reads)
      for_vectors<kAhead>(p, row, begin + threadIdx.x, end, blockDim.x, [&](const Item& item, int64_t v) {
        p.add(s, row, item, row.first + v * kW);
        if (resident > 0) keep(p, item, kept + (v - begin), resident);
      });
    s = reduce_block(s, states + 1);
    if (parts > 1) s = reduce_cluster(s, states);
  }
  p.finish(row, s, r, part == 0 && threadIdx.x == 0);
  if (p.emits) {
    if (p.reduces && resident > 0 && row.reads) {
      // A thread takes back what it has put there itself, so there is nothing to wait for.
      for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
        p.emit(row, kept_item(p, kept + (v - begin), resident), row.first + v * kW);
      }
    } else {
      for_vectors<kAhead>(p, row, begin + threadIdx.x, end, blockDim.x,
                          [&](const Item& item, int64_t v) { p.emit(row, item, row.first + v * kW); });
    }
  }
  if (p.reduces && parts > 1) ptx::cluster_sync();  // others may still read this block's state
}

template <class P>
__global__ void __launch_bounds__(tuning::kColumnsThreads, 1) columns_kernel(P p) {
  using Item = typename P::Item;
  using State = typename P::State;
  constexpr int kW = kWidth<typename P::Element>, kAhead = std::max(1, tuning::kElementsAhead / kW / P::kPlanes);
  if (p.idle()) return;
  const int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const bool live = r < p.rows;
  typename P::Row row = {};
  int64_t vectors = 0;
  if (live) {
    row = p.row(r);
    vectors = ceil_div(p.classes - row.first, kW);
  }
  State s;
  if (p.reduces) {
    if (row.reads)
      for_vectors<kAhead>(p, row, threadIdx.y, vectors, blockDim.y,
                          [&](const Item& item, int64_t v) { p.add(s, row, item, row.first + v * kW); });
    s = reduce_columns(s, ptx::dynamic_shared<State>());
  }
  if (!live) return;
  p.finish(row, s, r, threadIdx.y == 0);
  if (p.emits)
    for_vectors<kAhead>(p, row, threadIdx.y, vectors, blockDim.y,
                        [&](const Item& item, int64_t v) { p.emit(row, item, row.first + v * kW); });
}

// ---- launching -----------------------------------------------------------------------------------------------------

// Vectors that a row of that layout has at most.
template <class T>
int64_t most_vectors(const void* data, const RowLayout& l, int64_t classes) {
  const auto multiple = [](int64_t stride) { return stride % kWidth<T> == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && multiple(l.outer_stride) &&
                       (l.inner == 1 || multiple(l.inner_stride));
  return ceil_div(classes + (l.class_stride == 1 && !aligned ? kWidth<T> - 1 : 0), kWidth<T>);
}

// Whether rows are nearer to one another than their elements are.
inline bool rows_are_adjacent(const RowLayout& l) {
  const auto distance = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const int64_t between = distance(l.inner == 1 ? l.outer_stride : l.inner_stride);
  return between > 0 && between < distance(l.class_stride);
}

struct BlockPlan {
  int threads, parts;
  int64_t resident;  // vectors per plane; 0: a row that is written is read again
};

inline BlockPlan plan_block(int64_t rows, int64_t vectors, int planes, bool reduces, bool emits, int64_t state_bytes) {
  const Device& d = device();
  int parts = 1;
  if (!reduces) {
    parts = (int)ceil_div(vectors, tuning::kMapVectors);
  } else if (d.arch >= 90) {
    const int most = d.arch < 120 ? tuning::kMostParts : tuning::kMostPortableParts;
    while (emits && parts < most && ceil_div(vectors, parts) * planes * 16 > tuning::kSharedPart) parts *= 2;
    while (parts < tuning::kMostPortableParts && rows * parts * 2 <= d.sms &&
           ceil_div(vectors, parts * 2) >= tuning::kLeastPartVectors)
      parts *= 2;
  }
  const int64_t share = ceil_div(vectors, parts);
  const bool fits = reduces && emits && state_bytes + share * planes * 16 <= d.shared_per_block;
  const int threads =
      (int)tuning::power_of_two(share / tuning::kVectorsPerThread, tuning::kLeastThreads, tuning::kMostThreads);
  return {threads, parts, fits ? share : 0};
}

// `main` is the layout that decides who reads what, `data` what lies there.
template <class P>
void run_rows(const P& p, const void* data, const RowLayout& main, cudaStream_t stream) {
  using T = typename P::Element;
  using State = typename P::State;
  if (p.rows == 0) return;
  const int64_t vectors = most_vectors<T>(data, main, p.classes);
  const auto grid = [](int64_t blocks) {
    if (blocks > INT32_MAX) throw std::runtime_error("regfast: more rows than a CUDA grid has blocks");
    return dim3((unsigned)blocks);
  };
  if (p.classes > 1 && rows_are_adjacent(main)) {
    const int y = (int)tuning::power_of_two(vectors, 1, tuning::kColumnsThreads / kWarp);
    const int x = std::max(kWarp, tuning::kColumnsBlock / y);
    launch(columns_kernel<P>, grid(ceil_div(p.rows, x)), dim3(x, y), (int64_t)sizeof(State) * x * y, stream, p);
    return;
  }
  if (vectors <= kWarp * tuning::kVectorsPerLane) {
    const int lanes = (int)tuning::power_of_two(2 * vectors - 1, 1, kWarp);  // the next one up from vectors
    launch(lanes_kernel<P>, grid(ceil_div(p.rows, tuning::kLanesThreads / lanes)), dim3(tuning::kLanesThreads), 0,
           stream, p, lanes);
    return;
  }
  const BlockPlan plan = plan_block(p.rows, vectors, p.planes, p.reduces, p.emits, kStateBytes<State>);
  launch_cluster(block_kernel<P>, p.reduces ? plan.parts : 1, grid(p.rows * plan.parts), dim3(plan.threads),
                 kStateBytes<State> + plan.resident * p.planes * 16, stream, p, plan.parts, plan.resident);
}

}  // namespace rf::cuda
