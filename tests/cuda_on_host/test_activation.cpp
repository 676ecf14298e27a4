// Activations and their derivatives with column sums, against double precision.
#include "activation_cases.h"
#include "cuda/launch.h"
#include "device_memory.h"

namespace test {
namespace {

struct Cuda {
  template <class T>
  using Sum = T;

  template <class... Buffers>
  static void backward(rf::DType dtype, const rf::ActivationBackward& p, int64_t rows, void* sums,
                       Buffers&... buffers) {
    const int64_t bytes = rf::cuda::activation_backward_workspace(dtype, rows, p.columns);
    Buffer<char> workspace(bytes);
    const LentAll<Buffers..., Buffer<char>> lent(buffers..., workspace);
    rf::cuda::launch_activation_backward(dtype, {p, rows, sums, bytes ? workspace.data() : nullptr}, nullptr);
  }
};

// z and y aligned alike and not.
template <class T>
void forward(Activation activation, Random& random) {
  for (const bool in_place : {false, true})
    for (const int64_t shift : {0, 1, 5}) {
      describe("activation %s %s forward, shift %lld%s", name_of(activation), Format<T>::name, (long long)shift,
               in_place ? ", in place" : "");
      const Buffer<T> x = preactivations<T>(600, 200, shift, random);
      Buffer<T> y(x.count(), Guard::behind, random.integer(0, 1) * shift);
      if (in_place)
        for (int64_t j = 0; j < x.count(); ++j) y[j] = x.data()[j];
      {
        const Lent lx(x), ly(y);
        rf::cuda::launch_activation_forward(Format<T>::dtype, in_place ? y.data() : x.data(), y.data(), x.count(),
                                            activation, nullptr);
      }
      check_activation("y", activation, x, y);
    }
}

constexpr GradRows kGradRows[] = {GradRows::adjacent,  GradRows::padded,     GradRows::expanded,
                                  GradRows::collapsed, GradRows::one_number, GradRows::transposed};

// Sums of nothing: zero, and without a single element to read.
template <class T>
void nothing() {
  describe("activation %s of nothing", Format<T>::name);
  Buffer<T> sums(5);
  {
    const Lent ls(sums);
    rf::cuda::launch_activation_backward(
        Format<T>::dtype, {{nullptr, nullptr, {1, 5, 0, 1}, nullptr, 5, Activation::none}, 0, sums.data(), nullptr},
        nullptr);
    rf::cuda::launch_activation_forward(Format<T>::dtype, nullptr, nullptr, 0, Activation::relu, nullptr);
  }
  CHECK(rf::cuda::activation_backward_workspace(Format<T>::dtype, 5, 0) == 0);
  for (int64_t j = 0; j < 5; ++j) CHECK(sums.value(j) == 0);
}

template <class T>
void all() {
  Random random(300 + (int)Format<T>::dtype);
  for (const Activation a : kActivations) {
    forward<T>(a, random);
    // One vector of columns and several, one part of the rows and several, every way the gradient may lie.
    for (const GradRows kind : kGradRows)
      activation_backward<Cuda, T>(a, 5, 13, kind, a != Activation::none, random.chance(0.7), random);
    activation_backward<Cuda, T>(a, 3, 300, GradRows::adjacent, true, true, random);
  }
  activation_backward<Cuda, T>(Activation::none, 70, 3, GradRows::adjacent, false, true, random);
  activation_backward<Cuda, T>(Activation::silu, 2100, 5, GradRows::padded, true, true,
                               random);  // 256 or 128 rows for a block's pass
  activation_backward<Cuda, T>(Activation::relu, 1, 1, GradRows::adjacent, true, true, random);
  nothing<T>();
}

}  // namespace

TEST(activation) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
