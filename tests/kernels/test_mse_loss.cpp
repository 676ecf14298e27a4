// Squared error forward and backward, against double precision.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "mse_loss_reference.h"

namespace test {
namespace {

template <class T>
void mse_loss(int64_t n, Random& random) {
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  describe("mse_loss %s n=%lld", Format<T>::name, (long long)n);
  const auto spiky = [&] { return random.spiky(); };
  const Buffer<T> x = input<T>(n, spiky, guard), y = input<T>(n, spiky, guard, 1), g = input<T>(n, spiky, guard, 2);
  Buffer<T> each(n, guard, random.integer(0, 3));
  const double sum = rf::mse_loss(Format<T>::dtype, {x.data()}, {y.data()}, each.data(), n);
  const double sum_alone = rf::mse_loss(Format<T>::dtype, {x.data()}, {y.data()}, nullptr, n);
  const double expected = check_each_mse_loss(x, y, each);
  CHECK(each.rest_untouched());
  // Chains of additions are as long as the blocks that the sum is taken over, at most 16384.
  for (double s : {sum, sum_alone})
    CHECK(std::fabs(s - expected) <= expected * kUnit<T> * sum_error(std::min<int64_t>(n, 16384)) * 2);

  const double scale = 2.0 / 3;
  for (bool each_grad : {false, true})
    for (int wanted = 1; wanted <= 3; ++wanted) {
      Buffer<T> dx(n, guard, random.integer(0, 3)), dy(n, guard, random.integer(0, 3));
      const Buffer<T> one = input<T>(1, spiky, guard);
      rf::mse_loss_backward(Format<T>::dtype, {x.data()}, {y.data()}, {each_grad ? g.data() : one.data()}, each_grad,
                            scale, wanted & 1 ? dx.data() : nullptr, wanted & 2 ? dy.data() : nullptr, n);
      check_mse_loss_backward(x, y, each_grad ? g : one, scale, wanted & 1 ? &dx : nullptr, wanted & 2 ? &dy : nullptr);
      CHECK(dx.rest_untouched() && dy.rest_untouched());
    }
}

template <class T>
void special_values() {
  describe("mse_loss %s: special values", Format<T>::name);
  for (double special : {kNaN, kInfinity, -kInfinity})
    for (int64_t at : {0, 20, 36}) {
      int64_t i = 0;
      const Buffer<T> x = input<T>(37, [&] { return i++ == at ? special : 1.0; }), y = input<T>(37, [] { return 0.5; });
      Buffer<T> each(37);
      const double sum = rf::mse_loss(Format<T>::dtype, {x.data()}, {y.data()}, each.data(), 37);
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
template <class T>
void many_terms(int64_t n) {
  describe("mse_loss %s: %lld equal terms", Format<T>::name, (long long)n);
  const Buffer<T> x = input<T>(n, [] { return 0.1; }), y = input<T>(n, [] { return 0.0; });
  const double exact = (double)((long double)x.value(0) * x.value(0) * n);
  const double unit = std::is_same_v<T, double> ? 1.1e-16 : 6e-8;
  CHECK(std::fabs(rf::mse_loss(Format<T>::dtype, {x.data()}, {y.data()}, nullptr, n) - exact) <= 8 * unit * exact);
}

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
    mse_loss<T>(n, random);
  special_values<T>();
  for (int64_t n : {1000, 16384, 65535, 3000000}) many_terms<T>(n);
  any_number_of_threads<T>();
  for (int i = 0; i < fewer(40); ++i) runs<T>(random);
}

}  // namespace

TEST(mse_loss) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
