// Squared error forward and backward on the CPU, against double precision.
#include <algorithm>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "mse_loss_cases.h"

namespace test {
namespace {

struct Cpu {
  using Memory = AnyMemory;
  // Chains of additions are as long as the blocks that the sum is taken over, at most 16384.
  static double sum_units(int64_t n) { return 2 * sum_error(std::min<int64_t>(n, 16384)); }
  template <class T>
  static double sum_rounding() {
    return 0;
  }
  template <class T>
  static double forward(const T* x, const T* y, T* each, int64_t n) {
    return rf::mse_loss(Format<T>::dtype, {x}, {y}, each, n);
  }
  template <class T>
  static void backward(const T* x, const T* y, const T* grad, bool each_grad, double scale, T* dx, T* dy, int64_t n) {
    rf::mse_loss_backward(Format<T>::dtype, {x}, {y}, {grad}, each_grad, scale, dx, dy, n);
  }
};

template <class T>
void any_number_of_threads() {
  describe("mse_loss %s: the same bits with any number of threads", Format<T>::name);
  Random random(8);
  const int64_t n = 200001;
  const Buffer<T> x = input<T>(n, [&] { return random.spiky(); }), y = input<T>(n, [&] { return random.spiky(); });
  std::vector<double> sums;
  for (int64_t t : {1, 2, 3, 7}) {
    threads = t;
    sums.push_back(rf::mse_loss(Format<T>::dtype, {x.data()}, {y.data()}, nullptr, n));
  }
  threads = 2;
  for (double s : sums) CHECK(s == sums[0]);
}

// Elements that are not adjacent give the bits of those that are, on each side by itself.
template <class T>
void runs(Random& random) {
  const int64_t outer = random.integer(1, 5), rows = random.integer(1, 300), length = random.integer(1, 200),
                step = random.integer(0, 4), row = length * std::max<int64_t>(step, 1) + random.integer(0, 9),
                n = outer * rows * length, plane = rows * row + random.integer(0, 9);
  describe("mse_loss %s: %lld x %lld runs of %lld, %lld apart", Format<T>::name, (long long)outer, (long long)rows,
           (long long)length, (long long)step);
  const Buffer<T> apart =
      input<T>((outer - 1) * plane + (rows - 1) * row + (length - 1) * step + 1, [&] { return random.spiky(); });
  const Buffer<T> other = input<T>(n, [&] { return random.spiky(); });
  std::vector<T> together;
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t k = 0; k < length; ++k) together.push_back(apart.data()[i * plane + j * row + k * step]);
  const rf::Elements as_they_lie = {apart.data(), {{outer, plane}, {rows, row}, {length, step}}};
  const rf::DType dtype = Format<T>::dtype;
  for (bool is_x : {false, true}) {
    const rf::Elements dense = {other.data()}, copy = {together.data()};
    Buffer<T> each(n), expected(n), dx(n), expected_dx(n);
    const double sum = is_x ? rf::mse_loss(dtype, as_they_lie, dense, each.data(), n)
                            : rf::mse_loss(dtype, dense, as_they_lie, each.data(), n);
    const double right = is_x ? rf::mse_loss(dtype, copy, dense, expected.data(), n)
                              : rf::mse_loss(dtype, dense, copy, expected.data(), n);
    CHECK(sum == right && !std::memcmp(each.data(), expected.data(), n * sizeof(T)));
    for (const auto& [g, same] : {std::pair{as_they_lie, copy}, std::pair{dense, dense}}) {
      is_x ? rf::mse_loss_backward(dtype, as_they_lie, dense, g, true, 0.7, dx.data(), nullptr, n)
           : rf::mse_loss_backward(dtype, dense, as_they_lie, g, true, 0.7, dx.data(), nullptr, n);
      is_x ? rf::mse_loss_backward(dtype, copy, dense, same, true, 0.7, expected_dx.data(), nullptr, n)
           : rf::mse_loss_backward(dtype, dense, copy, same, true, 0.7, expected_dx.data(), nullptr, n);
      CHECK(!std::memcmp(dx.data(), expected_dx.data(), n * sizeof(T)));
    }
  }
}

template <class T>
void all() {
  Random random(700 + (int)Format<T>::dtype);
  for (int64_t n : {0, 1, 2, 7, 15, 16, 17, 31, 33, 2047, 2048, 2049, 5000, 16384, 16385, 100003})
    mse_loss<Cpu, T>(n, random);
  mse_loss_special_values<Cpu, T>();
  for (int64_t n : {1000, 16384, 65535, 3000000}) mse_loss_many_terms<Cpu, T>(n);
  any_number_of_threads<T>();
  for (int i = 0; i < fewer(40); ++i) runs<T>(random);
}

}  // namespace

TEST(mse_loss) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
