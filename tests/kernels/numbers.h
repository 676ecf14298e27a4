// Number formats in plain arithmetic (independent of the kernels' own conversions), random numbers, and comparison
// against a reference with a bound on the error.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "check.h"
#include "cpu/tuning.h"
#include "shared/types.h"

namespace test {

using rf::bf16;
using rf::f16;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// digits of the significand, exponent of the least subnormal, largest finite value
template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* name = "f32";
  static constexpr rf::DType dtype = rf::DType::f32;
  static constexpr int digits = 24, least = -149;
  static constexpr double largest = FLT_MAX;
};
template <>
struct Format<double> {
  static constexpr const char* name = "f64";
  static constexpr rf::DType dtype = rf::DType::f64;
  static constexpr int digits = 53, least = -1074;
  static constexpr double largest = DBL_MAX;
};
template <>
struct Format<bf16> {
  static constexpr const char* name = "bf16";
  static constexpr rf::DType dtype = rf::DType::bf16;
  static constexpr int digits = 8, least = -133;
  static constexpr double largest = 0x1.fep127;
};
template <>
struct Format<f16> {
  static constexpr const char* name = "f16";
  static constexpr rf::DType dtype = rf::DType::f16;
  static constexpr int digits = 11, least = -24;
  static constexpr double largest = 65504;
};

// Calls `test` with an element of each dtype, or of the one that the environment's DTYPE names.
template <class F>
void each_dtype(F&& test) {
  const char* only = std::getenv("DTYPE");
#define RF_CALL(name, type, ...) \
  if (!only || !*only || !std::strcmp(only, #name)) test(type{});
  RF_EACH_DTYPE(RF_CALL, )
#undef RF_CALL
}

// Exponent of the unit in the last place of x.
template <class T>
int ulp_exponent(double x) {
  if (x == 0) return Format<T>::least;
  return std::max(std::ilogb(x) + 1 - Format<T>::digits, Format<T>::least);
}

// The nearest value of T, ties to even.
template <class T>
double rounded(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int e = ulp_exponent<T>(x);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -e)), e);
  return std::fabs(y) > Format<T>::largest ? std::copysign(kInfinity, x) : y;
}

inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }
inline double to_double(int64_t x) { return (double)x; }
inline double to_double(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline double to_double(f16 x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? kNaN : kInfinity)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return sign ? -magnitude : magnitude;
}

template <class T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int64_t>) {
    return (T)x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    const float f = (float)rounded<bf16>(x);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return {(uint16_t)(u >> 16 | (x != x ? 0x40 : 0))};
  } else {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return {(uint16_t)(sign | 0x7e00)};
    const double y = std::fabs(rounded<f16>(x));
    if (y > 65504) return {(uint16_t)(sign | 0x7c00)};
    if (y < 0x1p-14) return {(uint16_t)(sign | (int)std::ldexp(y, 24))};
    const int e = std::ilogb(y);
    return {(uint16_t)(sign | ((e + 15) << 10 | ((int)std::ldexp(y, 10 - e) - 1024)))};
  }
}

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform() { return (double)(next() >> 11) * 0x1p-53; }
  double between(double a, double b) { return a + (b - a) * uniform(); }
  int64_t integer(int64_t a, int64_t b) { return a + (int64_t)(next() % (uint64_t)(b - a + 1)); }  // both included
  bool chance(double p) { return uniform() < p; }
  template <class T, int64_t n>
  T pick(const T (&from)[n]) {
    return from[integer(0, n - 1)];
  }
  // Roughly normal, with a few values that stand out: else every probability is nearly zero and nothing is tested.
  double spiky() {
    double x = 2 * (uniform() + uniform() + uniform()) - 3;
    return chance(0.05) ? 8 * x : x;
  }

 private:
  uint64_t state_;
};

// Half an ulp of the arithmetic that kernels do for T.
template <class T>
constexpr double kUnit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
// Relative error bound, in units, of adding n terms a lane at a time: terms that are all rounded the same way lose half
// a unit each, up to tuning::kChain of them, when the sum is put aside.
inline double sum_error(int64_t n) {
  const double chain = (double)std::min<int64_t>(n, rf::tuning::kChain), chains = (double)n / rf::tuning::kChain;
  return 8 + (chain + chains) / 2;
}
// The same without that limit, for terms whose rounding errors go either way.
inline double long_sum_error(int64_t n) { return 8 + 3 * std::sqrt((double)n); }

// Compares the elements of one result and counts as one check. `units` bound the error of the arithmetic; the result's
// own rounding to T is allowed besides, and what underflow may cost: exp gives zero instead of subnormal numbers.
template <class T>
class Comparison {
 public:
  explicit Comparison(const char* what) : what_(what) {}
  Comparison(const Comparison&) = delete;
  ~Comparison() {
    if (bad_ == 0)
      check(true, "%s", "");
    else
      check(false, "%s: %lld of %lld wrong, first [%lld]: got %.17g, expected %.17g +- %.3g", what_, (long long)bad_,
            (long long)seen_, (long long)index_, got_, expected_, bound_);
  }
  void add(double got, double expected, double units, int64_t index) {
    ++seen_;
    const double half_ulp = std::ldexp(1, -Format<T>::digits), smallest = std::ldexp(1, Format<T>::least);
    const double underflow = std::is_same_v<T, double> ? 0x1p-1010 : 0x1p-114;
    const double bound = 1.001 * (units * kUnit<T> + half_ulp * std::fabs(expected)) + smallest + underflow;
    const bool ok = expected != expected                       ? got != got
                    : std::fabs(expected) > Format<T>::largest ? got == std::copysign(kInfinity, expected)
                                                               : std::fabs(got - expected) <= bound;
    if (ok) return;
    if (bad_++ == 0) {
      index_ = index;
      got_ = got;
      expected_ = expected;
      bound_ = bound;
    }
  }

 private:
  const char* what_;
  int64_t seen_ = 0, bad_ = 0, index_ = 0;
  double got_ = 0, expected_ = 0, bound_ = 0;
};

}  // namespace test
