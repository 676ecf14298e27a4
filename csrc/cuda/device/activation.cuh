// Activations and their derivatives, of accumulators. As csrc/cpu/gemm.inl.h and elementwise.inl.h have them.
#pragma once
#include "math.cuh"

namespace rf::cuda {

__device__ __forceinline__ float erfc_of(float x) { return erfcf(x); }
__device__ __forceinline__ double erfc_of(double x) { return erfc(x); }

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exp_of<A>(-x));
}

// 1 - sigmoid(x) comes without cancellation.
template <class A>
__device__ __forceinline__ void sigmoid_and_rest(A x, A* y, A* rest) {
  const A most = sizeof(A) == 4 ? 85 : 700;
  const A e = exp_of<A>(-x < most ? -x : most);  // finite
  *y = A(1) / (A(1) + e);
  *rest = e * *y;
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

// act'(z) from what was saved: the output (relu, sigmoid, tanh) or z itself.
template <Activation act, class A>
__device__ __forceinline__ A activation_slope(A s) {
  if constexpr (act == Activation::relu) {
    return s > A(0) ? A(1) : A(0);
  } else if constexpr (act == Activation::sigmoid) {
    return s * (A(1) - s);
  } else if constexpr (act == Activation::tanh) {
    return A(1) - s * s;
  } else if constexpr (act == Activation::silu) {
    A y, rest;
    sigmoid_and_rest(s, &y, &rest);
    return y * (A(1) + s * rest);
  } else if constexpr (act == Activation::gelu || act == Activation::gelu_tanh) {
    // z times the density vanishes at both ends, where z may be infinite; NaN passes both comparisons.
    const A z = s < A(-40) ? A(-40) : s > A(40) ? A(40) : s;
    if constexpr (act == Activation::gelu)
      return normal_cdf(s) + z * exp_of<A>(A(-0.5) * z * z) * A(0.39894228040143267794);
    A y, rest;
    sigmoid_and_rest(gelu_tanh_argument(z), &y, &rest);
    return y * (A(1) + z * rest * (z * z * A(3 * kGeluTanhCubic) + A(kGeluTanhLinear)));
  } else {
    return A(1);
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
#define RF_CASE(name)    \
  case Activation::name: \
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
