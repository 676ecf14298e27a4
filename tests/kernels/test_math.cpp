// exp, tanh and the normal distribution function in units in the last place, each through a kernel that shows it alone:
// exp as the gradient of log-sum-exp with lse = 0, tanh as an activation, Phi as gelu(x), whose product with x rounds
// once more.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "memory.h"

namespace test {
namespace {

// float's reference is double; double's is long double, which takes long where it is emulated.
template <class T>
using Exact = std::conditional_t<std::is_same_v<T, float>, double, long double>;
template <class T>
constexpr int64_t kPoints = std::is_same_v<T, double> && LDBL_MANT_DIG > 64 ? 20000 : 400000;

template <class T, class F>
void accuracy(const char* name, const std::vector<T>& x, const T* got, F&& exact, double allowed) {
  describe("%s %s", name, Format<T>::name);
  double worst = 0, at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Exact<T> expected = exact((Exact<T>)x[i]);
    const double error =
        std::ldexp(std::fabs((double)((Exact<T>)got[i] - expected)), -ulp_exponent<T>((double)expected));
    if (error <= worst) continue;
    worst = error;
    at = x[i];
  }
  std::printf("    %-24s %s: %.2f ulp at %.9g\n", name, Format<T>::name, worst, at);
  check(worst <= allowed, "%.3f ulp at %.17g, expected at most %.2f", worst, at, allowed);
}

template <class T>
std::vector<T> grid(double from, double to) {
  Random random(15);
  std::vector<T> x;
  const int64_t n = kPoints<T>;
  for (int64_t i = 0; i <= n; ++i)
    x.push_back((T)(from + (to - from) * ((double)i + random.uniform() - 0.5) / (double)n));
  for (T& v : x) v = (T)std::fmin(to, std::fmax(from, v));
  return x;
}

template <class T>
std::vector<T> exp_of(const std::vector<T>& x) {
  std::vector<T> y(x.size());
  T lse = 0, one = 1;
  rf::SoftmaxArgs a = {};
  a.input = x.data();
  a.output = y.data();
  a.in = a.grad_in = a.out = {1, 0, 0, 1};
  a.classes = (int64_t)x.size();
  a.row_result = &lse;
  a.row_grad = &one;
  rf::softmax(rf::SoftmaxOp::logsumexp_backward, Format<T>::dtype, a, 1);
  return y;
}

template <class T>
std::vector<T> activated(const std::vector<T>& x, rf::Activation activation) {
  std::vector<T> y(x.size());
  const T one = 1;
  const int64_t n = (int64_t)x.size();
  rf::gemm(Format<T>::dtype, {.m = 1,
                              .n = n,
                              .k = 1,
                              .a = {&one, 1, 1, 0, 1},
                              .b = {x.data(), 1, n, 0, 1},
                              .c = y.data(),
                              .c_stride = n,
                              .activation = activation});
  return y;
}

template <class T>
void functions() {
  using E = Exact<T>;
  constexpr bool is_double = std::is_same_v<T, double>;
  const auto exact_exp = [](E x) { return std::exp(x); };
  // Between underflow and overflow.
  const std::vector<T> x = grid<T>(is_double ? -708.03 : -86.97, is_double ? 709.78 : 88.72);
  accuracy<T>("exp", x, exp_of(x).data(), exact_exp, is_double ? 2 : 1.5);
  const std::vector<T> near_zero = grid<T>(-1, 1);
  accuracy<T>("exp near 0", near_zero, exp_of(near_zero).data(), exact_exp, is_double ? 2 : 1.5);

  const auto exact_tanh = [](E v) { return std::tanh(v); };
  for (double end : {0.7, 12.0}) {
    const std::vector<T> t = grid<T>(-end, end);
    accuracy<T>(end < 1 ? "tanh near 0" : "tanh", t, activated(t, rf::Activation::tanh).data(), exact_tanh, 3);
  }
  const auto exact_gelu = [](E v) { return v * std::erfc(-v / std::sqrt(E(2))) / 2; };
  // The exponent x^2 / 2 is rounded before exp is taken, so the lower tail loses x^2 / 4 ulp and more.
  for (double from : {-1.0, -5.0, -12.0}) {
    const std::vector<T> t = grid<T>(from, -from);
    const char* name = from == -1 ? "x Phi(x), |x| <= 1" : from == -5 ? "x Phi(x), |x| <= 5" : "x Phi(x), |x| <= 12";
    accuracy<T>(name, t, activated(t, rf::Activation::gelu).data(), exact_gelu,
                is_double ? 5 + 2 * from * from : 7 + from * from / 2);
  }
}

template <class T>
void ends_of_exp() {
  describe("exp %s: its ends", Format<T>::name);
  const T infinity = std::numeric_limits<T>::infinity(), huge = std::numeric_limits<T>::max();
  for (int64_t width : {1, 40}) {  // in a tail, and in whole vectors
    const auto at = [&](T x) { return exp_of(std::vector<T>(width, x))[0]; };
    CHECK(at(-infinity) == 0);
    CHECK(at(-huge) == 0);
    CHECK(at(infinity) == infinity);
    CHECK(at(huge) == infinity);
    CHECK(at(0) == 1);
    CHECK(std::isnan(at(std::numeric_limits<T>::quiet_NaN())));
    CHECK(at(std::is_same_v<T, float> ? T(-86.97) : T(-708.03)) > 0);
    CHECK(at(std::is_same_v<T, float> ? T(-86.99) : T(-708.05)) == 0);  // before it would be subnormal
    CHECK(at(std::is_same_v<T, float> ? T(88.73) : T(709.79)) == infinity);
  }
}

}  // namespace

TEST(math) {
  each_dtype([](auto element) {
    using T = decltype(element);
    if constexpr (std::is_floating_point_v<T>) {
      functions<T>();
      ends_of_exp<T>();
    }
  });
}

}  // namespace test
