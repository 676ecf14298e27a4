// What is tested of the softmax family on every device, whose files say which sizes their kernels tell apart. Device
// runs a call: run(call, dtype, problem, rows, buffers...), with the buffers that it may read (const) or write.
#pragma once
#include <cmath>
#include <vector>

#include "layouts.h"
#include "softmax_reference.h"

namespace test {

enum class SoftmaxCall { forward, backward, logsumexp_forward, logsumexp_backward };

// How operands lie, and how many elements from an aligned place: rows may differ in that.
struct SoftmaxLayout {
  Arrangement input, grad, output;
  int64_t input_shift, output_shift;
};

template <class T>
void describe_softmax(const char* what, const RowShape& s, const SoftmaxLayout& w, bool log) {
  describe("%s %s outer=%lld inner=%lld classes=%lld %s, %s to %s shifts %lld, %lld log=%d", what, Format<T>::name,
           (long long)s.outer, (long long)s.inner, (long long)s.classes, kArrangementNames[(int)w.input],
           kArrangementNames[(int)w.grad], kArrangementNames[(int)w.output], (long long)w.input_shift,
           (long long)w.output_shift, log);
}

// An operand that is only read from now on.
template <class T, class F>
Rows<T> read_only_rows(const RowShape& s, Arrangement a, Guard guard, int64_t shift, F&& generate) {
  Rows<T> rows(s, a, guard, shift, generate);
  rows.memory.read_only();
  return rows;
}

template <class Device, class T>
void softmax_forward(const RowShape& s, const SoftmaxLayout& w, bool log, Random& random) {
  describe_softmax<T>("softmax forward", s, w, log);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const Rows<T> x = read_only_rows<T>(s, w.input, guard, w.input_shift, [&] { return 4 * random.spiky(); });
  Rows<T> y(s, w.output, guard, w.output_shift);
  const rf::SoftmaxProblem p = softmax_problem(x, &y, log);
  const With with(p);
  Device::run(SoftmaxCall::forward, Format<T>::dtype, p, s.rows(), x.memory, y.memory);
  check_softmax(x, y, log);
  CHECK(y.memory.rest_untouched());
}

template <class Device, class T>
void softmax_backward(const RowShape& s, const SoftmaxLayout& w, bool log, Random& random) {
  describe_softmax<T>("softmax backward", s, w, log);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const Rows<T> y = read_only_rows<T>(s, w.input, guard, w.input_shift,
                                      [&] { return log ? -6 * random.uniform() : random.uniform() / 8; });
  const Rows<T> g = read_only_rows<T>(s, w.grad, guard, 0, [&] { return random.spiky(); });
  Rows<T> dx(s, w.output, guard, w.output_shift);
  rf::SoftmaxProblem p = softmax_problem(y, &dx, log);
  p.grad = g.memory.data();
  p.grad_in = g.layout;
  const With with(p);
  Device::run(SoftmaxCall::backward, Format<T>::dtype, p, s.rows(), y.memory, g.memory, dx.memory);
  check_softmax_backward(y, g, dx, log);
  CHECK(dx.memory.rest_untouched());
}

template <class Device, class T>
void logsumexp(const RowShape& s, const SoftmaxLayout& w, Random& random) {
  using A = rf::acc_t<T>;
  describe_softmax<T>("logsumexp", s, w, false);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const double offset = random.chance(0.3) ? 300 : 0;  // beside which the logarithm's digits are few
  const Rows<T> x = read_only_rows<T>(s, w.input, guard, w.input_shift, [&] { return offset + 4 * random.spiky(); });
  Buffer<A> lse(s.rows(), guard);
  rf::SoftmaxProblem p = softmax_problem<T>(x, nullptr, false);
  p.row_result = lse.data();
  const With with(p);
  Device::run(SoftmaxCall::logsumexp_forward, Format<T>::dtype, p, s.rows(), x.memory, lse);
  check_logsumexp(x, lse);
  CHECK(lse.rest_untouched());

  const Buffer<A> g = input<A>(s.rows(), [&] { return random.spiky(); }, guard);
  const Buffer<A>& read = lse;
  lse.read_only();
  Rows<T> dx(s, w.output, guard, w.output_shift);
  p = softmax_problem(x, &dx, false);
  p.row_result = lse.data();
  p.row_grad = g.data();
  Device::run(SoftmaxCall::logsumexp_backward, Format<T>::dtype, p, s.rows(), x.memory, read, g, dx.memory);
  check_logsumexp_backward(x, lse, g, dx);
  CHECK(dx.memory.rest_untouched());
}

// Rows with the given value at `at` among ordinary ones; as PyTorch has it, one NaN or +inf spoils the row, and -inf is
// a probability of zero unless it is all there is.
template <class Device, class T>
void softmax_special_value(double special, int64_t classes, int64_t at, Arrangement arrangement) {
  using A = rf::acc_t<T>;
  describe("softmax family %s: %g at %lld of %lld, %s", Format<T>::name, special, (long long)at, (long long)classes,
           kArrangementNames[(int)arrangement]);
  const RowShape s = {2, 2, classes};
  Rows<T> values(s, arrangement, Guard::behind, 0, [] { return 0.0; });
  for (int64_t r = 0; r < s.rows(); ++r)
    for (int64_t c = 0; c < classes; ++c)
      values.memory[values.at(r, c)] = from_double<T>(c == at ? special : 0.01 * (double)((c + r) % 50));
  values.memory.read_only();
  const Rows<T>& x = values;
  const bool lost = special != -kInfinity || classes == 1;
  for (bool log : {false, true}) {
    Rows<T> y(s, arrangement, Guard::behind);
    Device::run(SoftmaxCall::forward, Format<T>::dtype, softmax_problem(x, &y, log), s.rows(), x.memory, y.memory);
    Comparison<T> compare(log ? "log-softmax" : "softmax");
    for (int64_t r = 0; r < s.rows(); ++r) {
      const Moments m = moments(x.row(r));
      for (int64_t c = 0; c < classes; ++c) {
        const double t = lost ? kNaN : x.value(r, c) - m.max - m.log_sum;
        compare.add(y.result(r, c), log ? t : std::exp(t), std::isinf(t) ? 0 : sum_error(classes) + 8 * std::fabs(t),
                    c);
      }
    }
  }
  Buffer<A> lse(s.rows());
  rf::SoftmaxProblem p = softmax_problem<T>(x, nullptr, false);
  p.row_result = lse.data();
  Device::run(SoftmaxCall::logsumexp_forward, Format<T>::dtype, p, s.rows(), x.memory, lse);
  Comparison<A> compare("lse");
  for (int64_t r = 0; r < s.rows(); ++r) {
    const Moments m = moments(x.row(r));
    const bool ordinary = std::isfinite(special) || (special == -kInfinity && classes > 1);
    compare.add(lse.result(r), ordinary ? m.max + m.log_sum : special, sum_error(classes) + m.log_sum, r);
  }
}

}  // namespace test
