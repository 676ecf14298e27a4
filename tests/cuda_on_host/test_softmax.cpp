// The CUDA softmax family against double precision: rows of a few lanes, of a block, of a cluster, too long for shared
// memory, and rows that are adjacent while their classes are far apart.
#include <cmath>
#include <vector>

#include "cuda/launch.h"
#include "device_memory.h"
#include "layouts.h"
#include "softmax_reference.h"

namespace test {
namespace {

using rf::cuda::SoftmaxRows;

// Around the vectors of 16 bytes, of a warp's registers (256, 512 or 1024 elements) and of several warps.
constexpr int64_t kRowClasses[] = {1, 2, 7, 8, 9, 17, 33, 129, 255, 512, 1017, 1030, 2051};

template <class T>
SoftmaxRows arguments(const Rows<T>& in, Rows<T>* out, bool log) {
  auto a = softmax_arguments<SoftmaxRows>(in, out, log);
  a.rows = in.shape.rows();
  return a;
}

// The input lies `shift` elements from where the output does, so that rows may differ in alignment.
struct Where {
  Arrangement input, grad, output;
  int64_t shift;
};

template <class T>
void note(const char* what, const RowShape& s, const Where& w, bool log) {
  describe("%s %s outer=%lld inner=%lld classes=%lld %s, %s to %s shift=%lld log=%d", what, Format<T>::name,
           (long long)s.outer, (long long)s.inner, (long long)s.classes, kArrangementNames[(int)w.input],
           kArrangementNames[(int)w.grad], kArrangementNames[(int)w.output], (long long)w.shift, log);
}

template <class T>
void forward(const RowShape& s, const Where& w, bool log, Random& random) {
  note<T>("softmax forward", s, w, log);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const Rows<T> x(s, w.input, guard, w.shift, [&] { return 4 * random.spiky(); });
  Rows<T> y(s, w.output, guard);
  {
    Lent in(x.memory), out(y.memory);
    rf::cuda::launch_softmax_forward(Format<T>::dtype, arguments(x, &y, log), nullptr);
  }
  check_softmax(x, y, log);
  CHECK(y.memory.rest_untouched());
}

template <class T>
void backward(const RowShape& s, const Where& w, bool log, Random& random) {
  note<T>("softmax backward", s, w, log);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const Rows<T> y(s, w.input, guard, w.shift, [&] { return log ? -6 * random.uniform() : random.uniform() / 8; });
  const Rows<T> g(s, w.grad, guard, 0, [&] { return random.spiky(); });
  Rows<T> dx(s, w.output, guard);
  SoftmaxRows a = arguments(y, &dx, log);
  a.grad = g.memory.data();
  a.grad_in = g.layout;
  {
    Lent of_y(y.memory), of_g(g.memory), of_dx(dx.memory);
    rf::cuda::launch_softmax_backward(Format<T>::dtype, a, nullptr);
  }
  check_softmax_backward(y, g, dx, log);
  CHECK(dx.memory.rest_untouched());
}

template <class T>
void logsumexp(const RowShape& s, const Where& w, Random& random) {
  using A = rf::acc_t<T>;
  note<T>("logsumexp", s, w, false);
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const double offset = random.chance(0.3) ? 300 : 0;  // beside which the logarithm's digits are few
  const Rows<T> x(s, w.input, guard, w.shift, [&] { return offset + 4 * random.spiky(); });
  Buffer<A> lse(s.rows(), guard);
  SoftmaxRows a = arguments<T>(x, nullptr, false);
  a.row_result = lse.data();
  {
    Lent in(x.memory), out(lse);
    rf::cuda::launch_logsumexp_forward(Format<T>::dtype, a, nullptr);
  }
  check_logsumexp(x, lse);
  CHECK(lse.rest_untouched());

  const Buffer<A> g = input<A>(s.rows(), [&] { return random.spiky(); }, guard);
  Rows<T> dx(s, w.output, guard);
  SoftmaxRows b = arguments(x, &dx, false);
  b.row_result = lse.data();
  b.row_grad = g.data();
  {
    const Buffer<A>& read = lse;
    Lent in(x.memory), of_lse(read), of_g(g), out(dx.memory);
    rf::cuda::launch_logsumexp_backward(Format<T>::dtype, b, nullptr);
  }
  check_logsumexp_backward(x, lse, g, dx);
  CHECK(dx.memory.rest_untouched());
}

// A row with the given value at `at` among ordinary ones; as PyTorch has it, one NaN or +inf spoils the row, and -inf
// is a probability of zero unless it is all there is.
template <class T>
void special_value(double special, int64_t classes, int64_t at, Arrangement arrangement) {
  using A = rf::acc_t<T>;
  describe("softmax family %s: %g at %lld of %lld, %s", Format<T>::name, special, (long long)at, (long long)classes,
           kArrangementNames[(int)arrangement]);
  const RowShape s = {2, 2, classes};
  Rows<T> x(s, arrangement, Guard::behind, 0, [] { return 0.0; });
  for (int64_t r = 0; r < s.rows(); ++r)
    for (int64_t c = 0; c < classes; ++c)
      x.memory[x.at(r, c)] = from_double<T>(c == at ? special : 0.01 * (double)((c + r) % 50));
  const bool lost = special != -kInfinity || classes == 1;
  for (bool log : {false, true}) {
    Rows<T> y(s, arrangement, Guard::behind);
    Lent in(x.memory), out(y.memory);
    rf::cuda::launch_softmax_forward(Format<T>::dtype, arguments(x, &y, log), nullptr);
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
  SoftmaxRows a = arguments<T>(x, nullptr, false);
  a.row_result = lse.data();
  {
    Lent in(x.memory), out(lse);
    rf::cuda::launch_logsumexp_forward(Format<T>::dtype, a, nullptr);
  }
  Comparison<A> compare("lse");
  for (int64_t r = 0; r < s.rows(); ++r) {
    const Moments m = moments(x.row(r));
    compare.add(lse.result(r),
                std::isfinite(special) || (special == -kInfinity && classes > 1) ? m.max + m.log_sum : special,
                sum_error(classes) + m.log_sum, r);
  }
}

template <class T>
void all() {
  Random random(100 + (int)Format<T>::dtype);
  const auto any = [&](int arrangements) { return kArrangements[random.integer(0, arrangements - 1)]; };
  for (int64_t classes : kRowClasses) {
    const RowShape s = classes > 500 ? RowShape{2, 2, classes} : RowShape{3, 5, classes};
    // Rows where they usually lie, apart in alignment, and everywhere else.
    forward<T>(s, {Arrangement::rows, Arrangement::rows, Arrangement::rows, 0}, random.chance(0.5), random);
    for (int i = 0; i < (classes > 500 ? 2 : 4); ++i) {
      const Where w = {any(kOutputArrangements + 1), any(kOutputArrangements + 1), any(kOutputArrangements),
                       random.integer(0, 9)};
      const bool log = random.chance(0.5);
      forward<T>(s, w, log, random);
      backward<T>(s, w, !log, random);
      logsumexp<T>(s, w, random);
    }
    backward<T>(s, {Arrangement::rows, Arrangement::padded, Arrangement::rows, 1}, random.chance(0.5), random);
  }
  for (double special : {kNaN, kInfinity, -kInfinity})
    for (int64_t classes : {1, 5, 1500})
      special_value<T>(special, classes, classes / 3, random.chance(0.5) ? Arrangement::rows : Arrangement::inner);
}

// Beyond 64 KiB rows are cut among the blocks of a cluster, where there are any; beyond what shared memory holds they
// are read twice.
template <class T>
void long_rows(int64_t bytes) {
  Random random(150 + (int)Format<T>::dtype);
  const RowShape s = {1, 1, bytes / (int64_t)sizeof(T) + 3};
  const Where w = {Arrangement::rows, Arrangement::rows, Arrangement::rows, 1};
  forward<T>(s, w, false, random);
  backward<T>(s, w, true, random);
  logsumexp<T>(s, w, random);
}

}  // namespace

TEST(softmax) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  long_rows<bf16>(70 << 10);
  long_rows<float>(180 << 10);
}

}  // namespace test
