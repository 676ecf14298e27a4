// What is tested of the squared error on every device, whose files say which sizes their kernels tell apart. Device:
// Memory, which is told of the buffers that a call may read or write (memory.h); forward(x, y, each or null, n), the
// sum of squares, whose error is below sum_units(n) and, as it is rounded, sum_rounding(); backward(x, y, grad,
// each_grad, scale, dx, dy, n).
#pragma once
#include <cmath>

#include "memory.h"

namespace test {

template <class Device, class T>
void check_sum_of_squares(double sum, double expected, int64_t n) {
  CHECK(std::fabs(sum - expected) <= expected * (kUnit<T> * Device::sum_units(n) + Device::template sum_rounding<T>()));
}

// Every operand and result a few elements from where vectors are aligned, in step with the others or not.
template <class Device, class T>
void mse_loss(int64_t n, Random& random) {
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  describe("mse_loss %s n=%lld", Format<T>::name, (long long)n);
  const auto spiky = [&] { return random.spiky(); };
  const int64_t shift = random.integer(0, 2), other = random.chance(0.5) ? shift : random.integer(0, 2);
  const Buffer<T> x = input<T>(n, spiky, guard, shift), y = input<T>(n, spiky, guard, other);
  const Buffer<T> g = input<T>(n, spiky, guard, other), one = input<T>(1, spiky, guard);
  Buffer<T> each(n, guard, random.chance(0.5) ? shift : random.integer(0, 3));
  double sum, sum_alone;
  {
    typename Device::Memory memory;
    memory.read(x, y);
    memory.write(each);
    sum = Device::forward(x.data(), y.data(), each.data(), n);
    sum_alone = Device::template forward<T>(x.data(), y.data(), nullptr, n);
  }
  double expected = 0;
  {
    Comparison<T> compare("each");
    for (int64_t i = 0; i < n; ++i) {
      const double d = x.value(i) - y.value(i);
      expected += d * d;
      compare.add(each.result(i), d * d, 4 * d * d, i);
    }
  }
  CHECK(each.rest_untouched());
  for (const double s : {sum, sum_alone}) check_sum_of_squares<Device, T>(s, expected, n);

  const double scale = 2.0 / 3;
  for (const bool each_grad : {false, true})
    for (int wanted = 1; wanted <= 3; ++wanted) {
      const bool of_x = wanted & 1, of_y = wanted & 2;
      const Buffer<T>& grad = each_grad ? g : one;
      Buffer<T> dx(n, guard, random.chance(0.5) ? shift : random.integer(0, 3)), dy(n, guard, random.integer(0, 3));
      {
        typename Device::Memory memory;
        memory.read(x, y, grad);
        memory.write(dx, dy);
        Device::template backward<T>(x.data(), y.data(), grad.data(), each_grad, scale, of_x ? dx.data() : nullptr,
                                     of_y ? dy.data() : nullptr, n);
      }
      {
        Comparison<T> compare_dx("dx"), compare_dy("dy");
        for (int64_t i = 0; i < n; ++i) {
          const double d = scale * grad.value(each_grad ? i : 0) * (x.value(i) - y.value(i));
          if (of_x) compare_dx.add(dx.result(i), d, 8 * std::fabs(d), i);
          if (of_y) compare_dy.add(dy.result(i), -d, 8 * std::fabs(d), i);
        }
      }
      CHECK(dx.rest_untouched() && dy.rest_untouched());
    }
}

template <class Device, class T>
double sum_of_squares(const Buffer<T>& x, const Buffer<T>& y, Buffer<T>* each = nullptr) {
  typename Device::Memory memory;
  memory.read(x, y);
  if (each) memory.write(*each);
  return Device::template forward<T>(x.data(), y.data(), each ? each->data() : nullptr, x.count());
}

template <class Device, class T>
void mse_loss_special_values() {
  describe("mse_loss %s: special values", Format<T>::name);
  for (const double special : {kNaN, kInfinity, -kInfinity})
    for (const int64_t at : {0, 20, 36}) {
      int64_t i = 0;
      const Buffer<T> x = input<T>(37, [&] { return i++ == at ? special : 1.0; }), y = input<T>(37, [] { return 0.5; });
      Buffer<T> each(37);
      const double sum = sum_of_squares<Device>(x, y, &each);
      CHECK(special != special ? sum != sum : sum == kInfinity);
      bool right = true;
      for (int64_t j = 0; j < 37; ++j) {
        const double e = each.result(j);
        right = right && (j != at ? e == 0.25 : special != special ? e != e : e == kInfinity);
      }
      CHECK(right);
    }
}

// Equal terms, whose additions may all err to the same side.
template <class Device, class T>
void mse_loss_many_terms(int64_t n) {
  describe("mse_loss %s: %lld equal terms", Format<T>::name, (long long)n);
  const Buffer<T> x = input<T>(n, [] { return 0.1; }), y = input<T>(n, [] { return 0.0; });
  const double exact = (double)((long double)x.value(0) * x.value(0) * n);
  CHECK(std::fabs(sum_of_squares<Device>(x, y) - exact) <= (8 * kUnit<T> + Device::template sum_rounding<T>()) * exact);
}

}  // namespace test
