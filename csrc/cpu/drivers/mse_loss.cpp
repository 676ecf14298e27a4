// Threads over elements of squared error, whose sum is taken block by block. Blocks of an operand whose elements are
// not adjacent in the order of the results are copied together first, and read from cache.
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
void copy_runs(const Bits* from, int64_t step, Run run, int64_t runs, Bits* to) {
  if (run.stride == 1)
    return copy_runs(from, step, run.size, runs, to, std::make_integer_sequence<int, tuning::kShortRun>());
  for (int64_t r = 0; r < runs; ++r, from += step, to += run.size)
    if (run.stride == 2)  // a step that the compiler knows is a shuffle of vectors
      for (int64_t i = 0; i < run.size; ++i) to[i] = from[i * 2];
    else
      for (int64_t i = 0; i < run.size; ++i) to[i] = from[i * run.stride];
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

// Elements from `begin` on, adjacent.
const void* adjacent(DType dtype, const Elements& e, int64_t begin, int64_t count, Slot slot) {
  const int64_t size = size_of(dtype);
  if (e.runs.empty()) return (const char*)e.data + begin * size;
  void* const to = scratch(slot, count * size);
  size == 8   ? gather(e, begin, count, (uint64_t*)to)
  : size == 4 ? gather(e, begin, count, (uint32_t*)to)
              : gather(e, begin, count, (uint16_t*)to);
  return to;
}
const void* x_block(DType dtype, const Elements& x, int64_t begin, int64_t count) {
  return adjacent(dtype, x, begin, count, Slot::tile);
}
const void* y_block(DType dtype, const Elements& y, int64_t begin, int64_t count) {
  return adjacent(dtype, y, begin, count, Slot::tiles);
}

}  // namespace

double mse_loss(DType dtype, const Elements& x, const Elements& y, void* each, int64_t n) {
  const auto kernel = kernels().mse_loss[(int)dtype];
  // Blocks by the shape alone, so that the sum has the same bits with any number of threads.
  const int64_t block = tuning::kSumElements, blocks = ceil_div(n, block), size = size_of(dtype);
  constexpr int64_t piece = tuning::kGatherPiece;  // of elements that are adjacent too: the sums have the same bits
  std::vector<double> partial(blocks);
  parallel_for(blocks, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t from = b * block, count = b + 1 == blocks ? n - from : block;
      partial[b] = 0;
      for (int64_t at = 0; at < count; at += piece) {
        const int64_t begin = from + at, some = std::min(piece, count - at);
        char* to = each ? (char*)each + begin * size : nullptr;
        partial[b] += kernel(x_block(dtype, x, begin, some), y_block(dtype, y, begin, some), to, some);
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
  constexpr int64_t piece = tuning::kGatherPiece;
  parallel_for(ceil_div(n, block), 2, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(n, last * block);
    for (int64_t from = first * block; from < end; from += piece) {
      const int64_t count = std::min(piece, end - from), at = from * size;
      kernel(x_block(dtype, x, from, count), y_block(dtype, y, from, count),
             each_grad ? adjacent(dtype, grad, from, count, Slot::partial) : grad.data, each_grad, scale,
             dx ? (char*)dx + at : nullptr, dy ? (char*)dy + at : nullptr, count);
    }
  });
}

}  // namespace rf
