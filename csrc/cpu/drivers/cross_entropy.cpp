// Threads over blocks of rows of cross-entropy. Blocks depend on the shape alone and their sums are added in order.
#include <initializer_list>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

bool needs_tiles(const CrossEntropyArgs& a) {
  return a.layout.class_stride != 1 || (a.probabilities && a.probability_layout.class_stride != 1);
}

// Runs body(args, block, begin, end) over blocks of rows, with scratch where classes are not adjacent.
template <class F>
void for_row_blocks(const CrossEntropyArgs& args, bool tiles, int64_t rows, F&& body) {
  const int64_t block = tuning::rows_per_sum(args.classes), blocks = ceil_div(rows, block);
  const int64_t grain = tuning::kParallelElements / (block * (args.classes + tuning::kRowElements)) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    CrossEntropyArgs mine = args;
    if (tiles) mine.scratch = scratch(Slot::tile, tuning::tile_scratch_bytes(args.classes));
    for (int64_t b = first; b < last; ++b) body(mine, b, b * block, b + 1 == blocks ? rows : (b + 1) * block);
  });
}

// The sums that body(args, begin, end) returns for each block, in order.
template <class F>
CrossEntropyPartial sum_over_blocks(const CrossEntropyArgs& args, bool tiles, int64_t rows, F&& body) {
  std::vector<CrossEntropyPartial> partial(ceil_div(rows, tuning::rows_per_sum(args.classes)));
  for_row_blocks(args, tiles, rows, [&](const CrossEntropyArgs& a, int64_t b, int64_t begin, int64_t end) {
    partial[b] = body(a, begin, end);
  });
  CompensatedSum loss, weight;
  int64_t bad_row = -1;
  for (const CrossEntropyPartial& p : partial) {
    loss.add(p.loss);
    weight.add(p.weight);
    if (bad_row < 0) bad_row = p.bad_row;
  }
  return {loss.value(), weight.value(), bad_row};
}

// Whether rows go through tiles, and if so their layouts as those want them.
bool prepare_tiles(CrossEntropyArgs& args, CrossEntropyGrads& grads, int64_t rows) {
  const bool tiles = needs_tiles(args) || (grads.grad_logits && grads.grad_layout.class_stride != 1) ||
                     (grads.grad_probabilities && grads.grad_probability_layout.class_stride != 1);
  if (tiles)
    for (RowLayout* l : {&args.layout, &args.probability_layout, &grads.grad_layout, &grads.grad_probability_layout})
      *l = as_inner_rows(*l, rows);
  return tiles;
}

// The rows that count in a mean, each by the weight of its class: those out of range, which are an error, by none.
template <class A>
double weights_of(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  const int64_t *target = a.target, ignored = a.ignore_index;
  const uint64_t classes = (uint64_t)a.classes;
  const A* const weight = (const A*)a.class_weight;
  if (!weight) {
    int64_t counted = 0;
    for (int64_t r = begin; r < end; ++r) counted += target[r] != ignored;
    return (double)counted;
  }
  CompensatedSum sum;
  for (int64_t r = begin; r < end; ++r)
    if (target[r] != ignored && (uint64_t)target[r] < classes) sum.add((double)weight[target[r]]);
  return sum.value();
}

}  // namespace

CrossEntropyPartial cross_entropy_forward(DType dtype, CrossEntropyArgs args, const CrossEntropyOutputs& out,
                                          int64_t rows) {
  const auto kernel = kernels().cross_entropy_forward[(int)dtype];
  CrossEntropyGrads none = {};
  const bool tiles = prepare_tiles(args, none, rows);
  return sum_over_blocks(args, tiles, rows, [&](const CrossEntropyArgs& a, int64_t begin, int64_t end) {
    return kernel(a, out, begin, end);
  });
}

double cross_entropy_denominator(DType dtype, const CrossEntropyArgs& args, int64_t rows) {
  if (!args.target) return (double)rows;
  std::vector<double> blocks(ceil_div(rows, tuning::kSumElements));
  parallel_for((int64_t)blocks.size(), 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * tuning::kSumElements, end = std::min(rows, begin + tuning::kSumElements);
      blocks[b] = dtype == DType::f64 ? weights_of<double>(args, begin, end) : weights_of<float>(args, begin, end);
    }
  });
  CompensatedSum sum;
  for (const double s : blocks) sum.add(s);
  return sum.value();
}

int64_t cross_entropy_backward(DType dtype, CrossEntropyArgs args, CrossEntropyGrads grads, int64_t rows) {
  const auto kernel = kernels().cross_entropy_backward[(int)dtype];
  const bool tiles = prepare_tiles(args, grads, rows);
  return sum_over_blocks(args, tiles, rows,
                         [&](const CrossEntropyArgs& a, int64_t begin, int64_t end) {
                           return CrossEntropyPartial{0, 0, kernel(a, grads, begin, end)};
                         })
      .bad_row;
}

CrossEntropyPartial cross_entropy_forward_backward(DType dtype, CrossEntropyArgs args, const CrossEntropyOutputs& out,
                                                   CrossEntropyGrads grads, int64_t rows) {
  const auto kernel = kernels().cross_entropy_forward_backward[(int)dtype];
  const bool tiles = prepare_tiles(args, grads, rows);
  const int64_t block = tuning::rows_per_sum(args.classes), size = acc_size(dtype);
  const int64_t exponentials = std::min(block, rows) * tuning::exponentials_of_row(args.classes) * size;
  // The statistics of a row are written and read by one thread, and so are its exponentials, as far as L2 has room.
  const bool keep = grads.grad_logits && args.classes > tuning::kFewColumns && exponentials <= caches().l2 / 2;
  return sum_over_blocks(args, tiles, rows, [&](const CrossEntropyArgs& given, int64_t begin, int64_t end) {
    CrossEntropyArgs a = given;
    if (keep) a.exponentials = scratch(Slot::exponentials, exponentials);
    return kernel(a, out, grads, begin, end);
  });
}

}  // namespace rf
