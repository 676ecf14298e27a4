// Likelihoods of linear models with their gradients, against double precision.
#include <cmath>
#include <vector>

#include "cuda/launch.h"
#include "device_memory.h"
#include "linear_nll_reference.h"

namespace test {
namespace {

constexpr double kLogTwoPi = 1.8378770664093454836;

// Of what the kernel is given: a variance for a scale, and with it, or by what was observed, a loss's constant.
Expected expected_of(Family family, double eta, double y, double given, bool full) {
  // The prediction is rounded; an exponential is off by as much as its argument, some units of it.
  if (family == Family::gaussian) {
    const double log = std::log(given), constant = 0.5 * log + (full ? 0.5 * kLogTwoPi : 0);
    return expect(family, eta, y, 1 / given, constant, std::fabs(eta), 4 * (std::fabs(log) + kLogTwoPi));
  }
  if (family == Family::poisson) {
    const double stirling = full && y > 1 ? y * std::log(y) - y + 0.5 * (kLogTwoPi + std::log(y)) : 0;
    return expect(family, eta, y, 1, stirling, 6 * std::fabs(eta), 8 * (y + stirling));
  }
  const bool squared = family == Family::squared;
  return expect(family, eta, y, squared ? 2 : given, 0, (squared ? 1 : 6) * std::fabs(eta), 0);
}

// What is given to the kernel and what is wanted of it.
struct Choice {
  bool bias, acc_target, scale, row_factor, upstream, full, loss, loss_sums, gradient, bias_sums, scale_sums, in_place;
};
Choice choose(Random& random) {
  const auto maybe = [&] { return random.chance(0.5); };
  return {maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), maybe()};
}

// far: with predictions of every size, of which only single losses may be infinite.
template <class T>
void likelihood(Family family, int64_t rows, int64_t outputs, Choice c, bool far, Random& random) {
  using A = rf::acc_t<T>;
  if (family != Family::gaussian) c.scale_sums = false;
  if (far && family == Family::poisson) c.loss_sums = c.bias_sums = false;
  c.in_place = c.in_place && c.gradient && std::is_same_v<T, A>;
  describe(
      "%s %s %lld x %lld bias=%d acc_target=%d scale=%d row_factor=%d upstream=%d full=%d loss=%d%d gradient=%d%d%d "
      "in_place=%d far=%d",
      rf::kFamilyNames[(int)family], Format<T>::name, (long long)rows, (long long)outputs, c.bias, c.acc_target,
      c.scale, c.row_factor, c.upstream, c.full, c.loss, c.loss_sums, c.gradient, c.bias_sums, c.scale_sums, c.in_place,
      far);
  const int64_t n = rows * outputs;
  const auto spiky = [&] { return random.spiky(); };
  const auto positive = [&] { return 0.1 + 3 * random.uniform(); };
  const auto shift = [&] { return random.integer(0, 3); };
  const auto observed = [&]() -> double {
    if (family == Family::bernoulli) return random.chance(0.5) ? random.chance(0.5) : random.uniform();
    return family == Family::poisson ? (double)random.integer(0, random.chance(0.5) ? 2 : 20) : random.spiky();
  };
  // A bias moves them, but none to where exp is infinite and a factor of it is not.
  constexpr double kFar[] = {1e4, -1e4, 60, -60, 130, -130, 20, -20, 0};
  Buffer<A> product = filled<A>(
      n, [&] { return far && random.chance(0.3) ? random.pick(kFar) : random.spiky(); }, Guard::behind, shift());
  const std::vector<A> before = product.copy();
  const Buffer<T> bias = input<T>(outputs, spiky, Guard::behind, shift());
  const Buffer<T> own_target = input<T>(n, observed, Guard::behind, shift());
  const Buffer<A> acc_target = input<A>(n, observed, Guard::behind, shift());
  const Buffer<A> scale = input<A>(outputs, positive), row_factor = input<A>(rows, spiky);
  const Buffer<A> upstream = input<A>(n, spiky, Guard::behind, shift());
  const double factor = random.between(0.1, 2), variance = 0.3;
  const int64_t parts = rf::cuda::likelihood_parts(Format<T>::dtype, rows, outputs);
  Buffer<A> loss(n, Guard::behind, shift()), bias_sums(parts * outputs), scale_sums(parts * outputs);
  Buffer<double> loss_sums(rf::cuda::likelihood_blocks(Format<T>::dtype, rows, outputs));
  Buffer<T> gradient(n, Guard::behind, shift());
  {
    const Lent p(product), b(bias), t(own_target), a(acc_target), s(scale), w(row_factor), u(upstream), l(loss),
        g(gradient), ls(loss_sums), bs(bias_sums), ss(scale_sums);
    rf::cuda::Likelihood args = {};
    args.family = family;
    args.rows = rows;
    args.outputs = outputs;
    args.product = product.data();
    args.bias = c.bias ? bias.data() : nullptr;
    args.target = c.acc_target ? (const void*)acc_target.data() : own_target.data();
    args.target_is_acc = c.acc_target;
    args.scale = c.scale ? scale.data() : nullptr;
    args.variance = variance;
    args.full = c.full;
    args.factor = factor;
    args.row_weight = c.row_factor ? row_factor.data() : nullptr;
    args.grad = c.upstream ? upstream.data() : nullptr;
    args.loss = c.loss ? loss.data() : nullptr;
    args.loss_sums = c.loss_sums ? loss_sums.data() : nullptr;
    args.gradient = c.in_place ? (void*)product.data() : c.gradient ? gradient.data() : nullptr;
    args.bias_sums = c.bias_sums ? bias_sums.data() : nullptr;
    args.scale_sums = c.scale_sums ? scale_sums.data() : nullptr;
    rf::cuda::launch_likelihood(Format<T>::dtype, args, nullptr);
  }

  struct Total {
    double sum = 0, units = 0;
    void add(double value, double error, double terms) {
      sum += value;
      units += error + std::fabs(value) * terms;
    }
  };
  Total total;
  std::vector<Total> of_bias(outputs), of_scale(outputs);
  {
    Comparison<A> compare_loss("loss");
    Comparison<T> compare_gradient("gradient");
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < outputs; ++j) {
        const int64_t i = r * outputs + j;
        const double eta = to_double(before[i]) + (c.bias ? bias.value(j) : 0);
        const double y = c.acc_target ? acc_target.value(i) : own_target.value(i);
        const double otherwise = family == Family::gaussian ? variance : 1;
        const Expected e = expected_of(family, eta, y, c.scale ? scale.value(j) : otherwise, c.full);
        const double of_row = factor * (c.row_factor ? row_factor.value(r) : 1);
        const double of_gradient = of_row * (c.upstream ? upstream.value(i) : 1);
        const auto units = [](double size, double value, double by) {
          return std::fabs(by) * (size + 4 * std::fabs(value));
        };
        const double value = of_row * e.loss, slope = of_gradient * e.slope, derivative = of_gradient * e.variance;
        const double slope_units = units(e.slope_error, e.slope, of_gradient);
        if (c.loss) compare_loss.add(loss.result(i), value, units(e.loss_error, e.loss, of_row), i);
        if (c.gradient)
          compare_gradient.add(c.in_place ? to_double(product[i]) : gradient.result(i), slope, slope_units, i);
        total.add(value, units(e.loss_error, e.loss, of_row), 8);
        of_bias[j].add(slope, slope_units, sum_error(rows));
        of_scale[j].add(derivative, units(e.variance_error, e.variance, of_gradient), sum_error(rows));
      }
  }
  if (c.loss_sums) {
    Comparison<A> compare("loss sums");
    double sum = 0;
    for (int64_t i = 0; i < loss_sums.count(); ++i) sum += loss_sums.result(i);
    compare.add(sum, total.sum, total.units, 0);
  }
  const auto check_columns = [&](const char* what, Buffer<A>& sums, const std::vector<Total>& expected) {
    Comparison<A> compare(what);
    for (int64_t j = 0; j < outputs; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums.result(part * outputs + j);
      compare.add(sum, expected[j].sum, expected[j].units, j);
    }
  };
  if (c.bias_sums) check_columns("bias sums", bias_sums, of_bias);
  if (c.scale_sums) check_columns("scale sums", scale_sums, of_scale);
  if (!c.in_place) CHECK(product.rest_equals(before));
  CHECK(loss.rest_untouched() && gradient.rest_untouched() && loss_sums.rest_untouched() &&
        bias_sums.rest_untouched() && scale_sums.rest_untouched());
}

// One vector of outputs and several, of which the last is ragged; one part of the rows and several; a single output,
// which is a column of memory.
constexpr int64_t kShapes[][2] = {{1, 1}, {3, 8}, {5, 13}, {2, 300}, {70, 3}, {600, 1}, {130, 33}, {1100, 5}};

template <class T>
void all() {
  Random random(700 + (int)Format<T>::dtype);
  for (const Family family : kFamilies) {
    for (const auto& shape : kShapes) {
      likelihood<T>(family, shape[0], shape[1], choose(random), false, random);
      likelihood<T>(family, shape[0], shape[1], choose(random), true, random);
    }
    Choice everything = {true, true, true, true, true, true, true, true, true, true, true, false};
    likelihood<T>(family, 90, 11, everything, false, random);
    everything.in_place = true;
    likelihood<T>(family, 90, 11, everything, true, random);
    likelihood<T>(family, 90, 11, {}, false, random);
    // Of nothing, nothing is touched.
    likelihood<T>(family, 0, 5, everything, false, random);
    likelihood<T>(family, 5, 0, everything, false, random);
  }
}

// Whatever the prediction, a loss of bernoulli's is finite, and of a few units where prediction and target agree.
template <class T>
void certain() {
  using A = rf::acc_t<T>;
  describe("bernoulli %s at the largest predictions", Format<T>::name);
  const double most = Format<A>::largest;
  const double etas[] = {most, most, -most, -most, 0}, ys[] = {1, 0, 0, 1, 1};
  constexpr int64_t n = 5;
  int64_t at = 0;
  const Buffer<A> product = input<A>(n, [&] { return etas[at++]; });
  at = 0;
  const Buffer<T> target = input<T>(n, [&] { return ys[at++]; });
  Buffer<A> loss(n);
  Buffer<T> gradient(n);
  {
    const Lent p(product), t(target), l(loss), g(gradient);
    rf::cuda::Likelihood args = {};
    args.family = Family::bernoulli;
    args.rows = 1;
    args.outputs = n;
    args.product = product.data();
    args.target = target.data();
    args.factor = 1;
    args.loss = loss.data();
    args.gradient = gradient.data();
    rf::cuda::launch_likelihood(Format<T>::dtype, args, nullptr);
  }
  const double losses[] = {0, most, 0, most, std::log(2)}, slopes[] = {0, 1, 0, -1, -0.5};
  Comparison<A> of_loss("loss");
  Comparison<T> of_gradient("gradient");
  for (int64_t i = 0; i < n; ++i) {
    of_loss.add(loss.result(i), losses[i], 2 * losses[i], i);
    of_gradient.add(gradient.result(i), slopes[i], 2, i);
  }
}

}  // namespace

TEST(linear_nll) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  each_dtype([](auto element) { certain<decltype(element)>(); });
}

}  // namespace test
