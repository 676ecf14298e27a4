// Activations and their derivatives, of accumulators. As csrc/cpu/kernels/activation.inl.h has them.
#pragma once
#include "cuda/device/math.cuh"

namespace rf::cuda {

__device__ __forceinline__ float erfc_of(float x) { return erfcf(x); }
__device__ __forceinline__ double erfc_of(double x) { return erfc(x); }

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exp_of<A>(-x));
}

// 1 - sigmoid(x) comes without cancellation. sigmoid(x) is 0 where exp(-x) overflows, and then the rest, by which it is
// multiplied where it is used, need only be finite.
template <class A>
__device__ __forceinline__ void sigmoid_and_rest(A x, A* y, A* rest) {
  const A e = exp_of<A>(-x), most = std::numeric_limits<A>::max();
  *y = A(1) / (A(1) + e);
  *rest = (e > most ? most : e) * *y;
}

// The normal distribution function, to full precision in its lower tail too.
template <class A>
__device__ __forceinline__ A normal_cdf(A x) {
  return A(0.5) * erfc_of(x * A(-0.70710678118654752440));
}

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh(x) = x (1 + tanh(half of it)) / 2 = x sigmoid(it).
constexpr double kGeluTanhLinear = 1.5957691216057308, kGeluTanhCubic = 0.044715 * kGeluTanhLinear;
template <class A>
__device__ __forceinline__ A gelu_tanh_argument(A x) {
  return x * (x * x * A(kGeluTanhCubic) + A(kGeluTanhLinear));
}

template <Activation act, class A>
__device__ __forceinline__ A activated(A x) {
  if constexpr (act == Activation::relu)
    return x < A(0) ? A(0) : x;  // NaN gets through
  else if constexpr (act == Activation::gelu)
    return x * normal_cdf(x);
  else if constexpr (act == Activation::gelu_tanh)
    return x * sigmoid(gelu_tanh_argument(x));
  else if constexpr (act == Activation::silu)
    return x * sigmoid(x);
  else if constexpr (act == Activation::sigmoid)
    return sigmoid(x);
  else if constexpr (act == Activation::tanh)
    return tanh_of(x);
  else
    return x;
}

// g act'(z) from what was saved: the output (relu, sigmoid, tanh) or z itself. relu chooses instead of multiplying: as
// torch's, it passes the gradient where the output is NaN, and gives 0 where it is 0, even for an infinite gradient.
// The others tend to 0 or g at both ends, where z may be infinite: what multiplies z is 0 or 1 well before its bounds.
template <Activation act, class A>
__device__ __forceinline__ A through_activation(A g, A s) {
  const auto within = [&](A bound) { return s < -bound ? -bound : s > bound ? bound : s; };  // NaN stays
  if constexpr (act == Activation::relu) {
    return s <= A(0) ? A(0) : g;
  } else if constexpr (act == Activation::sigmoid) {
    return g * (s * (A(1) - s));
  } else if constexpr (act == Activation::tanh) {
    return g * (A(1) - s * s);
  } else if constexpr (act == Activation::silu) {
    const A z = within(A(1000));
    A y, rest;
    sigmoid_and_rest(z, &y, &rest);
    return g * (y * (A(1) + z * rest));
  } else if constexpr (act == Activation::gelu) {
    const A z = within(A(40));
    return g * (normal_cdf(s) + z * exp_of<A>(A(-0.5) * z * z) * A(0.39894228040143267794));
  } else if constexpr (act == Activation::gelu_tanh) {
    const A z = within(A(40));
    A y, rest;
    sigmoid_and_rest(gelu_tanh_argument(z), &y, &rest);
    return g * (y * (A(1) + z * rest * (z * z * A(3 * kGeluTanhCubic) + A(kGeluTanhLinear))));
  } else {
    return g;
  }
}

// f(Is<act>()) for an activation that is known at run time only: the choice is made once, not for each element.
template <Activation act>
struct Is {
  static constexpr Activation value = act;
};
template <class F>
__device__ __forceinline__ void with_activation(Activation act, F&& f) {
  switch (act) {
#define RF_CASE(name, saved) \
  case Activation::name:     \
    return f(Is<Activation::name>());
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}

template <class A, int n>
__device__ __forceinline__ void activate(Activation act, A (&x)[n]) {
  with_activation(act, [&](auto is) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = activated<decltype(is)::value>(x[i]);
  });
}

}  // namespace rf::cuda
