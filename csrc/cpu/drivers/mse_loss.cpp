// Threads over elements of squared error, whose sum is taken block by block.
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {

double mse_loss(DType dtype, const void* x, const void* y, void* each, int64_t n) {
  const auto kernel = kernels().mse_loss[(int)dtype];
  // Blocks by the shape alone, so that the sum has the same bits with any number of threads.
  const int64_t block = tuning::kSumElements, blocks = ceil_div(n, block), size = size_of(dtype);
  std::vector<double> partial(blocks);
  parallel_for(blocks, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t from = b * block, count = b + 1 == blocks ? n - from : block;
      char* to = each ? (char*)each + from * size : nullptr;
      partial[b] = kernel((const char*)x + from * size, (const char*)y + from * size, to, count);
    }
  });
  CompensatedSum sum;
  for (double p : partial) sum.add(p);
  return sum.value();
}

void mse_loss_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad, double scale,
                       void* dx, void* dy, int64_t n) {
  const auto kernel = kernels().mse_loss_backward[(int)dtype];
  const int64_t size = size_of(dtype);
  parallel_for(n, 2 * tuning::kSumElements, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    kernel((const char*)x + at, (const char*)y + at, (const char*)grad + (each_grad ? at : 0), each_grad, scale,
           dx ? (char*)dx + at : nullptr, dy ? (char*)dy + at : nullptr, end - begin);
  });
}

}  // namespace rf
