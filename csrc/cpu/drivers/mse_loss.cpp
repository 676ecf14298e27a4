// Threads over elements of squared error, whose sum is taken block by block. Blocks of an operand whose elements are
// not adjacent in the order of the results are copied together first, and read from cache; long runs are read where
// they lie if nothing is added up, so that a sum has the same bits in any layout.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

// Runs of `size` adjacent numbers, `step` apart.
template <class Bits, int size>
void copy_short_runs(const Bits* from, int64_t step, int64_t runs, Bits* to) {
  for (int64_t r = 0; r < runs; ++r) std::memcpy(to + r * size, from + r * step, size * sizeof(Bits));
}
template <class Bits, int... i>
void copy_runs(const Bits* from, int64_t step, int64_t size, int64_t runs, Bits* to, std::integer_sequence<int, i...>) {
  // A size that the compiler knows is a few moves instead of a call.
  constexpr void (*const of_size[])(const Bits*, int64_t, int64_t, Bits*) = {copy_short_runs<Bits, i + 1>...};
  if (size <= (int64_t)sizeof...(i)) return of_size[size - 1](from, step, runs, to);
  for (int64_t r = 0; r < runs; ++r) std::memcpy(to + r * size, from + r * step, size * sizeof(Bits));
}
template <class Bits>
void copy_steps(const Bits* from, int64_t step, int64_t n, Bits* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}
template <int64_t step, class Bits>
void copy_steps(const Bits* from, int64_t n, Bits* to) {
  copy_steps(from, step, n, to);
}
template <class Bits>
void copy_runs(const Bits* from, int64_t step, Run run, int64_t runs, Bits* to) {
  if (run.stride == 1)
    return copy_runs(from, step, run.size, runs, to, std::make_integer_sequence<int, tuning::kShortRun>());
  // A step that the compiler knows is a shuffle of vectors.
  static_assert(tuning::kGatherStep == 4, "each step is a case below");
  for (int64_t r = 0; r < runs; ++r, from += step, to += run.size)
    run.stride == 2   ? copy_steps<2>(from, run.size, to)
    : run.stride == 3 ? copy_steps<3>(from, run.size, to)
    : run.stride == 4 ? copy_steps<4>(from, run.size, to)
                      : copy_steps(from, run.stride, run.size, to);
}

template <class Bits>
void gather(const Elements& e, int64_t begin, int64_t count, Bits* to) {
  // Where `begin` lies in each run, from the innermost one out.
  const int64_t depth = (int64_t)e.runs.size(), last = depth - 1;
  std::vector<int64_t> at(depth);
  for (int64_t d = last, rest = begin; d >= 0; rest /= e.runs[d--].size) at[d] = rest % e.runs[d].size;
  const Run inner = e.runs[last], outer = depth > 1 ? e.runs[last - 1] : Run{1, 0};
  while (count > 0) {
    const Bits* from = (const Bits*)e.data;
    for (int64_t d = 0; d < depth; ++d) from += at[d] * e.runs[d].stride;
    // Whole runs as far as they are alike; else a part of one.
    const int64_t left = depth > 1 ? outer.size - at[last - 1] : 1;
    const int64_t runs = at[last] == 0 && count >= inner.size ? std::min(left, count / inner.size) : 1;
    const int64_t n = runs > 1 ? inner.size : std::min(count, inner.size - at[last]);
    copy_runs(from, outer.stride, {n, inner.stride}, runs, to);
    to += runs * n;
    count -= runs * n;
    at[last] = 0;
    if (depth > 1) at[last - 1] += runs - 1;
    for (int64_t d = last - 1; d >= 0 && ++at[d] == e.runs[d].size; --d) at[d] = 0;
  }
}

// Where elements are read: copied together, or where they lie, of no more than a run.
enum class Long { copied, in_place };

bool in_long_runs(const Elements& e) { return e.runs.back().stride == 1 && e.runs.back().size >= tuning::kLongRun; }
int64_t left_in_run(const Elements& e, int64_t begin) {
  if (e.runs.empty() || !in_long_runs(e)) return INT64_MAX;
  return e.runs.back().size - begin % e.runs.back().size;
}
int64_t offset_of(const Elements& e, int64_t at) {
  int64_t offset = 0;
  for (auto run = e.runs.rbegin(); run != e.runs.rend(); at /= (run++)->size) offset += at % run->size * run->stride;
  return offset;
}

// Elements from `begin` on, adjacent.
const void* adjacent(DType dtype, const Elements& e, int64_t begin, int64_t count, Slot slot, Long runs) {
  const int64_t size = size_of(dtype);
  if (e.runs.empty()) return (const char*)e.data + begin * size;
  if (runs == Long::in_place && in_long_runs(e)) return (const char*)e.data + offset_of(e, begin) * size;
  void* const to = scratch(slot, count * size);
  size == 8   ? gather(e, begin, count, (uint64_t*)to)
  : size == 4 ? gather(e, begin, count, (uint32_t*)to)
              : gather(e, begin, count, (uint16_t*)to);
  return to;
}
const void* x_block(DType dtype, const Elements& x, int64_t begin, int64_t count, Long runs) {
  return adjacent(dtype, x, begin, count, Slot::tile, runs);
}
const void* y_block(DType dtype, const Elements& y, int64_t begin, int64_t count, Long runs) {
  return adjacent(dtype, y, begin, count, Slot::tiles, runs);
}

}  // namespace

double mse_loss(DType dtype, const Elements& x, const Elements& y, void* each, int64_t n) {
  const auto kernel = kernels().mse_loss[(int)dtype];
  // Blocks by the shape alone, so that the sum has the same bits with any number of threads; and pieces of as many
  // elements however they lie, unless each loss is all that is wanted.
  const int64_t block = tuning::kSumElements, blocks = ceil_div(n, block), size = size_of(dtype);
  const Long runs = each ? Long::in_place : Long::copied;
  std::vector<double> partial(blocks);
  parallel_for(blocks, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = std::min(n, (b + 1) * block);
      partial[b] = 0;
      for (int64_t at = b * block, count; at < end; at += count) {
        count = std::min(tuning::kGatherPiece, end - at);
        if (each) count = std::min({count, left_in_run(x, at), left_in_run(y, at)});
        char* to = each ? (char*)each + at * size : nullptr;
        partial[b] += kernel(x_block(dtype, x, at, count, runs), y_block(dtype, y, at, count, runs), to, count);
      }
    }
  });
  CompensatedSum sum;
  for (double p : partial) sum.add(p);
  return sum.value();
}

void mse_loss_backward(DType dtype, const Elements& x, const Elements& y, const Elements& grad, bool each_grad,
                       double scale, void* dx, void* dy, int64_t n) {
  const auto kernel = kernels().mse_loss_backward[(int)dtype];
  const int64_t size = size_of(dtype), block = tuning::kSumElements;
  constexpr Long runs = Long::in_place;
  parallel_for(ceil_div(n, block), 2, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(n, last * block);
    for (int64_t from = first * block, count; from < end; from += count) {
      count = std::min({tuning::kGatherPiece, end - from, left_in_run(x, from), left_in_run(y, from)});
      if (each_grad) count = std::min(count, left_in_run(grad, from));
      const int64_t at = from * size;
      kernel(x_block(dtype, x, from, count, runs), y_block(dtype, y, from, count, runs),
             each_grad ? adjacent(dtype, grad, from, count, Slot::partial, runs) : grad.data, each_grad, scale,
             dx ? (char*)dx + at : nullptr, dy ? (char*)dy + at : nullptr, count);
    }
  });
}

}  // namespace rf
