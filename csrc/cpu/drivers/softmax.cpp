// Threads over the rows of the softmax family.
#include <initializer_list>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {

void softmax(SoftmaxOp op, DType dtype, SoftmaxArgs args, int64_t rows) {
  args.rows = rows;
  const Kernels& k = kernels();
  const auto* entry = op == SoftmaxOp::forward             ? k.softmax_forward
                      : op == SoftmaxOp::backward          ? k.softmax_backward
                      : op == SoftmaxOp::logsumexp_forward ? k.logsumexp_forward
                                                           : k.logsumexp_backward;
  const auto kernel = entry[(int)dtype];
  const bool tiles = args.in.class_stride != 1 || args.out.class_stride != 1 || args.grad_in.class_stride != 1;
  // Tiles are transposed from rows that are neighbours in memory (as_inner_rows), kTileRows of them at a time.
  if (tiles)
    for (RowLayout* l : {&args.in, &args.grad_in, &args.out}) *l = as_inner_rows(*l, rows);
  // Of rows of a half type whose exponentials stay in L2, those of one at a time.
  const bool keep = op == SoftmaxOp::forward && size_of(dtype) < acc_size(dtype) &&
                    args.classes * acc_size(dtype) <= tuning::kCachedRowBytes;
  const int64_t grain = tuning::kParallelElements / (args.classes + tuning::kRowElements) + 1;
  parallel_for(rows, tiles && grain < tuning::kTileRows ? tuning::kTileRows : grain, [&](int64_t begin, int64_t end) {
    SoftmaxArgs mine = args;
    if (tiles)
      mine.scratch = scratch(Slot::tile, tuning::tile_scratch_bytes(args.classes));
    else if (keep)
      mine.scratch = scratch(Slot::tile, args.classes * acc_size(dtype));
    kernel(mine, begin, end);
  });
}

}  // namespace rf
