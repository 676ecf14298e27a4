// The CPU's cross-entropy over random combinations of its options, arrangements in memory, sizes and upstream
// gradients, against double precision.
#include "cross_entropy_cpu.h"

namespace test {
namespace {

// The gradient from exponentials that forward has kept has the same bits.
template <class T>
void in_one_pass(CrossEntropyTest<Cpu, T>& of) {
  Rows<T> dx(of.c.shape, of.c.grad, of.guard, of.shift);
  rf::CrossEntropyBackward g = of.gradients();
  g.grad_logits = dx.memory.data();
  g.grad_layout = dx.layout;
  const double* mean_of = of.c.reduction == Reduction::mean ? &of.sums.weight : nullptr;
  rf::cross_entropy_forward_backward(Format<T>::dtype, Cpu::args(of.problem(), of.class_weight_sum()), {},
                                     Cpu::grads(g, mean_of, of.c.stream), of.rows);
  int64_t others = 0;
  for (int64_t r = 0; r < of.rows; ++r)
    for (int64_t j = 0; j < of.c.shape.classes; ++j) {
      const double a = dx.result(r, j), b = of.dx.value(r, j);
      others += !(a == b || (a != a && b != b));
    }
  CHECK(others == 0);
  CHECK(dx.memory.rest_untouched());
}

template <class T>
void all() {
  Random random(300 + (int)Format<T>::dtype);  // other cases for each type
  for (int64_t classes : kClasses)
    for (int i = 0, calls = fewer(classes > 1000 ? 24 : 32); i < calls; ++i) {
      CrossEntropyTest<Cpu, T> of(random_case(shape_for(classes, random), i % 4 == 0, false, random), random);
      of.run();
      if (of.c.want_dx && !of.c.in_place && !of.c.want_dt) in_one_pass(of);
    }
}

}  // namespace

TEST(cross_entropy) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
