// The loss of an observation and its derivatives in double precision, for both devices.
#pragma once
#include <cmath>

#include "memory.h"

namespace test {

using rf::Family;
#define RF_VALUE(name) Family::name,
constexpr Family kFamilies[] = {RF_EACH_FAMILY(RF_VALUE)};
#undef RF_VALUE

// A loss, its derivatives by the prediction and by a gaussian's variance, and what bounds their errors in units.
struct Expected {
  double loss, slope, variance, loss_error, slope_error, variance_error;
};
// scale: 1 / variance of a gaussian, 2 of squared, the weight of bernoulli's positives. The prediction is off by
// `eta_error` units, the constant by `constant_error` beside its own rounding.
inline Expected expect(Family family, double eta, double y, double scale, double constant, double eta_error,
                       double constant_error) {
  const double r = eta - y, e = std::exp(-std::fabs(eta)), log1p = std::log1p(e);
  if (family == Family::bernoulli) {
    const double larger = 1 / (1 + e), smaller = e / (1 + e);
    const double up = eta < 0 ? smaller : larger, down = eta < 0 ? larger : smaller;
    const double positive = scale * y, negative = 1 - y;
    const double loss = negative * (std::fmax(eta, 0) + log1p) + positive * (std::fmax(-eta, 0) + log1p);
    const double slope = negative * up - positive * down;
    const double size = negative * up + positive * down;
    return {loss, slope, 0, 16 * loss + size * eta_error, 16 * size + (negative + positive) * up * down * eta_error, 0};
  }
  if (family == Family::poisson) {
    const double mean = std::exp(eta), relative = 8 + std::fabs(eta) + eta_error;
    return {mean - y * eta + constant,
            mean - y,
            0,
            mean * relative + std::fabs(y) * (4 * std::fabs(eta) + eta_error) + constant_error,
            mean * relative + 4 * std::fabs(y),
            0};
  }
  const double far = std::fabs(eta) + std::fabs(y) + eta_error;  // the difference may cancel
  return {0.5 * scale * r * r + constant,
          scale * r,
          0.5 * scale * (1 - scale * r * r),
          8 * scale * r * r + scale * std::fabs(r) * far + 2 * std::fabs(constant) + constant_error,
          scale * (8 * std::fabs(r) + far),
          scale * (2 + scale * (std::fabs(r) * far + 6 * r * r))};
}

}  // namespace test
