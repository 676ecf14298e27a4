// Sums of columns, of which each thread or block of rows has a part: added in order, in double precision.
#include <algorithm>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {

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

}  // namespace rf
