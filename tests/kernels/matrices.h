// Operands of products in every arrangement that tensors come in, their memory guarded.
#pragma once
#include "memory.h"
#include "shared/types.h"

namespace test {

enum class Operand { contiguous, padded, column_major, strided, collapsed, collapsed_columns, expanded };
constexpr const char* kOperandNames[] = {"contiguous",        "padded",  "column_major", "strided", "collapsed",
                                         "collapsed_columns", "expanded"};

inline rf::MatrixView arrange(Operand o, int64_t rows, int64_t columns) {
  switch (o) {
    case Operand::contiguous:
      return {nullptr, 1, columns, 0, 1};
    case Operand::padded:
      return {nullptr, 1, columns + 5, 0, 1};
    case Operand::column_major:
      return {nullptr, 1, 1, 0, rows + 2};
    case Operand::strided:
      return {nullptr, 1, 3 * columns + 1, 0, 3};
    case Operand::collapsed:
      return {nullptr, 4, 4 * columns + 7, columns + 1, 1};
    case Operand::collapsed_columns:
      return {nullptr, 4, 4 * columns, 1, 4};  // (B, K, 4) seen as (B, 4, K)
    case Operand::expanded:
      return {nullptr, 1, 0, 0, 1};
  }
  return {};
}

template <class T>
struct Matrix {
  int64_t rows, columns;
  rf::MatrixView view;
  Buffer<T> memory;

  template <class F>
  Matrix(Operand o, int64_t r, int64_t c, Guard guard, F&& generate)
      : rows(r), columns(c), view(arrange(o, r, c)), memory(input<T>(elements(r, c, view), generate, guard)) {
    view.data = memory.data();
  }
  double value(int64_t r, int64_t c) const { return memory.value(view.row_offset(r) + c * view.col_stride); }

 private:
  static int64_t elements(int64_t rows, int64_t columns, const rf::MatrixView& v) {
    if (rows == 0 || columns == 0) return 0;
    int64_t last = 0;
    for (int64_t r = 0; r < rows; ++r) last = std::max(last, v.row_offset(r));
    return last + (columns - 1) * v.col_stride + 1;
  }
};

}  // namespace test
