// The CUDA cross-entropy over random combinations of its options, arrangements in memory, sizes and upstream gradients,
// against double precision: forward, backward, and both from one read.
#include "cross_entropy_cuda.h"

namespace test {
namespace {

constexpr int64_t kRowClasses[] = {1, 2, 7, 9, 16, 33, 129, 300, 1030, 2051};

// The gradient that one read has left is not computed again by a backward pass of the same factor, and replaced by one
// of another.
template <class T>
void another_upstream(CrossEntropyTest<Cuda, T>& of) {
  for (const double factor : {1.0, -2.0}) {
    const std::vector<T> first = of.dx.memory.copy();
    const auto grad = input<rf::acc_t<T>>(1, [&] { return factor; });
    rf::CrossEntropyBackward g = of.gradients();
    g.loss = grad.data();
    g.lse = g.entropy = g.logprob = nullptr;
    LentMemory memory;
    memory.read(grad);
    // Beside the factor 1 none of the operands is lent: they may not be touched.
    if (factor != 1) {
      memory.read(std::as_const(of.x.memory));
      memory.write(of.dx.memory);
      of.lend_for_gradients(memory);
    }
    Cuda::backward<T>(of.problem(), of.rows, of.class_weight_sum(), g,
                      of.c.reduction == Reduction::mean ? &of.sums.weight : nullptr, false, 1);
    bool right = true;
    for (int64_t i = 0; i < of.dx.memory.count(); ++i) {
      const double a = to_double(first[i]), b = of.dx.memory.value(i);
      if (a == a) right = right && std::fabs(b - factor * a) <= (factor == 1 ? 0 : 0.01 * std::fabs(a) + 1e-6);
    }
    CHECK(right);
  }
}

// Results and gradient from one read of the logits.
template <class T>
void one_pass(CrossEntropyTest<Cuda, T>& of) {
  const std::vector<T> before = of.x.memory.copy();
  {
    LentMemory memory;
    if (!of.c.in_place) memory.read(std::as_const(of.x.memory));
    memory.write(of.gradient().memory);
    of.lend_for_results(memory);
    Cuda::Call<T> call(of.problem(), of.rows, of.class_weight_sum(), of.c.reduction);
    of.sums = call.results(of.outputs(), [&](const auto& args, const auto& results) {
      rf::cuda::launch_cross_entropy_forward_backward(Format<T>::dtype, args, results, of.gradient().memory.data(),
                                                      of.gradient().layout, nullptr);
    });
  }
  of.check_results();
  of.check_gradients([&](int64_t) { return Upstream{of.factor(), 0, 0, 0}; });
  CHECK(of.x.memory.rest_equals(before));
  if (!of.c.in_place) another_upstream(of);
}

template <class T>
void random_call(const RowShape& shape, bool plain, Random& random) {
  const bool once = random.chance(0.4);
  CrossEntropyTest<Cuda, T> of(random_case(shape, plain, once, random), random, once ? " one pass" : "");
  if (once)
    one_pass(of);
  else
    of.run();
}

template <class T>
void random_calls() {
  Random random(300 + (int)Format<T>::dtype);
  for (int64_t classes : kRowClasses)
    for (int i = 0; i < 6; ++i)
      random_call<T>(classes > 500 ? RowShape{2, 2, classes} : RowShape{3, 5, classes}, i % 3 == 0, random);
}

// Two blocks and more of losses; one of a cluster's blocks, and more than shared memory holds, of classes.
template <class T>
void many() {
  Random random(350 + (int)Format<T>::dtype);
  random_call<T>({1, 9001, 2}, true, random);
  for (int64_t bytes : {70 << 10, 180 << 10})
    for (bool plain : {true, false}) random_call<T>({1, 1, bytes / (int64_t)sizeof(T) + 5}, plain, random);
}

}  // namespace

TEST(cross_entropy) {
  each_dtype([](auto element) { random_calls<decltype(element)>(); });
  many<float>();
  many<bf16>();
}

}  // namespace test
