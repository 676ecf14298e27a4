// What is tested of likelihoods on every device, whose files say which sizes their kernels tell apart. Device has
//   Memory            which is told of the buffers that a call may read or write (memory.h)
//   Observed<T>       the type of upstream gradients and losses; targets have it or T
//   scale(family)     what it may be given for one; expected(test, j, eta, y): what scale and constants mean to it
//   kFactorOfLosses   whether the factor of gradients is that of losses too
//   total_units(n)    how much the sum of all losses may err
//   run(test)         the call, which gives back its sums in double precision
#pragma once
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "linear_nll_reference.h"
#include "shared/problems.h"

namespace test {

// What is given to the kernel and what is wanted of it.
struct LikelihoodCase {
  Family family;
  int64_t rows, outputs;
  bool bias, observed_target, scale, constants, row_weight, upstream;  // given
  bool losses, total, slopes, bias_sums, variance_sums;                // wanted
  bool in_place;  // slopes replace predictions, and have their type
  bool far;       // predictions of every size, of which only single losses may be infinite
  double factor;  // of gradients
};

struct LikelihoodResults {
  double total = 0;
  std::vector<double> bias, variance;  // of each output
};

// Sums over rows and what bounds their errors.
struct SumOfTerms {
  double value = 0, size = 0, error = 0;
  void add(double x, double e) {
    value += x;
    size += std::fabs(x);
    error += e;
  }
  double units(double of_sum) const { return error + size * of_sum; }
};

inline double observation(Family family, Random& random) {
  if (family == Family::bernoulli) return random.chance(0.5) ? random.chance(0.5) : random.uniform();
  if (family == Family::poisson) return (double)random.integer(0, random.chance(0.5) ? 2 : 20);
  return random.spiky();
}

template <class Device, class T>
struct LikelihoodTest {
  using Element = T;
  using A = rf::acc_t<T>;
  using S = typename Device::template Observed<T>;
  const LikelihoodCase c;
  const int64_t n;
  const Guard guard;
  Buffer<A> predictions;
  const std::vector<A> before;
  const Buffer<T> bias;
  Buffer<T> target;
  const Buffer<S> observed_target, upstream;
  const Buffer<A> scale, constant, row_weight;
  Buffer<S> losses;
  Buffer<T> slopes;

  LikelihoodTest(const LikelihoodCase& of, Random& random)
      : c(of),
        n(c.rows * c.outputs),
        guard(random.chance(0.6) ? Guard::behind : Guard::before),
        predictions(filled<A>(
            n, [&] { return prediction(random); }, guard, random.integer(0, 3))),
        before(predictions.copy()),
        bias(input<T>(
            c.outputs, [&] { return random.spiky(); }, guard, random.integer(0, 3))),
        target(filled<T>(
            n, [&] { return observation(c.family, random); }, guard, random.integer(0, 3))),
        observed_target(input<S>(
            n, [&] { return observation(c.family, random); }, guard, random.integer(0, 3))),
        upstream(input<S>(
            n, [&] { return random.spiky(); }, guard, random.integer(0, 3))),
        scale(input<A>(
            c.outputs, [&] { return Device::scale(c.family, random); }, guard)),
        constant(input<A>(
            c.outputs, [&] { return random.spiky(); }, guard)),
        row_weight(input<A>(
            c.rows, [&] { return random.spiky(); }, guard)),
        losses(n, guard, random.integer(0, 3)),
        slopes(n, guard, random.integer(0, 3)) {
    describe(
        "%s %s %lld x %lld bias=%d observed_target=%d scale=%d constants=%d row_weight=%d upstream=%d loss=%d%d "
        "slope=%d%d%d in_place=%d far=%d",
        rf::kFamilyNames[(int)c.family], Format<T>::name, (long long)c.rows, (long long)c.outputs, c.bias,
        c.observed_target, c.scale, c.constants, c.row_weight, c.upstream, c.losses, c.total, c.slopes, c.bias_sums,
        c.variance_sums, c.in_place, c.far);
  }

  rf::LikelihoodProblem problem() {
    return {c.family,
            c.outputs,
            c.observed_target ? (const void*)observed_target.data() : target.data(),
            c.row_weight ? row_weight.data() : nullptr,
            c.upstream ? upstream.data() : nullptr,
            c.losses ? losses.data() : nullptr};
  }

  LikelihoodResults call() {
    typename Device::Memory memory;
    memory.read(bias, std::as_const(target), observed_target, upstream, scale, constant, row_weight);
    memory.write(predictions, losses, slopes);
    return Device::run(*this);
  }

  void run() {
    const LikelihoodResults sums = call();
    SumOfTerms total;
    std::vector<SumOfTerms> of_bias(c.outputs), of_variance(c.outputs);
    {
      Comparison<S> of_losses("losses");
      Comparison<T> of_slopes("slopes");
      Comparison<A> in_place("slopes in place");
      for (int64_t r = 0; r < c.rows; ++r)
        for (int64_t j = 0; j < c.outputs; ++j) {
          const int64_t i = r * c.outputs + j;
          const double eta = to_double(before[i]) + (c.bias ? bias.value(j) : 0);
          const double y = c.observed_target ? observed_target.value(i) : target.value(i);
          const Expected e = Device::expected(*this, j, eta, y);
          const double weight = c.row_weight ? row_weight.value(r) : 1;
          const double of_loss = weight * (Device::kFactorOfLosses ? c.factor : 1);
          const double of_slope = weight * c.factor * (c.upstream ? upstream.value(i) : 1);
          const auto units = [](double error, double value, double by) {
            return std::fabs(by) * (error + 4 * std::fabs(value));
          };
          const double loss_units = units(e.loss_error, e.loss, of_loss);
          const double slope_units = units(e.slope_error, e.slope, of_slope);
          if (c.losses) of_losses.add(losses.result(i), of_loss * e.loss, loss_units, i);
          if (c.slopes && c.in_place) in_place.add(predictions.result(i), of_slope * e.slope, slope_units, i);
          if (c.slopes && !c.in_place) of_slopes.add(slopes.result(i), of_slope * e.slope, slope_units, i);
          total.add(of_loss * e.loss, loss_units);
          of_bias[j].add(of_slope * e.slope, slope_units);
          of_variance[j].add(of_slope * e.variance, units(e.variance_error, e.variance, of_slope));
        }
    }
    if (c.total) {
      Comparison<A> compare("total");
      compare.add(sums.total, total.value, total.units(Device::total_units(n)), 0);
    }
    const auto check_columns = [&](const char* what, const std::vector<double>& got,
                                   const std::vector<SumOfTerms>& expected) {
      Comparison<A> compare(what);
      for (int64_t j = 0; j < c.outputs; ++j)
        compare.add(got[j], expected[j].value, expected[j].units(long_sum_error(c.rows)), j);
    };
    if (c.bias_sums) check_columns("bias sums", sums.bias, of_bias);
    if (c.variance_sums) check_columns("variance sums", sums.variance, of_variance);
    CHECK(predictions.rest_equals(before) && losses.rest_untouched() && slopes.rest_untouched());
  }

 private:
  // A bias moves those far off, but none to where exp is infinite and a factor of it is not.
  double prediction(Random& random) const {
    constexpr double kFar[] = {1e4, -1e4, 60, -60, 130, -130, 20, -20, 0};
    return c.far && random.chance(0.3) ? random.pick(kFar) : random.spiky();
  }
};

// Far from zero losses and slopes are finite, and in both tails as precise as near it; the largest are such that
// neither a loss nor the bound of its error leaves the range.
template <class Device, class T>
void far_predictions() {
  Random random(910);
  const double far[] = {0.0, 1e-30, 5.0, 50.0, 80.0, 1e4, Format<T>::largest / 32};
  LikelihoodCase c = {};
  c.family = Family::bernoulli;
  c.rows = 1;
  c.outputs = 4 * (int64_t)std::size(far);
  c.scale = c.losses = c.slopes = c.in_place = true;
  c.factor = 1;
  LikelihoodTest<Device, T> test(c, random);
  for (int64_t i = 0; i < c.outputs; ++i) {
    test.predictions[i] = (T)(far[i / 4] * (i & 1 ? -1 : 1));
    test.target[i] = (T)(i >> 1 & 1);
  }
  const std::vector<T> etas = test.predictions.copy();
  test.call();
  for (int64_t i = 0; i < c.outputs; ++i) {
    const Expected e = Device::expected(test, i, etas[i], test.target.value(i));
    // exp gives 0 instead of subnormal numbers.
    const double least = std::numeric_limits<T>::min(), unit = kUnit<T>;
    CHECK(std::fabs(test.losses.value(i) - e.loss) <= unit * e.loss_error + least);
    CHECK(std::fabs(test.predictions.value(i) - e.slope) <= unit * e.slope_error + least);
  }
}

}  // namespace test
