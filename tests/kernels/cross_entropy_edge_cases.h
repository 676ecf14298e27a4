// What is tested of cross-entropy on every device where formulas end: infinite and NaN logits, huge logits, rows that
// are ignored, sums of many equal losses. Device as cross_entropy_cases.h has it.
#pragma once
#include <cmath>
#include <limits>

#include "cross_entropy_cases.h"

namespace test {

enum class Through { loss, loss_and_entropy, lse };  // which outputs have an upstream gradient, of 1

// Adjacent rows with class indices, all outputs, and the gradient. `plain`: without the outputs that an ordinary
// training step has no use for, entropy and argmax; kernels treat that case specially.
template <class Device, class T>
struct Simple {
  using A = rf::acc_t<T>;
  RowShape shape;
  Rows<T> x, dx;
  Buffer<int64_t> target, argmax;
  Buffer<A> max, log_sum, entropy, loss, lse, logprob, ones;
  Sums sums;
  bool plain;

  Simple(int64_t rows, int64_t classes, bool plain)
      : shape{rows, 1, classes},
        x(shape, Arrangement::rows, Guard::behind),
        dx(shape, Arrangement::rows, Guard::behind),
        target(rows),
        argmax(rows),
        max(rows),
        log_sum(rows),
        entropy(rows),
        loss(rows),
        lse(rows),
        logprob(rows),
        ones(filled<A>(rows, [] { return 1.0; })),
        plain(plain) {
    for (int64_t r = 0; r < rows; ++r) target[r] = r % classes;
  }
  template <class F>
  void fill(F&& f) {
    for (int64_t i = 0; i < x.memory.count(); ++i) x.memory[i] = from_double<T>(f(i));
  }
  rf::CrossEntropyProblem problem(double softcap) {
    rf::CrossEntropyProblem p = {};
    p.logits = x.memory.data();
    p.layout = x.layout;
    p.classes = shape.classes;
    p.target = target.data();
    p.ignore_index = -100;
    p.softcap = softcap;
    p.logit_scale = 1;
    p.row_max = max.data();
    p.row_log_sum = log_sum.data();
    p.row_entropy = plain ? nullptr : entropy.data();
    return p;
  }
  void forward(double softcap = 0) {
    typename Device::Memory memory;
    memory.read(std::as_const(x.memory), std::as_const(target));
    memory.write(max, log_sum, entropy, loss, lse, logprob, argmax);
    sums = Device::template forward<T>(problem(softcap), shape.rows(), (double)shape.classes,
                                       {loss.data(), lse.data(), logprob.data(), plain ? nullptr : argmax.data()},
                                       Reduction::sum);
  }
  void backward(Rows<T>& to, double softcap = 0, Through through = Through::loss, bool stream = false) {
    typename Device::Memory memory;
    memory.read(std::as_const(x.memory), std::as_const(target), std::as_const(max), std::as_const(log_sum),
                std::as_const(entropy), std::as_const(ones));
    memory.write(to.memory);
    rf::CrossEntropyBackward g = {};
    (through == Through::lse ? g.lse : g.loss) = ones.data();
    g.loss_stride = 1;
    g.entropy = through == Through::loss_and_entropy ? ones.data() : nullptr;
    g.grad_logits = to.memory.data();
    g.grad_layout = to.layout;
    Device::template backward<T>(problem(softcap), shape.rows(), (double)shape.classes, g, nullptr, stream);
  }
  void backward(double softcap = 0, Through through = Through::loss) { backward(dx, softcap, through); }

  // Whether all of the gradient is as `right(value, index)` says.
  template <class F>
  bool each_dx(F&& right) {
    bool all = true;
    for (int64_t r = 0; r < shape.rows(); ++r)
      for (int64_t j = 0; j < shape.classes; ++j) all = all && right(dx.result(r, j), j);
    return all;
  }
};

template <class Device, class T>
void infinite_and_nan_logits(int64_t classes, int64_t at, bool plain) {
  describe("cross_entropy %s: special logits at %lld of %lld, plain=%d", Format<T>::name, (long long)at,
           (long long)classes, plain);
  const int64_t other = at == 0 ? classes - 1 : 0;
  const auto ordinary = [](int64_t i) { return 0.25 * (double)(i % 7); };
  const auto is_nan = [](double v, int64_t) { return std::isnan(v); };
  Simple<Device, T> s(1, classes, plain);

  // A class of probability zero: everything stays finite, its gradient is zero.
  s.fill([&](int64_t i) { return i == at ? -kInfinity : ordinary(i); });
  s.target[0] = other;
  s.forward();
  CHECK(std::isfinite(s.loss.value(0)) && std::isfinite(s.lse.value(0)) &&
        (plain || std::isfinite(s.entropy.value(0))));
  for (const Through through : {Through::loss, plain ? Through::loss : Through::loss_and_entropy}) {
    s.backward(0, through);
    CHECK(s.each_dx([&](double v, int64_t j) { return j == at ? v == 0 : std::isfinite(v); }));
  }
  // The same class as the target: an infinite loss.
  s.target[0] = at;
  s.forward();
  CHECK(s.loss.value(0) == kInfinity && s.logprob.value(0) == -kInfinity && *s.sums.loss == kInfinity);

  // NaN, wherever it is, reaches every output; it counts as the maximum. An infinite logit has no softmax.
  for (const double special : {kNaN, kInfinity}) {
    s.fill([&](int64_t i) { return i == at ? special : ordinary(i); });
    s.target[0] = other;
    s.forward();
    CHECK(std::isnan(s.loss.value(0)) && std::isnan(s.logprob.value(0)));
    CHECK(std::isnan(*s.sums.loss));
    CHECK(special == kInfinity ? s.lse.value(0) == kInfinity : std::isnan(s.lse.value(0)));
    CHECK(plain || (std::isnan(s.entropy.value(0)) && s.argmax.data()[0] == at));
    s.backward();
    CHECK(s.each_dx(is_nan));
    // exp(z - lse) is 0 beside an infinite logit.
    s.backward(0, Through::lse);
    CHECK(s.each_dx([&](double v, int64_t j) { return special == kInfinity && j != at ? v == 0 : std::isnan(v); }));
    // A NaN counts for more than infinities, before or behind it.
    s.fill([&](int64_t i) { return i == at ? kNaN : i == other ? kInfinity : ordinary(i); });
    s.forward();
    CHECK(std::isnan(s.lse.value(0)) && (plain || s.argmax.data()[0] == at));
    s.backward(0, Through::lse);
    CHECK(s.each_dx(is_nan));
  }
  // A soft cap makes infinite logits finite.
  s.fill([&](int64_t i) { return i == at ? kInfinity : i == other ? -kInfinity : ordinary(i); });
  s.forward(10);
  CHECK(std::isfinite(s.loss.value(0)) && std::fabs(s.max.value(0) - 10) < 1e-5);
  s.backward(10);
  CHECK(s.dx.value(0, at) == 0 && s.dx.value(0, other) == 0);
}

template <class Device, class T>
void nothing_but_minus_infinity(int64_t classes, bool plain) {
  describe("cross_entropy %s: a row of -inf, plain=%d", Format<T>::name, plain);
  Simple<Device, T> s(3, classes, plain);
  s.fill([](int64_t) { return -kInfinity; });
  s.forward();
  CHECK(std::isnan(s.loss.value(0)) && std::isnan(s.logprob.value(0)));  // as in PyTorch
  CHECK(s.lse.value(0) == -kInfinity && (plain || s.argmax.data()[0] == 0));
}

// The logarithm keeps its digits next to a large maximum.
template <class Device, class T>
void huge_logits(bool plain) {
  describe("cross_entropy %s: huge logits, plain=%d", Format<T>::name, plain);
  const double big = std::is_same_v<T, f16> ? 60000 : 0x1p100;
  Simple<Device, T> s(1, 20, plain);
  s.fill([&](int64_t) { return big; });
  s.forward();
  CHECK(std::fabs(s.loss.value(0) - std::log(20.0)) < 1e-6);
  s.fill([&](int64_t i) { return i == 0 ? big : -big; });
  s.forward();
  CHECK(s.loss.value(0) == 0 && (plain || s.entropy.value(0) == 0) && s.lse.value(0) == rounded<T>(big));
  s.backward(0, plain ? Through::loss : Through::loss_and_entropy);
  CHECK(s.each_dx([](double v, int64_t) { return v == 0; }));
}

// Their logits may be anything, and none of it reaches the loss or the gradient.
template <class Device, class T>
void ignored_rows(int64_t rows, int64_t classes, bool plain) {
  describe("cross_entropy %s: all rows ignored, plain=%d", Format<T>::name, plain);
  for (const double ordinary : {0.5, kNaN}) {
    Simple<Device, T> s(rows, classes, plain);
    s.fill([&](int64_t i) { return i % 5 ? ordinary * (double)(i % 11) : kInfinity; });
    for (int64_t r = 0; r < rows; ++r) s.target[r] = -100;
    s.forward();
    CHECK(*s.sums.loss == 0 && s.sums.weight == 0 && s.sums.bad_row == -1);
    s.backward();
    bool zero = true;
    for (int64_t r = 0; r < rows; ++r) zero = zero && s.loss.value(r) == 0 && s.logprob.value(r) == 0;
    CHECK(zero && s.each_dx([](double v, int64_t) { return v == 0; }));
    CHECK(s.dx.memory.rest_untouched());
  }
}

// The maximum moves by more than the type's range: nothing is left of what came before, and nothing is infinite.
template <class Device, class T>
void largest_numbers(int64_t classes, bool plain) {
  describe("cross_entropy %s: %lld classes, the largest numbers, plain=%d", Format<T>::name, (long long)classes, plain);
  const double most = Format<T>::largest == Format<float>::largest ? Format<bf16>::largest : Format<T>::largest;
  Simple<Device, T> s(1, classes, plain);
  s.fill([&](int64_t i) { return i == classes - 1 ? most : -most; });
  s.target[0] = classes - 1;
  s.forward();
  CHECK(s.loss.value(0) == 0 && s.lse.value(0) == most && (plain || s.entropy.value(0) == 0));
  s.target[0] = 0;
  s.forward();
  CHECK(s.loss.value(0) == (std::is_same_v<T, f16> ? 2 * most : kInfinity));
}

// Equal terms, whose additions may all err to the same side.
template <class Device, class T>
void many_rows(int64_t rows) {
  describe("cross_entropy %s: losses of %lld equal rows", Format<T>::name, (long long)rows);
  for (const int64_t classes : {5, 50}) {
    Simple<Device, T> s(rows, classes, true);
    s.fill([&](int64_t i) { return 0.1 * (double)(i % classes % 7); });
    for (int64_t r = 0; r < rows; ++r) s.target[r] = 0;
    s.forward();
    const double exact = s.loss.value(0) * (double)rows;
    CHECK(std::fabs(*s.sums.loss - exact) <= exact * (std::is_same_v<T, double> ? 4.5e-16 : 1e-7));
    CHECK(s.sums.weight == (double)rows);
  }
}

}  // namespace test
