// Rows of classes in every arrangement that tensors come in.
#pragma once
#include <vector>

#include "memory.h"
#include "shared/types.h"

namespace test {

enum class Arrangement {
  rows,        // classes adjacent: (N, C), or (N, D, C) seen as (N, C, D)
  padded,      // the same with gaps between rows
  inner,       // (N, C, D)
  gaps,        // (N, C, D) cut out of a larger tensor, every other element along D
  transposed,  // (C, N)
  expanded,    // one value for all classes of a row; inputs only
  constant,    // one for all rows too, as a sum's gradient; inputs only
};
constexpr Arrangement kArrangements[] = {Arrangement::rows,    Arrangement::padded,     Arrangement::inner,
                                         Arrangement::gaps,    Arrangement::transposed, Arrangement::expanded,
                                         Arrangement::constant};
constexpr const char* kArrangementNames[] = {"rows", "padded", "inner", "gaps", "transposed", "expanded", "constant"};
constexpr int kInputArrangements = sizeof(kArrangements) / sizeof(*kArrangements), kOutputArrangements = 5;

struct RowShape {
  int64_t outer, inner, classes;
  int64_t rows() const { return outer * inner; }
};

inline rf::RowLayout arrange(Arrangement a, const RowShape& s) {
  const int64_t c = s.classes, d = s.inner;
  switch (a) {
    case Arrangement::rows:
      return {d, d * c, c, 1};
    case Arrangement::padded:
      return {d, d * (c + 3) + 5, c + 3, 1};
    case Arrangement::inner:
      return {d, c * d, 1, d};
    case Arrangement::gaps:
      return {d, c * (2 * d + 1) + 3, 2, 2 * d + 1};
    case Arrangement::transposed:
      return {d, d, 1, s.outer * d};
    case Arrangement::expanded:
      return {d, d, 1, 0};
    case Arrangement::constant:
      return {d, 0, 0, 0};
  }
  return {};
}

// One tensor of rows and where it lies.
template <class T>
struct Rows {
  RowShape shape;
  rf::RowLayout layout;
  Buffer<T> memory;

  Rows(const RowShape& s, Arrangement a, Guard guard, int64_t shift = 0)
      : shape(s), layout(arrange(a, s)), memory(elements(s, layout), guard, shift) {}
  template <class F>
  Rows(const RowShape& s, Arrangement a, Guard guard, int64_t shift, F&& generate) : Rows(s, a, guard, shift) {
    for (int64_t i = 0; i < memory.count(); ++i) memory[i] = from_double<T>(generate());
  }

  int64_t at(int64_t row, int64_t c) const { return layout.offset(row) + c * layout.class_stride; }
  double value(int64_t row, int64_t c) const { return memory.value(at(row, c)); }
  double result(int64_t row, int64_t c) { return memory.result(at(row, c)); }
  std::vector<double> row(int64_t r) const {
    std::vector<double> values(shape.classes);
    for (int64_t c = 0; c < shape.classes; ++c) values[c] = value(r, c);
    return values;
  }

 private:
  static int64_t elements(const RowShape& s, const rf::RowLayout& l) {
    return l.offset((s.outer - 1) * s.inner) + (s.inner - 1) * l.inner_stride + (s.classes - 1) * l.class_stride + 1;
  }
};

// Numbers of classes around the widths of vectors (up to 16 lanes, two at a time) and the block of 2048.
constexpr int64_t kClasses[] = {1, 2, 7, 15, 16, 17, 31, 33, 2047, 2048, 2049, 5000};

// Rows that fill tiles of 16 unevenly and, where classes are few, suffice for two threads.
inline RowShape shape_for(int64_t classes, Random& random) {
  constexpr int64_t kInner[] = {1, 3, 16, 21};
  const int64_t inner = random.pick(kInner), rows = classes > 1000 ? 5 : random.chance(0.2) ? 40000 / classes / 2 : 40;
  return {(rows + inner - 1) / inner, inner, classes};
}

}  // namespace test
