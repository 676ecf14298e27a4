// Threads over blocks of rows of cross-entropy. Blocks depend on the shape alone and their sums are added in order.
#include <initializer_list>
#include <vector>

#include "drivers.h"
#include "parallel.h"
#include "tuning.h"

namespace rf {
namespace {

bool needs_tiles(const CrossEntropyArgs& a) {
  return a.layout.class_stride != 1 || (a.probabilities && a.probability_layout.class_stride != 1);
}

// Runs body(args, block, begin, end) over blocks of rows, with scratch where classes are not adjacent.
template <class F>
void for_row_blocks(const CrossEntropyArgs& args, bool tiles, int64_t rows, F&& body) {
  const int64_t block = tuning::rows_per_sum(args.classes), blocks = (rows + block - 1) / block;
  const int64_t grain = tuning::kParallelElements / (block * (args.classes > 0 ? args.classes : 1)) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    CrossEntropyArgs mine = args;
    if (tiles) mine.scratch = scratch(Slot::tile, tuning::tile_scratch_bytes(args.classes));
    for (int64_t b = first; b < last; ++b) body(mine, b, b * block, b + 1 == blocks ? rows : (b + 1) * block);
  });
}

}  // namespace

CrossEntropyPartial cross_entropy_forward(DType dtype, CrossEntropyArgs args, const CrossEntropyOutputs& out,
                                          int64_t rows) {
  const auto kernel = kernels().cross_entropy_forward[(int)dtype];
  const int64_t block = tuning::rows_per_sum(args.classes);
  const bool tiles = needs_tiles(args);
  if (tiles)
    for (RowLayout* l : {&args.layout, &args.probability_layout}) *l = as_inner_rows(*l, rows);
  std::vector<CrossEntropyPartial> partial((rows + block - 1) / block);
  for_row_blocks(args, tiles, rows, [&](const CrossEntropyArgs& a, int64_t b, int64_t begin, int64_t end) {
    partial[b] = kernel(a, out, begin, end);
  });
  CrossEntropyPartial total = {0, 0, -1};
  for (const CrossEntropyPartial& p : partial) {
    total.loss += p.loss;
    total.weight += p.weight;
    if (total.bad_row < 0) total.bad_row = p.bad_row;
  }
  return total;
}

void cross_entropy_backward(DType dtype, CrossEntropyArgs args, CrossEntropyGrads grads, int64_t rows) {
  const auto kernel = kernels().cross_entropy_backward[(int)dtype];
  const bool tiles = needs_tiles(args) || (grads.grad_logits && grads.grad_layout.class_stride != 1) ||
                     (grads.grad_probabilities && grads.grad_probability_layout.class_stride != 1);
  if (tiles)
    for (RowLayout* l : {&args.layout, &args.probability_layout, &grads.grad_layout, &grads.grad_probability_layout})
      *l = as_inner_rows(*l, rows);
  for_row_blocks(args, tiles, rows,
                 [&](const CrossEntropyArgs& a, int64_t, int64_t begin, int64_t end) { kernel(a, grads, begin, end); });
}

}  // namespace rf
