// What the machine is to the kernels and their drivers: threads, memory, caches. No torch.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "shared/types.h"

namespace rf {

// ---- threads -------------------------------------------------------------------------------------------------------

// Runs fn(ctx, begin, end) over a partition of [0, n) into ranges of at least `grain`, on as many threads as there are.
// Defined by ops/threads.cpp on torch's own pool, and by the kernel tests without torch.
void run_parallel(int64_t n, int64_t grain, void (*fn)(int64_t begin, int64_t end, void* ctx), void* ctx);
int64_t thread_count();

template <class F>
inline void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (n <= grain) return f(int64_t(0), n);
  using Fn = std::remove_reference_t<F>;
  run_parallel(
      n, grain < 1 ? 1 : grain, [](int64_t begin, int64_t end, void* ctx) { (*(Fn*)ctx)(begin, end); }, (void*)&f);
}

// Tasks are taken as threads come free, since on a busy machine one of them may be held up; what a task computes does
// not depend on who takes it.
template <class F>
void take_tasks(int64_t tasks, int64_t threads, F&& run) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(tasks, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
  });
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part i of n of `count` things that come in steps.
inline Range part_of(int64_t count, int64_t step, int64_t i, int64_t n) {
  const int64_t steps = ceil_div(count, step);
  return {std::min(count, steps * i / n * step), std::min(count, steps * (i + 1) / n * step)};
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Memory of one thread that is reused: what it held is lost when another size is asked for. Each Slot has its own, so
// that a caller may hold one while what it calls takes another.
enum class Slot { packed_a, packed_b, partial, splits, tiles, tile, exponentials };
constexpr int kSlots = 7;
// Defined by scratch.cpp, and by the kernel tests with an unreadable page behind every request.
void* scratch(Slot slot, int64_t bytes);

// Memory of large results, on huge pages, kept for the next ones when it is given back. No thread owns it; it may be
// given back in another process than it was taken in, after a fork.
void* take_large_buffer(int64_t bytes);  // null where the system gives none, or nothing may be kept
void give_back_large_buffer(void* p);
void release_large_buffers();             // to the system, all that is kept
void limit_large_buffers(int64_t bytes);  // what may be kept; 0: no buffers any more

struct LargeBuffers {
  int64_t used_bytes, kept_bytes, limit;
  int64_t reused, mapped;  // buffers taken so far, of what was kept and from the system
};
LargeBuffers large_buffers();

// ---- the CPU -------------------------------------------------------------------------------------------------------

// Bytes; of L2 what one core has.
struct Caches {
  int64_t l2, last;
};
const Caches& caches();

// Whether the library under ATen's GEMM was measured to be faster than ours on CPUs like this one; `pairs`: ours
// multiplies pairs of bf16 by AVX512-BF16.
bool library_gemm_wins(DType dtype, bool pairs);

}  // namespace rf
