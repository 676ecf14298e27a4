// Threads over the rows that phm_linear mixes, and its product where few rows make packing too dear.
#include <algorithm>

#include "cpu/drivers/drivers.h"
#include "cpu/drivers/gemm_packed.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

void combine(void (*kernel)(const CombinePartsProblem&, int64_t, int64_t), const CombinePartsProblem& args,
             int64_t rows) {
  const int64_t work = std::max<int64_t>(1, args.to_parts * args.length);
  parallel_for(rows, tuning::kParallelElements / work + 1,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void mix_parts(DType dtype, const CombinePartsProblem& args, int64_t rows) {
  combine(kernels().mix_parts[(int)dtype], args, rows);
}
void unmix_parts(DType dtype, const CombinePartsProblem& args, int64_t rows) {
  combine(kernels().unmix_parts[(int)dtype], args, rows);
}

void add_part_products(DType dtype, PartProductsProblem args, int64_t rows, double* sums) {
  const int64_t acc = acc_size(dtype), size = args.of_parts * args.parts, block = tuning::kColumnSumRows;
  const int64_t blocks = ceil_div(rows, block);
  // Sums of each block, added in order.
  char* partial = (char*)scratch(Slot::partial, blocks * size * acc);
  const int64_t work = std::max<int64_t>(1, block * args.of_parts * args.length);
  parallel_for(blocks, tuning::kParallelElements / work + 1, [&](int64_t first, int64_t last) {
    PartProductsProblem mine = args;
    for (int64_t b = first; b < last; ++b) {
      mine.sums = partial + b * size * acc;
      kernels().part_products[(int)dtype](mine, b * block, std::min(rows, (b + 1) * block));
    }
  });
  std::vector<CompensatedSum> totals(size);
  for (int64_t b = 0; b < blocks; ++b) add_to_totals(acc_dtype(dtype), partial + b * size * acc, size, totals.data());
  for (int64_t i = 0; i < size; ++i) sums[i] += totals[i].value();
}

void phm_product(DType dtype, const GemmProblem& g, int64_t n) {
  // Dot products with S where it lies: up to how many rows, and against what, kFewMixedRows tells.
  const bool in_place = acc_dtype(dtype) == dtype && g.b.col_stride == 1;
  if (!in_place || g.m > tuning::kFewMixedRows || n > tuning::kSkinny) return gemm(dtype, g);
  const int64_t group = tuning::kSkinny / n * n, size = size_of(dtype);
  const int64_t grain = tuning::kParallelElements / std::max<int64_t>(1, g.m * g.k / 8) + 1;
  parallel_for(g.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < g.m; row += group) {
      DotArgs d = {.many = g.b,
                   .few = g.a,
                   .begin = begin,
                   .end = end,
                   .few_rows = std::min(group, g.m - row),
                   .k = g.k,
                   .many_are_columns = true,
                   .many_are_far = short_and_far(g.k * size, g.n),
                   .epilogue = epilogue_of(g)};
      d.few.data = (const char*)g.a.data + g.a.row_offset(row) * size;
      d.epilogue.c = (char*)g.c + row * g.c_stride * size;
      if (g.preactivation) d.epilogue.preactivation = (char*)g.preactivation + row * g.c_stride * size;
      kernels().gemm_dot[(int)dtype](d);
    }
  });
}

}  // namespace rf
