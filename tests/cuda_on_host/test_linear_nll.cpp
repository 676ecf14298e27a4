// Likelihoods of linear models with their gradients on CUDA, against double precision.
#include <cmath>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "device_memory.h"
#include "linear_nll_cases.h"

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

struct Cuda {
  using Memory = LentMemory;
  template <class T>
  using Observed = rf::acc_t<T>;
  static constexpr bool kFactorOfLosses = true;
  static constexpr double kVariance = 0.3;  // of all outputs, where they have none of their own

  static double scale(Family, Random& random) { return 0.1 + 3 * random.uniform(); }
  static double total_units(int64_t) { return 8; }
  template <class Test>
  static Expected expected(const Test& t, int64_t j, double eta, double y) {
    const double otherwise = t.c.family == Family::gaussian ? kVariance : 1;
    return expected_of(t.c.family, eta, y, t.c.scale ? t.scale.value(j) : otherwise, t.c.constants);
  }
  template <class Test>
  static LikelihoodResults run(Test& t) {
    const rf::DType dtype = Format<typename Test::Element>::dtype;
    const int64_t outputs = t.c.outputs, parts = rf::cuda::likelihood_parts(dtype, t.c.rows, outputs);
    Buffer<double> loss_sums(rf::cuda::likelihood_blocks(dtype, t.c.rows, outputs));
    Buffer<typename Test::A> bias_sums(parts * outputs), scale_sums(parts * outputs);
    {
      const Lent lent[] = {Lent(loss_sums), Lent(bias_sums), Lent(scale_sums)};
      rf::cuda::Likelihood args = {};
      static_cast<rf::LikelihoodProblem&>(args) = t.problem();
      args.rows = t.c.rows;
      args.product = t.predictions.data();
      args.bias = t.c.bias ? t.bias.data() : nullptr;
      args.target_is_acc = t.c.observed_target;
      args.scale = t.c.scale ? t.scale.data() : nullptr;
      args.variance = kVariance;
      args.full = t.c.constants;
      args.factor = t.c.factor;
      args.loss_sums = t.c.total ? loss_sums.data() : nullptr;
      if (t.c.slopes) args.gradient = t.c.in_place ? (void*)t.predictions.data() : t.slopes.data();
      args.bias_sums = t.c.bias_sums ? bias_sums.data() : nullptr;
      args.scale_sums = t.c.variance_sums ? scale_sums.data() : nullptr;
      rf::cuda::launch_likelihood(dtype, args, nullptr);
    }
    LikelihoodResults results = {0, std::vector<double>(outputs), std::vector<double>(outputs)};
    for (int64_t i = 0; i < loss_sums.count() && t.c.total; ++i) results.total += loss_sums.result(i);
    for (int64_t i = 0; i < parts * outputs; ++i) {
      if (t.c.bias_sums) results.bias[i % outputs] += bias_sums.result(i);
      if (t.c.variance_sums) results.variance[i % outputs] += scale_sums.result(i);
    }
    CHECK(loss_sums.rest_untouched() && bias_sums.rest_untouched() && scale_sums.rest_untouched());
    return results;
  }
};

LikelihoodCase random_case(Family family, int64_t rows, int64_t outputs, bool far, Random& random) {
  const auto maybe = [&] { return random.chance(0.5); };
  return {.family = family,
          .rows = rows,
          .outputs = outputs,
          .bias = maybe(),
          .observed_target = maybe(),
          .scale = maybe(),
          .constants = maybe(),
          .row_weight = maybe(),
          .upstream = maybe(),
          .losses = maybe(),
          .total = maybe(),
          .slopes = maybe(),
          .bias_sums = maybe(),
          .variance_sums = maybe(),
          .in_place = maybe(),
          .far = far,
          .factor = random.between(0.1, 2)};
}

template <class T>
void likelihood(LikelihoodCase c, Random& random) {
  if (c.family != Family::gaussian) c.variance_sums = false;
  if (c.far && c.family == Family::poisson) c.total = c.bias_sums = false;
  c.in_place = c.in_place && c.slopes && std::is_same_v<T, rf::acc_t<T>>;
  LikelihoodTest<Cuda, T>(c, random).run();
}

// One vector of outputs and several, of which the last is ragged; one part of the rows and several; a single output,
// which is a column of memory.
constexpr int64_t kShapes[][2] = {{1, 1}, {3, 8}, {5, 13}, {2, 300}, {70, 3}, {600, 1}, {130, 33}, {1100, 5}};

template <class T>
void all() {
  Random random(700 + (int)Format<T>::dtype);
  for (const Family family : kFamilies) {
    for (const auto& [rows, outputs] : kShapes)
      for (const bool far : {false, true}) likelihood<T>(random_case(family, rows, outputs, far, random), random);
    LikelihoodCase nothing = {};
    nothing.family = family;
    nothing.rows = 90;
    nothing.outputs = 11;
    likelihood<T>(nothing, random);
    LikelihoodCase everything = nothing;
    everything.bias = everything.observed_target = everything.scale = everything.constants = true;
    everything.row_weight = everything.upstream = everything.losses = everything.total = true;
    everything.slopes = everything.bias_sums = everything.variance_sums = true;
    everything.factor = 0.7;
    likelihood<T>(everything, random);
    everything.in_place = everything.far = true;
    likelihood<T>(everything, random);
    // Of nothing, nothing is touched.
    for (const auto& [rows, outputs] : {std::pair(0, 5), std::pair(5, 0)}) {
      everything.rows = rows;
      everything.outputs = outputs;
      likelihood<T>(everything, random);
    }
  }
}

}  // namespace

TEST(linear_nll) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  far_predictions<Cuda, float>();
  far_predictions<Cuda, double>();
}

}  // namespace test
