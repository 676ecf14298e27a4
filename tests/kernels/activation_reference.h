// The activations and their derivatives in double precision, from their definitions, with the size of the kernels'
// rounding errors in units.
#pragma once
#include <cmath>

#include "numbers.h"

namespace test {

using rf::Activation;
#define RF_VALUE(name, saved) Activation::name,
constexpr Activation kActivations[] = {RF_EACH_ACTIVATION(RF_VALUE)};
#undef RF_VALUE

constexpr double kPi = 3.14159265358979323846;
inline double gelu_tanh_argument(double x) { return std::sqrt(2 / kPi) * (x + 0.044715 * x * x * x); }
inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }

inline double activate(Activation a, double x) {
  switch (a) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x > 0 || x != x ? x : 0;
    case Activation::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    // 1 + tanh(u) = 2 logistic(2 u), which does not cancel
    case Activation::gelu_tanh:
      return x * logistic(2 * gelu_tanh_argument(x));
    case Activation::silu:
      return x * logistic(x);
    case Activation::sigmoid:
      return logistic(x);
    case Activation::tanh:
      return std::tanh(x);
  }
  return 0;
}

// The exponent -x^2 / 2 of the Gaussian (or erfc's argument), and that of the logistic function, are rounded before exp
// is taken, here as well as in the kernels. gelu_tanh's is 2 u: u is rounded in four steps or more, here and there.
inline double activate_units(Activation a, double x) {
  const double y = std::fabs(activate(a, x));
  switch (a) {
    case Activation::none:
    case Activation::relu:
      return 0;
    case Activation::gelu:
      return std::isfinite(x) ? y * (8 + 4 * x * x) : 0;
    case Activation::gelu_tanh:
      return std::isfinite(x) ? y * (8 + 2 * 8 * std::fabs(gelu_tanh_argument(x))) : 0;
    default:
      return 8 * y;
  }
}

// act'(z), from the output for relu, sigmoid and tanh, else from z.
inline double derivative(Activation a, double s) {
  switch (a) {
    case Activation::none:
      return 1;
    case Activation::relu:
      return s > 0;
    case Activation::sigmoid:
      return s * (1 - s);
    case Activation::tanh:
      return 1 - s * s;
    case Activation::silu:
      return logistic(s) * (1 + s * logistic(-s));
    case Activation::gelu:
      if (std::isinf(s)) return s > 0;
      return 0.5 * std::erfc(-s / std::sqrt(2.0)) + s * std::exp(-s * s / 2) / std::sqrt(2 * kPi);
    case Activation::gelu_tanh: {
      if (std::isinf(s)) return s > 0;
      const double u = 2 * gelu_tanh_argument(s), du = 2 * std::sqrt(2 / kPi) * (1 + 3 * 0.044715 * s * s);
      return logistic(u) * (1 + s * logistic(-u) * du);
    }
  }
  return 0;
}

inline double derivative_units(Activation a, double s) {
  const double x = std::fabs(s);
  if (!std::isfinite(s)) return 0;
  switch (a) {
    case Activation::none:
    case Activation::relu:
      return 0;
    case Activation::sigmoid:
      return 4 * x;
    case Activation::tanh:
      return 4;
    case Activation::silu:
      return 8 * logistic(s) * (1 + x);
    case Activation::gelu:
      return (0.5 * std::erfc(-s / std::sqrt(2.0)) + x * std::exp(-s * s / 2)) * (8 + s * s);
    case Activation::gelu_tanh: {
      const double u = 2 * gelu_tanh_argument(s), du = 2 * std::sqrt(2 / kPi) * (1 + 3 * 0.044715 * s * s);
      return logistic(u) * (1 + x * du * (logistic(-u) + kUnit<float>)) * (8 + 4 * std::fabs(u));
    }
  }
  return 0;
}

// The kernels' exp is 0 before it would be subnormal in float, and so is the logistic function's lower tail.
inline double derivative_tail(Activation a, double s) {
  const double x = std::fmin(std::fabs(s), 100), end = std::exp(-86.98);
  if (a == Activation::silu) return end * (1 + x);
  return a == Activation::gelu_tanh ? end * x * (1.6 + 0.22 * x * x) : 0;
}

}  // namespace test
