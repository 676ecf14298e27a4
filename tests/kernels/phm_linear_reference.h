// Combinations of the parts of rows, and products of parts with parts, in double precision, for both devices. `units`
// bound the error of a sum of terms whose magnitudes add up to one.
#pragma once
#include <cmath>

#include "memory.h"

namespace test {

struct PartsShape {
  int64_t rows, stride, parts, length;  // of a matrix whose rows are so many parts of that length
};

// to: rows x to_parts x length, combined by coefficients, to_parts x parts.
template <class From, class A, class To>
void check_combination(const PartsShape& s, const Buffer<From>& from, const Buffer<A>& coefficients, int64_t to_parts,
                       double units, Buffer<To>& to) {
  Comparison<To> compare("combination");
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t j = 0; j < to_parts; ++j)
      for (int64_t r = 0; r < s.length; ++r) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < s.parts; ++i) {
          const double term = coefficients.value(j * s.parts + i) * from.value(row * s.stride + i * s.length + r);
          sum += term;
          size += std::fabs(term);
        }
        const int64_t at = (row * to_parts + j) * s.length + r;
        compare.add(to.result(at), sum, size * units, at);
      }
}

// of: rows x of_parts x length; got(j, i) is the sum over rows of `of`'s part j with `with`'s part i, and of `first`.
template <class A, class T, class Got>
void check_part_products(const PartsShape& s, const Buffer<A>& of, int64_t of_parts, const Buffer<T>& with,
                         double first, double units, Got&& got) {
  Comparison<A> compare("products");
  for (int64_t j = 0; j < of_parts; ++j)
    for (int64_t i = 0; i < s.parts; ++i) {
      double sum = first, size = std::fabs(first);
      for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t r = 0; r < s.length; ++r) {
          const double term =
              of.value((row * of_parts + j) * s.length + r) * with.value(row * s.stride + i * s.length + r);
          sum += term;
          size += std::fabs(term);
        }
      compare.add(got(j, i), sum, size * units, j * s.parts + i);
    }
}

}  // namespace test
