// Activations: forward through the GEMM's epilogue (a product of 1 x 1 matrices leaves z as it is), and backward.
#include <cmath>
#include <vector>

#include "activation_cases.h"
#include "cpu/drivers/drivers.h"

namespace test {
namespace {

// y and z, n of them, for a row of pre-activations x.
template <class T>
void apply(Activation activation, const Buffer<T>& x, Buffer<T>& y, Buffer<T>* z) {
  const Buffer<T> one = input<T>(1, [] { return 1.0; });
  rf::gemm(Format<T>::dtype, {.m = 1,
                              .n = x.count(),
                              .k = 1,
                              .a = {one.data(), 1, 1, 0, 1},
                              .b = {x.data(), 1, x.count(), 0, 1},
                              .c = y.data(),
                              .c_stride = x.count(),
                              .activation = activation,
                              .preactivation = z ? z->data() : nullptr});
}

struct Cpu {
  template <class T>
  using Sum = rf::acc_t<T>;

  template <class... Buffers>
  static void backward(rf::DType dtype, const rf::ActivationBackward& p, int64_t rows, void* sums, Buffers&...) {
    rf::activation_backward(dtype, {p, sums}, rows);
  }
};

template <class T>
void forward(Activation activation, Random& random) {
  describe("activation %s %s forward", name_of(activation), Format<T>::name);
  const Buffer<T> x = preactivations<T>(3000, 500, 0, random);
  Buffer<T> y(x.count()), z(x.count()), alone(x.count());
  apply(activation, x, y, &z);
  rf::activation_forward(Format<T>::dtype, x.data(), alone.data(), x.count(), activation);
  check_activation("y", activation, x, y);
  check_activation("y of activation_forward", activation, x, alone);
  check_activation("z", Activation::none, x, z);
  CHECK(y.rest_untouched() && z.rest_untouched() && alone.rest_untouched());
}

// The derivative's ends, and NaN and infinity through both of its arguments.
template <class T>
void special_values(Activation activation) {
  describe("activation %s %s backward: special values", name_of(activation), Format<T>::name);
  const bool from_output = rf::saved_for(activation) == rf::Saved::output;
  constexpr int64_t n = 21;
  for (int64_t at : {0, 10, 20}) {
    const auto run = [&](double grad, double special) {
      int64_t i = 0;
      const Buffer<T> g = input<T>(n, [&] { return grad; }), s = input<T>(n, [&] { return i++ == at ? special : 0.5; });
      Buffer<T> dz(n);
      rf::activation_backward(Format<T>::dtype, {{g.data(), s.data(), {1, n, 0, 1}, dz.data(), n, activation}, nullptr},
                              1);
      return dz.value(at);
    };
    CHECK(std::isnan(run(kNaN, 0.5)));
    CHECK(run(kInfinity, 0.5) == kInfinity);
    if (activation == Activation::none) continue;
    if (activation == Activation::relu) {
      CHECK(run(2, kNaN) == 2 && run(2, kInfinity) == 2 && run(2, 1e-30) == (std::is_same_v<T, f16> ? 0 : 2));
      for (double grad : {2.0, kInfinity, kNaN}) CHECK(run(grad, 0.0) == 0 && run(grad, -0.0) == 0);
      continue;
    }
    CHECK(std::isnan(run(1, kNaN)));
    if (from_output) continue;
    for (double far : {200.0, 800.0, 2000.0, 6e4, 1e19, 1e38, 1e300, kInfinity}) {
      CHECK(run(2, far) == 2);
      CHECK(std::fabs(run(2, -far)) == 0 || (std::is_same_v<T, double> && far < 800));
    }
  }
}

// Equal terms, whose additions may all err to the same side.
template <class T>
void many_rows(int64_t rows) {
  using A = rf::acc_t<T>;
  describe("column sums %s: %lld equal rows", Format<T>::name, (long long)rows);
  const Buffer<T> g = input<T>(1, [] { return 0.1; });
  Buffer<A> sums(1);
  rf::activation_backward(Format<T>::dtype,
                          {{g.data(), nullptr, {1, 0, 0, 1}, nullptr, 1, Activation::none}, sums.data()}, rows);
  const double exact = g.value(0) * (double)rows, unit = std::is_same_v<T, double> ? 1.1e-16 : 6e-8;
  CHECK(std::fabs(sums.value(0) - exact) <= 8 * unit * exact);
}

template <class T>
void any_number_of_threads() {
  using A = rf::acc_t<T>;
  describe("column sums %s: the same bits with any number of threads", Format<T>::name);
  Random random(9);
  constexpr int64_t rows = 3001, columns = 19;
  const Buffer<T> g = input<T>(rows * columns, [&] { return random.spiky(); });
  std::vector<A> first;
  for (int64_t n : {1, 2, 3, 5}) {
    threads = n;
    Buffer<A> sums(columns);
    rf::activation_backward(Format<T>::dtype,
                            {{g.data(), nullptr, {1, columns, 0, 1}, nullptr, columns, Activation::none}, sums.data()},
                            rows);
    if (first.empty()) first = sums.copy();
    CHECK(first == sums.copy());
  }
  threads = 2;
}

template <class T>
void all() {
  Random random(1000 + (int)Format<T>::dtype);
  for (Activation a : kActivations) {
    forward<T>(a, random);
    special_values<T>(a);
    for (int64_t columns : {1, 2, 7, 15, 16, 17, 31, 33, 300, 2049})
      for (int outputs = 1; outputs <= 3; ++outputs)
        activation_backward<Cpu, T>(a, random.pick({1, 3, 31, 32, 65}), columns, (GradRows)random.integer(0, 3),
                                    outputs & 1, outputs & 2, random);
  }
  activation_backward<Cpu, T>(Activation::silu, 2000, 33, GradRows::padded, true, true, random);
  for (int64_t rows : {1000, 65535, 3000000}) many_rows<T>(rows);
  any_number_of_threads<T>();
}

}  // namespace

TEST(activation) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
