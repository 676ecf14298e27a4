// Products of a gradient's large entries: lists of them by rows and by columns, and the threads.
#include <cstring>

#include "cpu/drivers/drivers.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

int64_t rows_at_a_time(int64_t work_per_row) {
  return tuning::kParallelElements / std::max<int64_t>(1, work_per_row) + 1;
}

}  // namespace

bool list_large_entries(DType dtype, const void* matrix, int64_t rows, int64_t columns, const double* bounds,
                        int64_t most, SparseMatrix* to) {
  const int64_t acc = acc_size(dtype);
  const auto row = [&](int64_t r) { return (const char*)matrix + r * columns * acc; };
  to->row_begin.resize(rows + 1);
  to->row_begin[0] = 0;
  parallel_for(rows, rows_at_a_time(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      to->row_begin[r + 1] = kernels().count_entries[(int)dtype](row(r), columns, bounds[r]);
  });
  for (int64_t r = 0; r < rows; ++r) to->row_begin[r + 1] += to->row_begin[r];
  const int64_t entries = to->row_begin[rows];
  if (entries > most) return false;
  to->columns.resize(entries);
  to->values.resize(entries * acc);
  parallel_for(rows, rows_at_a_time(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels().list_entries[(int)dtype](row(r), columns, bounds[r], to->columns.data() + to->row_begin[r],
                                         to->values.data() + to->row_begin[r] * acc);
  });
  return true;
}

SparseMatrix transposed(DType dtype, const SparseMatrix& m, int64_t columns) {
  const int64_t rows = (int64_t)m.row_begin.size() - 1, acc = acc_size(dtype);
  SparseMatrix t;
  t.row_begin.assign(columns + 1, 0);
  for (const int32_t c : m.columns) ++t.row_begin[c + 1];
  for (int64_t c = 0; c < columns; ++c) t.row_begin[c + 1] += t.row_begin[c];
  t.columns.resize(m.columns.size());
  t.values.resize(m.values.size());
  std::vector<int64_t> next(t.row_begin.begin(), t.row_begin.end() - 1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = m.row_begin[r]; e < m.row_begin[r + 1]; ++e) {
      const int64_t at = next[m.columns[e]]++;
      t.columns[at] = (int32_t)r;
      std::memcpy(t.values.data() + at * acc, m.values.data() + e * acc, (size_t)acc);
    }
  return t;
}

void sparse_product(DType dtype, const SparseMatrix& a, const MatrixView& b, int64_t columns, void* c, int64_t c_stride,
                    bool add) {
  const int64_t rows = (int64_t)a.row_begin.size() - 1, acc = acc_size(dtype);
  const int64_t work = a.row_begin[rows] * columns / std::max<int64_t>(1, rows) + columns / 8;
  parallel_for(rows, rows_at_a_time(work), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = a.row_begin[r], entries = a.row_begin[r + 1] - first;
      if (entries == 0 && add) continue;
      kernels().sparse_row_product[(int)dtype]({a.columns.data() + first, a.values.data() + first * acc, entries,
                                                b.data, b.outer_stride, columns, (char*)c + r * c_stride * acc, add});
    }
  });
}

}  // namespace rf
