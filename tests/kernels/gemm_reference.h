// Products of matrices in double precision and how much a device's may err, for every device.
#pragma once
#include <cmath>
#include <vector>

#include "activation_reference.h"
#include "memory.h"
#include "shared/problems.h"

namespace test {

// A number in units of the accumulator's rounding that it may err by.
struct Approximate {
  double value = 0, units = 0;

  void add(double more) {
    value += more;
    units += 2 * (std::fabs(more) + std::fabs(value));
  }
};

// A factor with K adjacent, for the inner loop: rows of A, columns of B; `across`: its memory's rows run across K.
template <class T, class F>
std::vector<double> along_k(const rf::MatrixView& factor, bool across, int64_t count, int64_t k, F&& as_multiplied) {
  std::vector<double> values(count * k);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t row = across ? j : i, column = across ? i : j;
      const T element = ((const T*)factor.data)[factor.row_offset(row) + column * factor.col_stride];
      values[i * k + j] = as_multiplied(to_double(element));
    }
  return values;
}

inline Approximate dot(const double* p, const double* q, int64_t k) {
  Approximate sum;
  for (int64_t i = 0; i < k; ++i) {
    sum.value += p[i] * q[i];
    sum.units += std::fabs(p[i] * q[i]);
  }
  sum.units *= long_sum_error(k);
  return sum;
}

// C and what was before its activation, of a product whose operands, of type T, are multiplied as `as_multiplied` has
// them.
template <class T, class F>
void check_product(const rf::GemmProblem& g, Buffer<T>& c, Buffer<T>& preactivation, F&& as_multiplied) {
  const auto rows = along_k<T>(g.a, g.a_transposed, g.m, g.k, as_multiplied);
  const auto columns = along_k<T>(g.b, !g.b_transposed, g.n, g.k, as_multiplied);
  {
    Comparison<T> of_c("c"), of_preactivation("pre-activation");
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j) {
        Approximate z = dot(rows.data() + i * g.k, columns.data() + j * g.k, g.k);
        if (g.bias) z.add(to_double(((const T*)g.bias)[j]));
        const int64_t at = i * g.c_stride + j;
        if (g.preactivation) of_preactivation.add(preactivation.result(at), z.value, z.units, at);
        // No activation here is steeper than 1.13.
        const double through =
            g.activation == Activation::none ? z.units : 1.13 * z.units + activate_units(g.activation, z.value);
        of_c.add(c.result(at), activate(g.activation, z.value), through, at);
      }
  }
  CHECK(c.rest_untouched() && preactivation.rest_untouched());
}

}  // namespace test
