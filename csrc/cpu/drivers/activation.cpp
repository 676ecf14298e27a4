// Threads over elements of an activation, and over rows of its derivative, whose columns are summed on the way.
#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {

void activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation) {
  const auto kernel = kernels().activation_forward[(int)dtype];
  const int64_t size = size_of(dtype);
  parallel_for(n, tuning::kParallelElements, [&](int64_t begin, int64_t end) {
    kernel((const char*)z + begin * size, (char*)y + begin * size, end - begin, activation);
  });
}

void activation_backward(DType dtype, ActivationBackwardArgs args, int64_t rows) {
  const auto kernel = kernels().activation_backward[(int)dtype];
  const int64_t acc = acc_size(dtype), columns = args.columns;
  // By the shape alone. Of few columns a row has a lane: more rows to a block, as gemm_lane_sums has them.
  const int64_t block = columns <= tuning::kFewColumns ? tuning::kLaneSumRows : tuning::kColumnSumRows,
                blocks = ceil_div(rows, block);
  const int64_t grain = tuning::kParallelElements / (block * (columns > 0 ? columns : 1)) + 1;
  // Column sums of each block, added in order.
  char* partial = args.column_sums ? (char*)scratch(Slot::partial, blocks * columns * acc) : nullptr;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    ActivationBackwardArgs mine = args;
    for (int64_t b = first; b < last; ++b) {
      if (partial) mine.column_sums = partial + b * columns * acc;
      kernel(mine, b * block, b + 1 == blocks ? rows : (b + 1) * block);
    }
  });
  add_parts(acc_dtype(dtype), partial, blocks, columns, columns, args.column_sums);
}

}  // namespace rf
