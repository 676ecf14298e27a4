// softmax, log-softmax and log-sum-exp, forward and backward, against double precision.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "layouts.h"
#include "softmax_reference.h"

namespace test {
namespace {

using rf::SoftmaxArgs;
using rf::SoftmaxOp;

template <class T>
SoftmaxArgs arguments(const Rows<T>& in, Rows<T>* out, bool log) {
  return softmax_arguments<SoftmaxArgs>(in, out, log);
}

template <class T>
void forward(const RowShape& s, Arrangement from, Arrangement to, bool log, Random& random) {
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  describe("softmax forward %s outer=%lld inner=%lld classes=%lld %s to %s log=%d", Format<T>::name, (long long)s.outer,
           (long long)s.inner, (long long)s.classes, kArrangementNames[(int)from], kArrangementNames[(int)to], log);
  Rows<T> x(s, from, guard, 0, [&] { return 4 * random.spiky(); });
  x.memory.read_only();
  Rows<T> y(s, to, guard, random.integer(0, 3));
  rf::softmax(SoftmaxOp::forward, Format<T>::dtype, arguments(x, &y, log), s.rows());
  check_softmax(x, y, log);
  CHECK(y.memory.rest_untouched());
}

template <class T>
void backward(const RowShape& s, Arrangement of_y, Arrangement of_g, Arrangement of_dx, bool log, Random& random) {
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  describe("softmax backward %s outer=%lld inner=%lld classes=%lld %s, %s to %s log=%d", Format<T>::name,
           (long long)s.outer, (long long)s.inner, (long long)s.classes, kArrangementNames[(int)of_y],
           kArrangementNames[(int)of_g], kArrangementNames[(int)of_dx], log);
  Rows<T> y(s, of_y, guard, 0, [&] { return log ? -6 * random.uniform() : random.uniform() / 8; });
  Rows<T> g(s, of_g, guard, 0, [&] { return random.spiky(); });
  y.memory.read_only();
  g.memory.read_only();
  Rows<T> dx(s, of_dx, guard, random.integer(0, 3));
  SoftmaxArgs a = arguments(y, &dx, log);
  a.grad = g.memory.data();
  a.grad_in = g.layout;
  rf::softmax(SoftmaxOp::backward, Format<T>::dtype, a, s.rows());
  check_softmax_backward(y, g, dx, log);
  CHECK(dx.memory.rest_untouched());
}

template <class T>
void logsumexp(const RowShape& s, Arrangement from, Arrangement to, Random& random) {
  using A = rf::acc_t<T>;
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  describe("logsumexp %s outer=%lld inner=%lld classes=%lld %s to %s", Format<T>::name, (long long)s.outer,
           (long long)s.inner, (long long)s.classes, kArrangementNames[(int)from], kArrangementNames[(int)to]);
  const double offset = random.chance(0.3) ? 300 : 0;
  Rows<T> x(s, from, guard, 0, [&] { return offset + 4 * random.spiky(); });
  x.memory.read_only();
  Buffer<A> lse(s.rows(), guard);
  SoftmaxArgs a = arguments<T>(x, nullptr, false);
  a.row_result = lse.data();
  rf::softmax(SoftmaxOp::logsumexp_forward, Format<T>::dtype, a, s.rows());
  check_logsumexp(x, lse);
  CHECK(lse.rest_untouched());

  Buffer<A> g = input<A>(s.rows(), [&] { return random.spiky(); }, guard);
  lse.read_only();
  Rows<T> dx(s, to, guard, random.integer(0, 3));
  SoftmaxArgs b = arguments(x, &dx, false);
  b.row_result = lse.data();
  b.row_grad = g.data();
  rf::softmax(SoftmaxOp::logsumexp_backward, Format<T>::dtype, b, s.rows());
  check_logsumexp_backward(x, lse, g, dx);
  CHECK(dx.memory.rest_untouched());
}

// A row with the given special value at `at` among ordinary ones.
template <class T>
void special_values(double special, int64_t classes, int64_t at) {
  using A = rf::acc_t<T>;
  describe("softmax family %s: %g at %lld of %lld", Format<T>::name, special, (long long)at, (long long)classes);
  const RowShape s = {1, 1, classes};
  int64_t c = 0;
  Rows<T> x(s, Arrangement::rows, Guard::behind, 0, [&] { return c++ == at ? special : 0.01 * (double)(c % 50); });
  const std::vector<double> row = x.row(0);
  const Moments m = moments(row);
  x.memory.read_only();
  for (bool log : {false, true}) {
    Rows<T> y(s, Arrangement::rows, Guard::behind);
    rf::softmax(SoftmaxOp::forward, Format<T>::dtype, arguments(x, &y, log), 1);
    Comparison<T> compare(log ? "log-softmax" : "softmax");
    bool all_lost = true;
    for (int64_t j = 0; j < classes; ++j) {
      // As in PyTorch: one NaN or +inf spoils the row, -inf is a probability of zero unless it is all there is.
      const bool lost = special != -kInfinity || classes == 1;
      const double t = row[j] - m.max - m.log_sum;
      const double expected = log ? t : std::exp(t);
      const double got = y.result(0, j);
      if (lost)
        all_lost = all_lost && got != got;
      else
        compare.add(got, expected, std::isinf(t) ? 0 : sum_error(classes) + 8 * std::fabs(t), j);
    }
    CHECK(all_lost);
  }
  Buffer<A> lse(1);
  SoftmaxArgs a = arguments<T>(x, nullptr, false);
  a.row_result = lse.data();
  rf::softmax(SoftmaxOp::logsumexp_forward, Format<T>::dtype, a, 1);
  const double got = lse.result(0);
  if (special != special)
    CHECK(got != got);
  else if (special == kInfinity)
    CHECK(got == kInfinity);
  else if (classes == 1)
    CHECK(got == -kInfinity);
  else
    CHECK(std::fabs(got - m.max - m.log_sum) < 1e-4);
}

template <class T>
void all_softmax() {
  Random random(100 + (int)Format<T>::dtype);
  for (int64_t classes : kClasses)
    for (int from = 0; from <= kOutputArrangements; ++from)
      for (int variant = 0; variant < fewer(3); ++variant) {
        const auto other = [&] { return kArrangements[random.integer(0, kOutputArrangements - 1)]; };
        const Arrangement a = kArrangements[from];
        // One variant keeps the same arrangement everywhere, so that rows meet rows.
        const Arrangement b = variant == 0 && from < kOutputArrangements ? a : other();
        const Arrangement g = variant == 0 ? b : kArrangements[random.integer(0, kOutputArrangements)];
        const RowShape s = shape_for(classes, random);
        forward<T>(s, a, b, random.chance(0.5), random);
        backward<T>(s, a, g, b, random.chance(0.5), random);
      }
  for (const bool log : {false, true}) {
    // Adjacent classes of up to four vectors, around the bounds between lanes, registers and blocks, of rows that fill
    // fewer lanes than half a vector, and more than a vector's group.
    for (const int64_t classes : {3, 8, 9, 24, 25, 32, 48, 49, 63, 64, 65, 80, 300})
      for (const int64_t rows : {1, 7, 8, 37}) {
        forward<T>({rows, 1, classes}, Arrangement::rows, Arrangement::rows, log, random);
        backward<T>({rows, 1, classes}, Arrangement::rows, Arrangement::padded, Arrangement::rows, log, random);
      }
    // Rows closer than classes: lanes where they lie up to kLaneClasses, tiles of 64 rows and 64 classes beyond, whose
    // sums are put aside after 128 of them.
    for (const RowShape s : {RowShape{2, 100, 40}, {1, 130, 512}, {2, 65, 577}, {1, 64, 640}, {1, 19, 8300}})
      for (const Arrangement from : {Arrangement::inner, Arrangement::gaps})
        for (const Arrangement to : {Arrangement::inner, Arrangement::transposed}) {
          forward<T>(s, from, to, log, random);
          backward<T>(s, from, to, to, log, random);
        }
    // Rows whose exponentials are just few enough to be kept and scaled, and too many.
    for (const int64_t classes : {65536, 65537, 70001})
      forward<T>({1, 2, classes}, Arrangement::rows, Arrangement::rows, log, random);
  }
}

template <class T>
void all_logsumexp() {
  Random random(200 + (int)Format<T>::dtype);
  for (int64_t classes : kClasses)
    for (int from = 0; from <= kOutputArrangements; ++from) {
      const Arrangement a = kArrangements[from];
      const Arrangement b = from < 2 ? a : kArrangements[random.integer(0, kOutputArrangements - 1)];
      logsumexp<T>(shape_for(classes, random), a, b, random);
    }
  for (double special : {kNaN, kInfinity, -kInfinity})
    for (int64_t classes : {1, 5, 33, 2100, 4200})
      for (int64_t at : {int64_t(0), classes / 2, classes - 1}) special_values<T>(special, classes, at);
}

}  // namespace

TEST(softmax) {
  each_dtype([](auto element) { all_softmax<decltype(element)>(); });
}

TEST(logsumexp) {
  each_dtype([](auto element) { all_logsumexp<decltype(element)>(); });
}

}  // namespace test
