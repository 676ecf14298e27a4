// The CUDA cross-entropy where formulas end: infinite, huge and NaN logits, ignored rows, classes out of range.
#include <cmath>
#include <limits>
#include <utility>

#include "cuda/launch.h"
#include "device_memory.h"
#include "layouts.h"

namespace test {
namespace {

using rf::cuda::CrossEntropyResults;
using rf::cuda::CrossEntropyRows;
using rf::cuda::CrossEntropyUpstream;

// Adjacent rows with class indices, losses and gradients for an upstream gradient of 1 each.
template <class T>
struct Simple {
  using A = rf::acc_t<T>;
  RowShape shape;
  Rows<T> x, dx;
  Buffer<int64_t> target, argmax;
  Buffer<A> max, log_sum, entropy, loss, lse, ones;
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
        ones(rows),
        plain(plain) {
    for (int64_t r = 0; r < rows; ++r) {
      target[r] = r % classes;
      ones[r] = 1;
    }
  }
  template <class F>
  void fill(F&& f) {
    for (int64_t i = 0; i < x.memory.count(); ++i) x.memory[i] = from_double<T>(f(i));
  }
  void run(double softcap = 0, bool through_entropy = false, bool of_lse_alone = false) {
    CrossEntropyRows a = {};
    a.rows = shape.rows();
    a.classes = shape.classes;
    a.logits = x.memory.data();
    a.layout = x.layout;
    a.target = target.data();
    a.ignore_index = -100;
    a.softcap = softcap;
    a.logit_scale = 1;
    a.row_max = max.data();
    a.row_log_sum = log_sum.data();
    a.row_entropy = plain ? nullptr : entropy.data();
    CrossEntropyResults out = {};
    out.loss = loss.data();
    out.lse = lse.data();
    out.argmax = plain ? nullptr : argmax.data();
    CrossEntropyUpstream g = {};
    (of_lse_alone ? g.lse : g.loss) = ones.data();
    g.loss_stride = 1;
    g.entropy = through_entropy ? ones.data() : nullptr;
    g.grad_logits = dx.memory.data();
    g.grad_layout = dx.layout;
    const Lent inputs[] = {Lent(std::as_const(x.memory)), Lent(std::as_const(target)), Lent(std::as_const(ones))};
    const Lent outputs[] = {Lent(dx.memory), Lent(argmax), Lent(max), Lent(log_sum),
                            Lent(entropy),   Lent(loss),   Lent(lse)};
    rf::cuda::launch_cross_entropy_forward(Format<T>::dtype, a, out, nullptr);
    rf::cuda::launch_cross_entropy_backward(Format<T>::dtype, a, g, nullptr);
  }
};

template <class T>
void infinite_and_nan_logits(int64_t classes, int64_t at, bool plain) {
  describe("cross_entropy %s: special logits at %lld of %lld, plain=%d", Format<T>::name, (long long)at,
           (long long)classes, plain);
  const int64_t other = at == 0 ? classes - 1 : 0;
  const auto ordinary = [](int64_t i) { return 0.25 * (double)(i % 7); };
  Simple<T> s(1, classes, plain);

  // A class of probability zero: everything stays finite, its gradient is zero.
  s.fill([&](int64_t i) { return i == at ? -kInfinity : ordinary(i); });
  s.target[0] = other;
  for (bool through_entropy : {false, true}) {
    s.run(0, through_entropy && !plain);
    CHECK(std::isfinite(s.loss.value(0)) && std::isfinite(s.lse.value(0)) &&
          (plain || std::isfinite(s.entropy.value(0))));
    bool finite = true;
    for (int64_t j = 0; j < classes; ++j) finite = finite && std::isfinite(s.dx.value(0, j));
    CHECK(finite && s.dx.value(0, at) == 0);
  }
  // The same class as the target: an infinite loss.
  s.target[0] = at;
  s.run();
  CHECK(s.loss.value(0) == kInfinity);

  // NaN, wherever it is, reaches every output; it counts as the maximum. An infinite logit has no softmax.
  for (double special : {kNaN, kInfinity}) {
    s.fill([&](int64_t i) { return i == at ? special : ordinary(i); });
    s.target[0] = other;
    s.run();
    CHECK(std::isnan(s.loss.value(0)));
    CHECK(special == kInfinity ? s.lse.value(0) == kInfinity : std::isnan(s.lse.value(0)));
    CHECK(plain || (std::isnan(s.entropy.value(0)) && s.argmax.data()[0] == at));
    bool all_nan = true;
    for (int64_t j = 0; j < classes; ++j) all_nan = all_nan && std::isnan(s.dx.value(0, j));
    CHECK(all_nan);
    // exp(z - lse) is 0 beside an infinite logit.
    s.run(0, false, true);
    bool as_exp = true;
    for (int64_t j = 0; j < classes; ++j)
      as_exp = as_exp && (special == kInfinity && j != at ? s.dx.value(0, j) == 0 : std::isnan(s.dx.value(0, j)));
    CHECK(as_exp);
    // A NaN counts for more than infinities, before or behind it.
    s.fill([&](int64_t i) { return i == at ? kNaN : i == other ? kInfinity : ordinary(i); });
    s.run(0, false, true);
    CHECK(std::isnan(s.lse.value(0)) && (plain || s.argmax.data()[0] == at));
    all_nan = true;
    for (int64_t j = 0; j < classes; ++j) all_nan = all_nan && std::isnan(s.dx.value(0, j));
    CHECK(all_nan);
  }
  // A soft cap makes infinite logits finite.
  s.fill([&](int64_t i) { return i == at ? kInfinity : i == other ? -kInfinity : ordinary(i); });
  s.run(10);
  CHECK(std::isfinite(s.loss.value(0)) && std::fabs(s.max.value(0) - 10) < 1e-5);
  CHECK(s.dx.value(0, at) == 0 && s.dx.value(0, other) == 0);

  s.fill([](int64_t) { return -kInfinity; });
  s.run();
  CHECK(std::isnan(s.loss.value(0)) && s.lse.value(0) == -kInfinity && (plain || s.argmax.data()[0] == 0));
}

// The logarithm keeps its digits next to a large maximum.
template <class T>
void huge_logits(bool plain) {
  describe("cross_entropy %s: huge logits, plain=%d", Format<T>::name, plain);
  const double big = std::is_same_v<T, f16> ? 60000 : 0x1p100;
  Simple<T> s(1, 20, plain);
  s.fill([&](int64_t) { return big; });
  s.run();
  CHECK(std::fabs(s.loss.value(0) - std::log(20.0)) < 1e-6);
  s.fill([&](int64_t i) { return i == 0 ? big : -big; });
  s.run(0, !plain);
  CHECK(s.loss.value(0) == 0 && (plain || s.entropy.value(0) == 0) && s.lse.value(0) == rounded<T>(big));
  bool zero = true;
  for (int64_t j = 0; j < 20; ++j) zero = zero && s.dx.value(0, j) == 0;
  CHECK(zero);
}

// Their logits may be anything, and none of it reaches the loss or the gradient.
template <class T>
void ignored_rows(int64_t classes, bool plain) {
  describe("cross_entropy %s: ignored rows, plain=%d", Format<T>::name, plain);
  Simple<T> s(9, classes, plain);
  s.fill([](int64_t i) { return i % 5 ? kNaN : kInfinity; });
  for (int64_t r = 0; r < 9; ++r) s.target[r] = -100;
  s.run();
  bool zero = true;
  for (int64_t r = 0; r < 9; ++r)
    for (int64_t j = 0; j < classes; ++j) zero = zero && s.loss.value(r) == 0 && s.dx.result(r, j) == 0;
  CHECK(zero);
  CHECK(s.dx.memory.rest_untouched());
}

// The assertion comes before any access: out of bounds would be another kind of fault.
template <class T>
void classes_out_of_range() {
  for (int64_t wrong : {int64_t(10), int64_t(-1), int64_t(1) << 62, std::numeric_limits<int64_t>::min()})
    for (int64_t at : {int64_t(0), int64_t(6)}) {
      describe("cross_entropy %s: class %lld at row %lld", Format<T>::name, (long long)wrong, (long long)at);
      Simple<T> s(7, 10, at == 0);
      s.fill([](int64_t i) { return (double)(i % 3); });
      s.target[at] = wrong;
      bool asserted = false;
      try {
        s.run();
      } catch (const cuda_on_host::Fault& fault) {
        asserted = fault.kind == cuda_on_host::Kind::assertion;
      }
      CHECK(asserted);
    }
}

template <class T>
void edges() {
  for (bool plain : {false, true}) {
    for (int64_t classes : {2, 33, 1100}) infinite_and_nan_logits<T>(classes, classes / 2, plain);
    ignored_rows<T>(37, plain);
    huge_logits<T>(plain);
  }
}

void total_in_every_type() {
  describe("cross_entropy: the total in every type");
  const auto total_of = [](auto zero) {
    using R = decltype(zero);
    Buffer<float> x = filled<float>(6, [] { return 0.0; });
    Buffer<int64_t> target = filled<int64_t>(3, [] { return 1.0; });
    Buffer<float> loss(3), max(3), log_sum(3);
    Buffer<R> total(1);
    Buffer<char> workspace(rf::cuda::cross_entropy_workspace(3));
    CrossEntropyRows a = {};
    a.rows = 3;
    a.classes = 2;
    a.logits = x.data();
    a.layout = {1, 2, 0, 1};
    a.target = target.data();
    a.logit_scale = 1;
    a.row_max = max.data();
    a.row_log_sum = log_sum.data();
    CrossEntropyResults out = {};
    out.loss = loss.data();
    out.total = total.data();
    out.total_dtype = Format<R>::dtype;
    out.workspace = workspace.data();
    const Lent lent[] = {
        Lent(std::as_const(x)), Lent(std::as_const(target)), Lent(loss), Lent(max), Lent(log_sum), Lent(total),
        Lent(workspace)};
    rf::cuda::launch_cross_entropy_forward(rf::DType::f32, a, out, nullptr);
    return total.value(0);
  };
  const double exact = 3 * std::log(2.0);
  CHECK(std::fabs(total_of(0.0) - exact) < 1e-6);
  CHECK(std::fabs(total_of(0.0f) - exact) < 1e-6);
  CHECK(total_of(bf16{}) == rounded<bf16>(exact));
  CHECK(total_of(f16{}) == rounded<f16>(exact));
}

}  // namespace

TEST(cross_entropy_edges) {
  each_dtype([](auto element) { edges<decltype(element)>(); });
  classes_out_of_range<float>();
  total_in_every_type();
}

}  // namespace test
