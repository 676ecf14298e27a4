// Activations and their derivatives with column sums, against double precision.
#include <cmath>
#include <vector>

#include "activation_reference.h"
#include "cuda/launch.h"
#include "device_memory.h"
#include "layouts.h"

namespace test {
namespace {

template <class T>
void forward(Activation activation, Random& random) {
  // Every magnitude that matters, both signs, and the ends; z and y aligned alike and not.
  std::vector<double> points = {0, kInfinity, -kInfinity, kNaN};
  for (int i = 0; i < 600; ++i) points.push_back(random.between(-20, 20));
  for (int i = 0; i < 200; ++i) points.push_back((random.chance(0.5) ? 1 : -1) * std::exp(random.between(-12, 6.5)));
  for (const bool in_place : {false, true})
    for (const int64_t shift : {0, 1, 5}) {
      describe("activation %s %s forward, shift %lld%s", name_of(activation), Format<T>::name, (long long)shift,
               in_place ? ", in place" : "");
      size_t i = 0;
      const Buffer<T> x = input<T>((int64_t)points.size(), [&] { return points[i++]; }, Guard::behind, shift);
      Buffer<T> y(x.count(), Guard::behind, random.integer(0, 1) * shift);
      if (in_place)
        for (int64_t j = 0; j < x.count(); ++j) y[j] = x.data()[j];
      {
        const Lent lx(x), ly(y);
        rf::cuda::launch_activation_forward(Format<T>::dtype, in_place ? y.data() : x.data(), y.data(), x.count(),
                                            activation, nullptr);
      }
      Comparison<T> compare("y");
      for (int64_t j = 0; j < x.count(); ++j)
        compare.add(y.result(j), activate(activation, x.value(j)), activate_units(activation, x.value(j)), j);
    }
}

enum class GradRows { adjacent, padded, expanded, transposed };
constexpr GradRows kGradRows[] = {GradRows::adjacent, GradRows::padded, GradRows::expanded, GradRows::transposed};

template <class T>
void backward(Activation activation, int64_t rows, int64_t columns, GradRows kind, bool write, bool sum,
              Random& random) {
  describe("activation %s %s backward %lld x %lld gradient %d output=%d sums=%d", name_of(activation), Format<T>::name,
           (long long)rows, (long long)columns, (int)kind, write, sum);
  rf::RowLayout layout = {1, columns, 0, 1};
  if (kind == GradRows::padded) layout.outer_stride = columns + 3;
  if (kind == GradRows::expanded) layout.outer_stride = layout.class_stride = 0;
  if (kind == GradRows::transposed) layout = {1, 1, 0, rows};
  const Buffer<T> grad =
      input<T>(layout.offset(rows - 1) + (columns - 1) * layout.class_stride + 1, [&] { return random.spiky(); });
  const bool from_output = rf::saved_for(activation) == rf::Saved::output;
  const Buffer<T> saved = input<T>(
      rows * columns,
      [&] {
        const double z = random.chance(0.01) ? random.between(-90, 90) : 2 * random.spiky();
        return from_output ? activate(activation, z) : z;
      },
      Guard::behind, 1);
  Buffer<T> dz(rows * columns, Guard::behind, random.integer(0, 3)), sums(columns);
  const int64_t workspace_bytes = rf::cuda::activation_backward_workspace(Format<T>::dtype, rows, columns);
  Buffer<char> workspace(workspace_bytes);
  {
    const Lent lg(grad), ls(saved), ld(dz), lu(sums), lw(workspace);
    rf::cuda::launch_activation_backward(Format<T>::dtype,
                                         {{grad.data(), activation == Activation::none ? nullptr : saved.data(), layout,
                                           write ? dz.data() : nullptr, columns, activation},
                                          rows,
                                          sum ? sums.data() : nullptr,
                                          workspace_bytes ? workspace.data() : nullptr},
                                         nullptr);
  }
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
    Comparison<T> compare("column sums");
    for (int64_t j = 0; j < columns; ++j) compare.add(sums.result(j), total[j], size[j], j);
  }
  CHECK(dz.rest_untouched() && sums.rest_untouched());
}

// Sums of nothing: zero, and without a single element to read.
template <class T>
void nothing() {
  describe("activation %s of nothing", Format<T>::name);
  Buffer<T> sums(5);
  {
    const Lent ls(sums);
    rf::cuda::launch_activation_backward(
        Format<T>::dtype, {{nullptr, nullptr, {1, 5, 0, 1}, nullptr, 5, Activation::none}, 0, sums.data(), nullptr},
        nullptr);
    rf::cuda::launch_activation_forward(Format<T>::dtype, nullptr, nullptr, 0, Activation::relu, nullptr);
  }
  CHECK(rf::cuda::activation_backward_workspace(Format<T>::dtype, 5, 0) == 0);
  for (int64_t j = 0; j < 5; ++j) CHECK(sums.value(j) == 0);
}

template <class T>
void all() {
  Random random(300 + (int)Format<T>::dtype);
  for (const Activation a : kActivations) {
    forward<T>(a, random);
    // One vector of columns and several, one part of the rows and several, every way the gradient may lie.
    for (const GradRows kind : kGradRows)
      backward<T>(a, 5, 13, kind, a != Activation::none, random.chance(0.7), random);
    backward<T>(a, 3, 300, GradRows::adjacent, true, true, random);
  }
  backward<T>(Activation::none, 70, 3, GradRows::adjacent, false, true, random);
  backward<T>(Activation::silu, 2100, 5, GradRows::padded, true, true, random);  // 256 or 128 rows for a block's pass
  backward<T>(Activation::relu, 1, 1, GradRows::adjacent, true, true, random);
  nothing<T>();
}

}  // namespace

TEST(activation) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
