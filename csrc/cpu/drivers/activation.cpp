// Threads over rows of an activation's derivative and over elements of squared error.
#include <algorithm>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rf {

void activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation) {
  const auto kernel = kernels().activation_forward[(int)dtype];
  const int64_t size = size_of(dtype);
  parallel_for(n, tuning::kParallelElements, [&](int64_t begin, int64_t end) {
    kernel((const char*)z + begin * size, (char*)y + begin * size, end - begin, activation);
  });
}

namespace {
template <class A>
void add_columns(const A* partial, int64_t parts, int64_t stride, int64_t begin, int64_t end, A* sums) {
  for (int64_t j = begin; j < end; ++j) {
    CompensatedSum sum;
    for (int64_t p = 0; p < parts; ++p) sum.add((double)partial[p * stride + j]);
    sums[j] = (A)sum.value();
  }
}
}  // namespace

void add_parts(DType acc, const void* partial, int64_t parts, int64_t stride, int64_t columns, void* sums) {
  if (!sums) return;
  parallel_for(columns, tuning::kParallelElements / std::max<int64_t>(1, parts) + 1, [&](int64_t begin, int64_t end) {
    if (acc == DType::f64)
      add_columns((const double*)partial, parts, stride, begin, end, (double*)sums);
    else
      add_columns((const float*)partial, parts, stride, begin, end, (float*)sums);
  });
}

void add_to_totals(DType acc, const void* part, int64_t columns, CompensatedSum* totals) {
  parallel_for(columns, tuning::kParallelElements, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      totals[j].add(acc == DType::f64 ? ((const double*)part)[j] : (double)((const float*)part)[j]);
  });
}

void round_totals(DType acc, const CompensatedSum* totals, int64_t columns, void* sums) {
  for (int64_t j = 0; j < columns; ++j)
    if (acc == DType::f64)
      ((double*)sums)[j] = totals[j].value();
    else
      ((float*)sums)[j] = (float)totals[j].value();
}

void activation_backward(DType dtype, ActivationBackwardArgs args, int64_t rows) {
  const auto kernel = kernels().activation_backward[(int)dtype];
  const int64_t acc = acc_size(dtype), columns = args.columns;
  const int64_t block = tuning::kColumnSumRows, blocks = ceil_div(rows, block);
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

double squared_error(DType dtype, const void* x, const void* y, void* each, int64_t n) {
  const auto kernel = kernels().squared_error[(int)dtype];
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

void squared_error_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad, double scale,
                            void* dx, void* dy, int64_t n) {
  const auto kernel = kernels().squared_error_backward[(int)dtype];
  const int64_t size = size_of(dtype);
  parallel_for(n, 2 * tuning::kSumElements, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    kernel((const char*)x + at, (const char*)y + at, (const char*)grad + (each_grad ? at : 0), each_grad, scale,
           dx ? (char*)dx + at : nullptr, dy ? (char*)dy + at : nullptr, end - begin);
  });
}

void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < tuning::kHugePageBytes) return;
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = ((uintptr_t)p + page - 1) / page * page, end = ((uintptr_t)p + bytes) / page * page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace rf
