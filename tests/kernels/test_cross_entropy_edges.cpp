// Cross-entropy where formulas end: infinite and NaN logits, huge logits, rows that are ignored, classes out of range,
// every alignment of streaming stores, any number of threads. And the reference itself, against finite differences.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cross_entropy_reference.h"
#include "layouts.h"

namespace test {
namespace {

// Adjacent rows with class indices, all outputs, and the gradient. `plain`: without the outputs that an ordinary
// training step has no use for, entropy and argmax; kernels treat that case specially.
template <class T>
struct Simple {
  using A = rf::acc_t<T>;
  RowShape shape;
  Rows<T> x;
  Buffer<int64_t> target, argmax;
  Buffer<A> max, log_sum, entropy, loss, lse, logprob, ones;
  rf::CrossEntropyPartial sums = {};
  bool plain = false;

  Simple(int64_t rows, int64_t classes, Guard guard = Guard::behind, int64_t shift = 0)
      : shape{rows, 1, classes},
        x(shape, Arrangement::rows, guard, shift),
        target(rows),
        argmax(rows),
        max(rows),
        log_sum(rows),
        entropy(rows),
        loss(rows),
        lse(rows),
        logprob(rows),
        ones(rows) {
    for (int64_t r = 0; r < rows; ++r) {
      target[r] = r % classes;
      ones[r] = 1;
    }
  }
  template <class F>
  void fill(F&& f) {
    for (int64_t i = 0; i < x.memory.count(); ++i) x.memory[i] = from_double<T>(f(i));
  }
  rf::CrossEntropyArgs arguments(double softcap = 0) {
    rf::CrossEntropyArgs a = {};
    a.logits = x.memory.data();
    a.layout = x.layout;
    a.classes = shape.classes;
    a.target = target.data();
    a.class_weight_sum = (double)a.classes;
    a.ignore_index = -100;
    a.softcap = softcap;
    a.logit_scale = 1;
    a.row_max = max.data();
    a.row_log_sum = log_sum.data();
    a.row_entropy = plain ? nullptr : entropy.data();
    return a;
  }
  void forward(double softcap = 0) {
    sums = rf::cross_entropy_forward(Format<T>::dtype, arguments(softcap),
                                     {loss.data(), lse.data(), logprob.data(), plain ? nullptr : argmax.data()},
                                     shape.rows());
  }
  void backward(Rows<T>& dx, double softcap = 0, bool stream = false, bool through_entropy = false) {
    rf::CrossEntropyGrads g = {};
    g.loss = ones.data();
    g.loss_stride = 1;
    g.loss_scale = 1;
    g.entropy = through_entropy ? ones.data() : nullptr;
    g.grad_logits = dx.memory.data();
    g.grad_layout = dx.layout;
    g.stream = stream;
    rf::cross_entropy_backward(Format<T>::dtype, arguments(softcap), g, shape.rows());
  }
  // An upstream gradient of lse alone.
  void backward_of_lse(Rows<T>& dx) {
    rf::CrossEntropyGrads g = {};
    g.lse = ones.data();
    g.grad_logits = dx.memory.data();
    g.grad_layout = dx.layout;
    rf::cross_entropy_backward(Format<T>::dtype, arguments(), g, shape.rows());
  }
};

void reference_against_differences() {
  describe("the reference's gradient against finite differences");
  Random random(4);
  for (int i = 0; i < 50; ++i) {
    Options o;
    o.smoothing = i & 1 ? 0.1 : 0;
    o.z_loss = i & 2 ? 0.05 : 0;
    o.softcap = i & 4 ? 5 : 0;
    o.logit_scale = i & 8 ? 0.7 : 1;
    Row r;
    for (int j = 0; j < 5; ++j) {
      r.x.push_back(3 * random.spiky());
      r.w.push_back(random.between(0.3, 2));
      r.t.push_back(random.uniform());
    }
    if (i & 16) {
      r.target = 2;
      r.t = {0, 0, 1, 0, 0};
    }
    const Upstream up = {random.spiky(), random.spiky(), random.spiky(), random.spiky()};
    const auto value = [&](const Row& at) {
      const Result f = cross_entropy_row(at, o);
      return up.loss * f.loss + up.lse * f.lse + up.entropy * f.entropy + up.logprob * f.logprob;
    };
    const Gradient g = cross_entropy_gradient(r, o, cross_entropy_row(r, o), up);
    for (size_t j = 0; j < 5; ++j) {
      constexpr double h = 1e-5;
      const auto difference = [&](std::vector<double> Row::* member) {
        Row above = r, below = r;
        (above.*member)[j] += h;
        (below.*member)[j] -= h;
        return (value(above) - value(below)) / (2 * h);
      };
      CHECK(std::fabs(difference(&Row::x) - g.x[j]) < 1e-7 * (1 + std::fabs(g.x[j])) * 10);
      if (r.target < 0) CHECK(std::fabs(difference(&Row::t) - g.t[j]) < 1e-7 * (1 + std::fabs(g.t[j])) * 10);
    }
  }
}

template <class T>
void infinite_and_nan_logits(int64_t classes, int64_t at, bool plain) {
  describe("cross_entropy %s: special logits at %lld of %lld, plain=%d", Format<T>::name, (long long)at,
           (long long)classes, plain);
  const int64_t other = at == 0 ? classes - 1 : 0;
  const auto ordinary = [](int64_t i) { return 0.25 * (double)(i % 7); };
  Simple<T> s(1, classes);
  s.plain = plain;
  Rows<T> dx(s.shape, Arrangement::rows, Guard::behind);

  // A class of probability zero: everything stays finite, its gradient is zero.
  s.fill([&](int64_t i) { return i == at ? -kInfinity : ordinary(i); });
  s.target[0] = other;
  s.forward();
  CHECK(std::isfinite(s.loss.value(0)) && std::isfinite(s.lse.value(0)) &&
        (plain || std::isfinite(s.entropy.value(0))));
  for (bool through_entropy : {false, true}) {
    s.backward(dx, 0, false, through_entropy && !plain);
    bool finite = true;
    for (int64_t j = 0; j < classes; ++j) finite = finite && std::isfinite(dx.value(0, j));
    CHECK(finite && dx.value(0, at) == 0);
  }
  // The same class as the target: an infinite loss.
  s.target[0] = at;
  s.forward();
  CHECK(s.loss.value(0) == kInfinity && s.logprob.value(0) == -kInfinity && s.sums.loss == kInfinity);

  // NaN, wherever it is, reaches every output; it counts as the maximum. An infinite logit has no softmax.
  for (double special : {kNaN, kInfinity}) {
    s.fill([&](int64_t i) { return i == at ? special : ordinary(i); });
    s.target[0] = other;
    s.forward();
    CHECK(std::isnan(s.loss.value(0)) && std::isnan(s.logprob.value(0)));
    CHECK(std::isnan(s.sums.loss));
    CHECK(special == kInfinity ? s.lse.value(0) == kInfinity : std::isnan(s.lse.value(0)));
    CHECK(plain || (std::isnan(s.entropy.value(0)) && s.argmax.data()[0] == at));
    s.backward(dx);
    bool all_nan = true;
    for (int64_t j = 0; j < classes; ++j) all_nan = all_nan && std::isnan(dx.value(0, j));
    CHECK(all_nan);
    // exp(z - lse) is 0 beside an infinite logit.
    s.backward_of_lse(dx);
    bool as_exp = true;
    for (int64_t j = 0; j < classes; ++j)
      as_exp = as_exp && (special == kInfinity && j != at ? dx.value(0, j) == 0 : std::isnan(dx.value(0, j)));
    CHECK(as_exp);
    // A NaN counts for more than infinities, before or behind it.
    s.fill([&](int64_t i) { return i == at ? kNaN : i == other ? kInfinity : ordinary(i); });
    s.forward();
    CHECK(std::isnan(s.lse.value(0)) && (plain || s.argmax.data()[0] == at));
    s.backward_of_lse(dx);
    all_nan = true;
    for (int64_t j = 0; j < classes; ++j) all_nan = all_nan && std::isnan(dx.value(0, j));
    CHECK(all_nan);
  }
  // A soft cap makes infinite logits finite.
  s.fill([&](int64_t i) { return i == at ? kInfinity : i == other ? -kInfinity : ordinary(i); });
  s.forward(10);
  CHECK(std::isfinite(s.loss.value(0)) && std::fabs(s.max.value(0) - 10) < 1e-5);
  s.backward(dx, 10);
  CHECK(dx.value(0, at) == 0 && dx.value(0, other) == 0);
}

template <class T>
void nothing_but_minus_infinity(int64_t classes, bool plain) {
  describe("cross_entropy %s: a row of -inf, plain=%d", Format<T>::name, plain);
  Simple<T> s(3, classes);
  s.plain = plain;
  s.fill([](int64_t) { return -kInfinity; });
  s.forward();
  CHECK(std::isnan(s.loss.value(0)) && std::isnan(s.logprob.value(0)));  // as in PyTorch
  CHECK(s.lse.value(0) == -kInfinity && (plain || s.argmax.data()[0] == 0));
}

// The logarithm keeps its digits next to a large maximum.
template <class T>
void huge_logits(bool plain) {
  describe("cross_entropy %s: huge logits, plain=%d", Format<T>::name, plain);
  const double big = std::is_same_v<T, f16> ? 60000 : 0x1p100;
  Simple<T> s(1, 20);
  s.plain = plain;
  s.fill([&](int64_t) { return big; });
  s.forward();
  CHECK(std::fabs(s.loss.value(0) - std::log(20.0)) < 1e-6);
  s.fill([&](int64_t i) { return i == 0 ? big : -big; });
  s.forward();
  CHECK(s.loss.value(0) == 0 && (plain || s.entropy.value(0) == 0) && s.lse.value(0) == rounded<T>(big));
  Rows<T> dx(s.shape, Arrangement::rows, Guard::behind);
  s.backward(dx, 0, false, !plain);
  for (int64_t j = 0; j < 20; ++j) CHECK(dx.value(0, j) == 0);
}

template <class T>
void ignored_rows(int64_t classes, bool plain) {
  describe("cross_entropy %s: all rows ignored, plain=%d", Format<T>::name, plain);
  Simple<T> s(70, classes);
  s.plain = plain;
  s.fill([](int64_t i) { return i % 5 ? 0.5 * (double)(i % 11) : kInfinity; });
  for (int64_t r = 0; r < 70; ++r) s.target[r] = -100;
  s.forward();
  CHECK(s.sums.loss == 0 && s.sums.weight == 0 && s.sums.bad_row == -1);
  Rows<T> dx(s.shape, Arrangement::rows, Guard::behind);
  s.backward(dx);
  bool zero = true;
  for (int64_t r = 0; r < 70; ++r)
    for (int64_t j = 0; j < classes; ++j)
      zero = zero && s.loss.value(r) == 0 && s.logprob.value(r) == 0 && dx.result(r, j) == 0;
  CHECK(zero);
  CHECK(dx.memory.rest_untouched());
}

template <class T>
void classes_out_of_range() {
  describe("cross_entropy %s: classes out of range", Format<T>::name);
  constexpr int64_t rows = 5000, classes = 10;
  for (int64_t wrong : {classes, int64_t(-1), int64_t(1) << 62, std::numeric_limits<int64_t>::min()})
    for (int64_t at : {int64_t(0), int64_t(1500), rows - 1}) {
      Simple<T> s(rows, classes);
      s.fill([](int64_t i) { return (double)(i % 3); });
      s.target[at] = wrong;
      s.target[rows - 1] = wrong;
      s.forward();
      CHECK(s.sums.bad_row == at);
    }
}

// Non-temporal stores want alignment, which rows do not have.
template <class T>
void streaming() {
  Random random(5);
  for (int64_t classes : {1, 3, 16, 17, 40, 100})
    for (int64_t shift = 0; shift < 64 / (int64_t)sizeof(T); ++shift)
      for (Guard guard : {Guard::behind, Guard::before}) {
        describe("cross_entropy %s: streaming %lld classes, shifted by %lld", Format<T>::name, (long long)classes,
                 (long long)shift);
        Simple<T> s(3, classes);
        s.fill([&](int64_t) { return random.spiky(); });
        s.plain = random.chance(0.5);
        s.forward();
        Rows<T> plain(s.shape, Arrangement::rows, guard), streamed(s.shape, Arrangement::rows, guard, shift);
        s.backward(plain);
        s.backward(streamed, 0, true);
        bool same = true;
        for (int64_t r = 0; r < 3; ++r)
          for (int64_t j = 0; j < classes; ++j) same = same && plain.value(r, j) == streamed.result(r, j);
        CHECK(same);
        CHECK(streamed.memory.rest_untouched());
      }
}

// The maximum moves by more than the type's range: nothing is left of what came before, and nothing is infinite.
template <class T>
void largest_numbers(int64_t classes, bool plain) {
  describe("cross_entropy %s: %lld classes, the largest numbers, plain=%d", Format<T>::name, (long long)classes, plain);
  const double most = std::is_same_v<T, double> ? std::numeric_limits<double>::max()
                      : std::is_same_v<T, f16>  ? 65504
                                                : 0x1.fep127;
  Simple<T> s(1, classes);
  s.plain = plain;
  s.fill([&](int64_t i) { return i == classes - 1 ? most : -most; });
  s.target[0] = classes - 1;
  s.forward();
  CHECK(s.loss.value(0) == 0 && s.lse.value(0) == most && (plain || s.entropy.value(0) == 0));
  s.target[0] = 0;
  s.forward();
  CHECK(s.loss.value(0) == (std::is_same_v<T, f16> ? 2 * most : kInfinity));
}

// Equal terms, whose additions may all err to the same side.
template <class T>
void many_rows(int64_t rows) {
  describe("cross_entropy %s: losses of %lld equal rows", Format<T>::name, (long long)rows);
  for (int64_t classes : {5, 50}) {
    Simple<T> s(rows, classes);
    s.plain = true;
    s.fill([&](int64_t i) { return 0.1 * (double)(i % classes % 7); });
    for (int64_t r = 0; r < rows; ++r) s.target[r] = 0;
    s.forward();
    const double exact = s.loss.value(0) * (double)rows;
    CHECK(std::fabs(s.sums.loss - exact) <= exact * (std::is_same_v<T, double> ? 4.5e-16 : 1e-7));
    CHECK(s.sums.weight == (double)rows);
  }
}

template <class T>
void any_number_of_threads() {
  describe("cross_entropy %s: the same bits with any number of threads", Format<T>::name);
  Random random(6);
  for (int64_t classes : {10, 37}) {
    Simple<T> s(5000, classes);
    s.plain = true;
    s.fill([&](int64_t) { return random.spiky(); });
    std::vector<double> sums;
    for (int64_t n : {1, 2, 3, 5}) {
      threads = n;
      s.forward();
      sums.push_back(s.sums.loss);
    }
    threads = 2;
    for (double sum : sums) CHECK(sum == sums[0]);
  }
}

template <class T>
void all() {
  for (bool plain : {false, true}) {
    for (int64_t classes : {2, 9, 16, 33, 2100, 4500})
      for (int64_t at : {int64_t(0), classes / 2, classes - 1}) infinite_and_nan_logits<T>(classes, at, plain);
    for (int64_t classes : {10, 37}) {
      nothing_but_minus_infinity<T>(classes, plain);
      ignored_rows<T>(classes, plain);
    }
    huge_logits<T>(plain);
    for (int64_t classes : {2, 9, 16, 33, 2100, 4500}) largest_numbers<T>(classes, plain);
  }
  for (int64_t rows : {1000, 65535, 300000}) many_rows<T>(rows);
  classes_out_of_range<T>();
  streaming<T>();
  any_number_of_threads<T>();
}

}  // namespace

TEST(cross_entropy_edges) {
  reference_against_differences();
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
