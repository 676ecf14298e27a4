// softmax, log-softmax and log-sum-exp on the CPU, forward and backward, against double precision.
#include "cpu/drivers/drivers.h"
#include "softmax_cases.h"

namespace test {
namespace {

struct Cpu {
  template <class... Buffers>
  static void run(SoftmaxCall call, rf::DType dtype, const rf::SoftmaxProblem& p, int64_t rows, Buffers&...) {
    constexpr rf::SoftmaxOp kOps[] = {rf::SoftmaxOp::forward, rf::SoftmaxOp::backward, rf::SoftmaxOp::logsumexp_forward,
                                      rf::SoftmaxOp::logsumexp_backward};
    rf::softmax(kOps[(int)call], dtype, {p}, rows);
  }
};

template <class T>
void all_softmax() {
  Random random(100 + (int)Format<T>::dtype);
  for (int64_t classes : kClasses)
    for (int from = 0; from < kInputArrangements; ++from)
      for (int variant = 0; variant < fewer(3); ++variant) {
        const auto other = [&] { return kArrangements[random.integer(0, kOutputArrangements - 1)]; };
        const Arrangement a = kArrangements[from];
        // One variant keeps the same arrangement everywhere, so that rows meet rows.
        const Arrangement b = variant == 0 && from < kOutputArrangements ? a : other();
        const Arrangement g = variant == 0 ? b : kArrangements[random.integer(0, kInputArrangements - 1)];
        const RowShape s = shape_for(classes, random);
        const SoftmaxLayout w = {a, g, b, 0, random.integer(0, 3)};
        softmax_forward<Cpu, T>(s, w, random.chance(0.5), random);
        softmax_backward<Cpu, T>(s, w, random.chance(0.5), random);
      }
  for (const bool log : {false, true}) {
    // Adjacent classes of up to four vectors, around the bounds between lanes, registers and blocks, of rows that fill
    // fewer lanes than half a vector, and more than a vector's group.
    for (const int64_t classes : {3, 8, 9, 24, 25, 32, 48, 49, 63, 64, 65, 80, 300})
      for (const int64_t rows : {1, 7, 8, 37}) {
        softmax_forward<Cpu, T>({rows, 1, classes}, {}, log, random);
        softmax_backward<Cpu, T>({rows, 1, classes}, {Arrangement::rows, Arrangement::padded, Arrangement::rows, 0, 0},
                                 log, random);
      }
    // Rows closer than classes: lanes where they lie up to kLaneClasses, and while all stay in the cache, tiles of 64
    // rows and 64 classes beyond, whose sums are put aside after 128 of them. The last lanes of a run are no whole
    // vector.
    for (const RowShape s :
         {RowShape{2, 100, 40}, {1, 130, 512}, {2, 65, 577}, {1, 64, 640}, {3, 49, 1000}, {1, 130, 700}, {1, 19, 8300}})
      for (const Arrangement from : {Arrangement::inner, Arrangement::gaps})
        for (const Arrangement to : {Arrangement::inner, Arrangement::transposed}) {
          softmax_forward<Cpu, T>(s, {from, from, to, 0, random.integer(0, 3)}, log, random);
          // Sums of one number for thousands of classes would leave float16's range.
          for (const Arrangement grad : {to, Arrangement::expanded, Arrangement::constant})
            if (grad == to || s.classes <= 1000)
              softmax_backward<Cpu, T>(s, {from, grad, to, 0, random.integer(0, 3)}, log, random);
        }
    // Rows whose exponentials are just few enough to be kept and scaled, and too many.
    for (const int64_t classes : {65536, 65537, 70001}) softmax_forward<Cpu, T>({1, 2, classes}, {}, log, random);
  }
}

template <class T>
void all_logsumexp() {
  Random random(200 + (int)Format<T>::dtype);
  for (int64_t classes : kClasses)
    for (int from = 0; from < kInputArrangements; ++from) {
      const Arrangement a = kArrangements[from];
      const Arrangement b = from < 2 ? a : kArrangements[random.integer(0, kOutputArrangements - 1)];
      logsumexp<Cpu, T>(shape_for(classes, random), {a, a, b, 0, random.integer(0, 3)}, random);
    }
  for (double special : {kNaN, kInfinity, -kInfinity})
    for (int64_t classes : {1, 5, 33, 2100, 4200})
      for (int64_t at : {int64_t(0), classes / 2, classes - 1})
        for (const Arrangement a : {Arrangement::rows, Arrangement::inner})
          softmax_special_value<Cpu, T>(special, classes, at, a);
}

}  // namespace

TEST(softmax) {
  each_dtype([](auto element) { all_softmax<decltype(element)>(); });
}

TEST(logsumexp) {
  each_dtype([](auto element) { all_logsumexp<decltype(element)>(); });
}

}  // namespace test
