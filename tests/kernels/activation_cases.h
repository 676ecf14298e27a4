// What is tested of activations on every device, whose files say which sizes their kernels tell apart. Device runs the
// derivative: backward(dtype, problem, rows, sums or null, buffers...), with the buffers that it may read (const) or
// write; its column sums have the type Device::Sum<T>.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "activation_reference.h"
#include "memory.h"
#include "shared/problems.h"

namespace test {

// Every magnitude that matters, both signs, and the ends.
template <class T>
Buffer<T> preactivations(int of_ordinary, int of_any_size, int64_t shift, Random& random) {
  std::vector<double> points = {0, kInfinity, -kInfinity, kNaN};
  for (int i = 0; i < of_ordinary; ++i) points.push_back(random.between(-20, 20));
  for (int i = 0; i < of_any_size; ++i)
    points.push_back((random.chance(0.5) ? 1 : -1) * std::exp(random.between(-12, 6.5)));
  size_t i = 0;
  return input<T>((int64_t)points.size(), [&] { return points[i++]; }, Guard::behind, shift);
}

template <class T>
void check_activation(const char* what, Activation activation, const Buffer<T>& x, Buffer<T>& y) {
  Comparison<T> compare(what);
  for (int64_t j = 0; j < x.count(); ++j)
    compare.add(y.result(j), activate(activation, x.value(j)), activate_units(activation, x.value(j)), j);
}

// How the upstream gradient lies; the last two only where kernels read any columns.
enum class GradRows { adjacent, padded, expanded, collapsed, one_number, transposed };

inline rf::RowLayout layout_of(GradRows kind, int64_t rows, int64_t columns) {
  switch (kind) {
    case GradRows::adjacent:
      return {1, columns, 0, 1};
    case GradRows::padded:
      return {1, columns + 3, 0, 1};
    case GradRows::expanded:
      return {1, 0, 0, 1};
    case GradRows::collapsed:
      return {3, 5 * columns, columns + 1, 1};
    case GradRows::one_number:
      return {1, 0, 0, 0};
    case GradRows::transposed:
      return {1, 1, 0, rows};
  }
  return {};
}

template <class Device, class T>
void activation_backward(Activation activation, int64_t rows, int64_t columns, GradRows kind, bool write, bool sum,
                         Random& random) {
  using Sum = typename Device::template Sum<T>;
  describe("activation %s %s backward %lld x %lld gradient %d output=%d sums=%d", name_of(activation), Format<T>::name,
           (long long)rows, (long long)columns, (int)kind, write, sum);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const rf::RowLayout layout = layout_of(kind, rows, columns);
  int64_t last = 0;
  for (int64_t r = 0; r < rows; ++r) last = std::max(last, layout.offset(r) + (columns - 1) * layout.class_stride);
  const Buffer<T> grad = input<T>(last + 1, [&] { return random.spiky(); }, guard);
  const bool from_output = rf::saved_for(activation) == rf::Saved::output;
  const Buffer<T> saved = input<T>(
      rows * columns,
      [&] {
        const double z = random.chance(0.01) ? random.between(-90, 90) : 2 * random.spiky();
        return from_output ? activate(activation, z) : z;
      },
      guard, 1);
  Buffer<T> dz(rows * columns, guard, random.integer(0, 3));
  Buffer<Sum> sums(columns, guard);
  const rf::ActivationBackward p = {.grad = grad.data(),
                                    .saved = activation == Activation::none ? nullptr : saved.data(),
                                    .grad_layout = layout,
                                    .output = write ? dz.data() : nullptr,
                                    .columns = columns,
                                    .activation = activation};
  const With with(p);
  Device::backward(Format<T>::dtype, p, rows, sum ? sums.data() : nullptr, grad, saved, dz, sums);
  std::vector<double> total(columns), size(columns);
  {
    Comparison<T> compare("dz");
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; ++j) {
        const double g = grad.value(layout.offset(r) + j * layout.class_stride), s = saved.value(r * columns + j);
        const double expected = g * derivative(activation, s);
        const double tail = derivative_tail(activation, s) / kUnit<T>;
        const double units = std::fabs(g) * (derivative_units(activation, s) + tail) + 2 * std::fabs(expected);
        if (write) compare.add(dz.result(r * columns + j), expected, units, r * columns + j);
        total[j] += expected;
        size[j] += units + std::fabs(expected) * sum_error(rows);
      }
  }
  if (sum) {
    Comparison<Sum> compare("column sums");
    for (int64_t j = 0; j < columns; ++j) compare.add(sums.result(j), total[j], size[j], j);
  }
  CHECK(dz.rest_untouched() && sums.rest_untouched());
}

}  // namespace test
