// Likelihoods of predictions on the CPU, and linear models with few outputs in one pass, against double precision.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "linear_nll_cases.h"

namespace test {
namespace {

template <class S>
struct Observations {  // what one pass is given besides operands
  using A = rf::acc_t<S>;
  Family family;
  int64_t rows, outputs;
  Buffer<S> target, grad;
  Buffer<A> scale, constant, row_weight;
  bool constants, weights, grads;
  double grad_scale = 0.625;

  Observations(Family f, int64_t m, int64_t n, Random& random, Guard guard)
      : family(f),
        rows(m),
        outputs(n),
        target(input<S>(
            m * n,
            [&] {
              return f == Family::bernoulli ? random.uniform()
                     : f == Family::poisson ? random.integer(0, 9)
                                            : random.spiky();
            },
            guard)),
        grad(input<S>(
            m * n, [&] { return random.spiky(); }, guard)),
        scale(input<A>(
            n, [&] { return f == Family::squared ? 2.0 : random.between(0.25, 4); }, guard)),
        constant(input<A>(
            n, [&] { return random.spiky(); }, guard)),
        row_weight(input<A>(
            m, [&] { return random.uniform(); }, guard)),
        constants(f == Family::gaussian && random.chance(0.7)),
        weights(random.chance(0.5)),
        grads(random.chance(0.5)) {}

  rf::LikelihoodArgs args(void* loss) const {
    rf::LikelihoodArgs a = {};
    a.family = family;
    a.outputs = outputs;
    a.target = target.data();
    a.row_weight = weights ? row_weight.data() : nullptr;
    a.grad = grads ? grad.data() : nullptr;
    a.loss = loss;
    a.output_factor = scale.data();
    a.constant = constants ? constant.data() : nullptr;
    a.grad_scale = grad_scale;
    return a;
  }
  double weight(int64_t r) const { return weights ? row_weight.value(r) : 1; }
  double upstream(int64_t r, int64_t j) const {
    return weight(r) * grad_scale * (grads ? grad.value(r * outputs + j) : 1);
  }
  Expected at(int64_t r, int64_t j, double eta, double eta_error) const {
    return expect(family, eta, target.value(r * outputs + j), scale.value(j), constants ? constant.value(j) : 0,
                  eta_error, 0);
  }
};

struct Cpu {
  using Memory = AnyMemory;
  template <class T>
  using Observed = T;
  static constexpr bool kFactorOfLosses = false;

  // 1 / variance of a gaussian, 2 of squared.
  static double scale(Family family, Random& random) { return family == Family::squared ? 2 : random.between(0.25, 4); }
  static double total_units(int64_t terms) { return long_sum_error(terms); }
  template <class Test>
  static Expected expected(const Test& t, int64_t j, double eta, double y) {
    return expect(t.c.family, eta, y, t.scale.value(j), t.c.constants ? t.constant.value(j) : 0, 0, 0);
  }
  template <class Test>
  static LikelihoodResults run(Test& t) {
    Buffer<typename Test::A> bias(t.c.outputs, t.guard), variance(t.c.outputs, t.guard);
    const rf::LikelihoodArgs args = {t.problem(), t.scale.data(), t.c.constants ? t.constant.data() : nullptr,
                                     t.c.factor};
    LikelihoodResults results;
    results.total = rf::likelihood(Format<typename Test::S>::dtype, args, t.predictions.data(), t.c.rows,
                                   {t.c.losses || t.c.total, t.c.slopes, t.c.bias_sums ? bias.data() : nullptr,
                                    t.c.variance_sums ? variance.data() : nullptr, 0});
    for (int64_t j = 0; j < t.c.outputs; ++j) {
      if (t.c.bias_sums) results.bias.push_back(bias.result(j));
      if (t.c.variance_sums) results.variance.push_back(variance.result(j));
    }
    CHECK(bias.rest_untouched() && variance.rest_untouched());
    return results;
  }
};

template <class T>
void rows_of_predictions(Family family, int64_t rows, int64_t outputs, bool far, Random& random) {
  for (const bool losses : {true, false})
    for (const bool slopes : {true, false}) {
      const bool finite = !(far && family == Family::poisson);  // what is summed up
      const LikelihoodCase c = {.family = family,
                                .rows = rows,
                                .outputs = outputs,
                                .bias = false,
                                .observed_target = false,
                                .scale = true,
                                .constants = family == Family::gaussian && random.chance(0.7),
                                .row_weight = random.chance(0.5),
                                .upstream = random.chance(0.5),
                                .losses = losses,
                                .total = losses && finite,
                                .slopes = slopes,
                                .bias_sums = slopes && finite && random.chance(0.7),
                                .variance_sums = slopes && family == Family::gaussian && random.chance(0.7),
                                .in_place = slopes,
                                .far = far,
                                .factor = 0.625};
      if (losses || slopes) LikelihoodTest<Cpu, T>(c, random).run();
    }
}

// x's rows with a gap of NaN between them where padded.
template <class T>
void one_pass(Family family, int64_t rows, int64_t features, int64_t outputs, Random& random) {
  using A = rf::acc_t<T>;
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  const int64_t stride = features + (random.chance(0.3) ? random.integer(1, 9) : 0);
  const bool has_bias = random.chance(0.7), wide = random.chance(0.5);
  describe("few_outputs %s %s %lld x %lld -> %lld, rows %lld apart", rf::kFamilyNames[(int)family], Format<T>::name,
           (long long)rows, (long long)features, (long long)outputs, (long long)stride);
  const Observations<A> seen(family, rows, outputs, random, guard);
  int64_t at = 0;
  const int64_t cells = rows > 0 ? (rows - 1) * stride + features : 0;
  const Buffer<T> x = input<T>(cells, [&] { return at++ % stride < features ? random.spiky() : kNaN; }, guard);
  const double most = family == Family::poisson ? 0.25 : 1;  // exp of the prediction is finite
  const double size = most / std::sqrt(std::fmax(1, (double)features));
  const Buffer<T> w = input<T>(outputs * features, [&] { return size * random.spiky(); }, guard);
  const Buffer<A> b = input<A>(outputs, [&] { return random.spiky(); }, guard);
  Buffer<A> each(rows * outputs, guard), dw(outputs * features, guard), db(outputs, guard), dv(outputs, guard);
  Buffer<A> wide_dx(rows * features, guard);
  Buffer<T> dx(rows * features, guard);
  rf::FewOutputsArgs args = {.x = x.data(),
                             .x_stride = stride,
                             .features = features,
                             .x_is_far = false,
                             .weight = w.data(),
                             .bias = has_bias ? b.data() : nullptr,
                             .likelihood = seen.args(each.data()),
                             .grad_weight = dw.data(),
                             .grad_x = wide ? (void*)wide_dx.data() : dx.data(),
                             .wide_grad_x = wide};
  const double total = rf::few_outputs(Format<T>::dtype, args, rows,
                                       {true, true, db.data(), family == Family::gaussian ? dv.data() : nullptr, 0});

  Comparison<A> of_each("each"), of_dw("dw"), of_db("db"), of_dv("dv"), of_wide("wide dx");
  Comparison<T> of_dx("dx");
  std::vector<SumOfTerms> weights(outputs * features), biases(outputs), variances(outputs);
  SumOfTerms loss;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<SumOfTerms> inputs(features);
    for (int64_t j = 0; j < outputs; ++j) {
      SumOfTerms eta;
      for (int64_t c = 0; c < features; ++c) eta.add(x.value(r * stride + c) * w.value(j * features + c), 0);
      if (has_bias) eta.add(b.value(j), 0);
      const Expected e = seen.at(r, j, eta.value, eta.units(long_sum_error(features)));
      const double share = seen.weight(r), up = seen.upstream(r, j), d = up * e.slope;
      const double d_error = std::fabs(up) * e.slope_error;
      of_each.add(each.result(r * outputs + j), share * e.loss, share * e.loss_error, r * outputs + j);
      loss.add(share * e.loss, share * e.loss_error);
      biases[j].add(d, d_error);
      variances[j].add(up * e.variance, 4 * std::fabs(up) * seen.scale.value(j) * (1 + e.loss_error));
      for (int64_t c = 0; c < features; ++c) {
        const double xc = x.value(r * stride + c), wc = w.value(j * features + c);
        weights[j * features + c].add(d * xc, d_error * std::fabs(xc));
        inputs[c].add(d * wc, d_error * std::fabs(wc));
      }
    }
    for (int64_t c = 0; c < features; ++c) {
      const int64_t i = r * features + c;
      wide ? of_wide.add(wide_dx.result(i), inputs[c].value, inputs[c].units(long_sum_error(outputs)), i)
           : of_dx.add(dx.result(i), inputs[c].value, inputs[c].units(long_sum_error(outputs)), i);
    }
  }
  for (int64_t i = 0; i < outputs * features; ++i)
    of_dw.add(dw.result(i), weights[i].value, weights[i].units(long_sum_error(rows)), i);
  for (int64_t j = 0; j < outputs; ++j) {
    of_db.add(db.result(j), biases[j].value, biases[j].units(long_sum_error(rows)), j);
    if (family == Family::gaussian)
      of_dv.add(dv.result(j), variances[j].value, variances[j].units(long_sum_error(rows)), j);
  }
  CHECK(std::fabs(total - loss.value) <= kUnit<A> * loss.units(long_sum_error(rows * outputs)));
  CHECK(each.rest_untouched() && dw.rest_untouched() && db.rest_untouched() && dv.rest_untouched());
  CHECK(wide ? wide_dx.rest_untouched() : dx.rest_untouched());

  // Nothing but the losses, and nothing but the gradients, have the same bits.
  Buffer<A> alone(rows * outputs, guard), dw_alone(outputs * features, guard);
  args.likelihood.loss = alone.data();
  args.grad_weight = args.grad_x = nullptr;
  CHECK(rf::few_outputs(Format<T>::dtype, args, rows, {true, false, nullptr, nullptr, 0}) == total);
  args.likelihood.loss = nullptr;
  args.grad_weight = dw_alone.data();
  rf::few_outputs(Format<T>::dtype, args, rows, {false, true, nullptr, nullptr, 0});
  CHECK(!std::memcmp(alone.data(), each.data(), rows * outputs * sizeof(A)));
  CHECK(!std::memcmp(dw_alone.data(), dw.data(), outputs * features * sizeof(A)));
}

template <class T>
void any_number_of_threads() {
  describe("few_outputs %s: the same bits with any number of threads", Format<T>::name);
  using A = rf::acc_t<T>;
  Random random(9);
  for (const int64_t features : {3, 40}) {
    const int64_t rows = 20011, outputs = 3;
    const Observations<A> seen(Family::gaussian, rows, outputs, random, Guard::behind);
    const Buffer<T> x = input<T>(rows * features, [&] { return random.spiky(); });
    const Buffer<T> w = input<T>(outputs * features, [&] { return random.spiky(); });
    std::vector<std::vector<A>> results;
    for (int64_t t : {1, 2, 3, 7}) {
      threads = t;
      std::vector<A> sums(outputs * (features + 2) + 1);
      A* db = sums.data() + outputs * features;
      const double total = rf::few_outputs(Format<T>::dtype,
                                           {.x = x.data(),
                                            .x_stride = features,
                                            .features = features,
                                            .x_is_far = false,
                                            .weight = w.data(),
                                            .bias = nullptr,
                                            .likelihood = seen.args(nullptr),
                                            .grad_weight = sums.data(),
                                            .grad_x = nullptr,
                                            .wide_grad_x = false},
                                           rows, {true, true, db, db + outputs, 0});
      sums.back() = (A)total;
      results.push_back(sums);
    }
    threads = 2;
    for (const auto& r : results) CHECK(!std::memcmp(r.data(), results[0].data(), r.size() * sizeof(A)));
  }
}

template <class T>
void all() {
  Random random(900 + (int)Format<T>::dtype);
  for (const Family family : kFamilies) {
    for (const int64_t rows : {0, 1, 31, 70})
      for (const int64_t outputs : {1, 7, 16, 33, 300})
        rows_of_predictions<T>(family, rows, outputs, random.chance(0.3), random);
    // Features around a vector and half of one, several register tiles of columns, and none; rows around a vector, a
    // block of 32, and more than one partial sum.
    for (const int64_t features : {0, 1, 2, 4, 5, 8, 9, 15, 16, 17, 40, 67, 130})
      for (const int64_t outputs : {1, 2, 3, 4, 5, 8})
        one_pass<T>(family, random.pick({1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 75}), features, outputs, random);
    one_pass<T>(family, 0, 5, 2, random);
    if (!quick) {
      one_pass<T>(family, 9001, 7, 2, random);
      one_pass<T>(family, 20011, 130, 3, random);  // read from memory
    }
  }
  any_number_of_threads<T>();
}

}  // namespace

TEST(linear_nll) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  each_dtype([](auto element) {
    if constexpr (std::is_floating_point_v<decltype(element)>) far_predictions<Cpu, decltype(element)>();
  });
}

}  // namespace test
