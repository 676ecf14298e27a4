// One row of cross-entropy in double precision, written from the definitions: every output, and every gradient by the
// chain rule through each output by itself. `units` members bound the error of the kernels' arithmetic, in units of
// its rounding; they are sizes of what is added up, not estimates of what happens.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

namespace test {

// Sums have more digits, so that the reference is not what fails in double precision.
using Sum = long double;

struct Options {
  bool probabilities = false, weighted = false;
  int64_t ignore_index = -100;
  double smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1;
};

struct Row {
  std::vector<double> x, t, w;  // t: probabilities or one-hot (zeros where ignored); w: class weights, ones without
  int64_t target = -1;          // -1: probabilities
  bool ignored = false;
};

struct Result {
  std::vector<double> z, log_p;
  double max, log_sum, lse, entropy, logprob, loss, denominator;
  int64_t argmax;
  double z_units;  // error of a logit z
  double loss_units, lse_units, entropy_units, logprob_units;
};

struct Upstream {
  double loss = 0, lse = 0, entropy = 0, logprob = 0;
};

struct Gradient {
  std::vector<double> x, t, x_units, t_units;
};

// The weight of class j in the loss.
inline double loss_weight(const Row& r, const Options& o, size_t j) {
  if (r.ignored) return 0;
  return r.w[j] * ((1 - o.smoothing) * r.t[j] + o.smoothing / (double)r.x.size());
}

inline Result cross_entropy_row(const Row& r, const Options& o) {
  const size_t n = r.x.size();
  Result out = {};
  out.max = -kInfinity;
  double largest = 0;
  for (size_t j = 0; j < n; ++j) {
    double z = r.x[j] * o.logit_scale;
    if (o.softcap != 0) z = o.softcap * std::tanh(z / o.softcap);
    out.z.push_back(z);
    if (z > out.max) {
      out.max = z;
      out.argmax = (int64_t)j;
    }
    if (std::isfinite(z)) largest = std::max(largest, std::fabs(z));
  }
  Sum sum = 0, loss = 0, entropy = 0, logprob = 0;
  for (double z : out.z) sum += std::exp(z - out.max);
  out.log_sum = (double)std::log(sum);
  out.lse = out.max + out.log_sum;
  // tanh errs by a few units of its result, up to the cap, and what comes before it by units of its argument.
  out.z_units = (o.softcap != 0 || o.logit_scale != 1) ? 6 * largest + 1e-3 : 0;
  const double sums = sum_error((int64_t)n) + 4 * out.z_units + 2 * out.log_sum;  // of a log-probability, first part
  out.lse_units = sums + std::fabs(out.max);

  for (size_t j = 0; j < n; ++j) {
    const double log_p = out.z[j] - out.max - out.log_sum, p = std::exp(log_p), q = loss_weight(r, o, j);
    const double size = p == 0 ? 0 : 2 * std::fabs(log_p);
    out.log_p.push_back(log_p);
    if (p != 0) entropy -= p * log_p;
    out.entropy_units += p == 0 ? 0 : p * (sums + size) * (2 + std::fabs(log_p));
    if (q != 0) {
      loss -= q * log_p;
      out.loss_units +=
          std::fabs(q) * (2 * sums + 2 * size + sum_error((int64_t)n) * (std::fabs(out.z[j] - out.max) + out.log_sum));
    }
    if (!r.ignored && r.t[j] != 0) {
      logprob += r.t[j] * log_p;
      out.logprob_units += std::fabs(r.t[j]) * (2 * sums + 2 * size +
                                                sum_error((int64_t)n) * (std::fabs(out.z[j] - out.max) + out.log_sum));
    }
  }
  out.loss = (double)loss;
  out.entropy = (double)entropy;
  out.logprob = (double)logprob;
  if (!r.ignored) {
    out.loss += o.z_loss * out.lse * out.lse;
    out.loss_units += std::fabs(o.z_loss * out.lse) * (3 * out.lse_units + 3 * std::fabs(out.lse));
    out.denominator = r.target < 0 ? 1 : r.w[(size_t)r.target];
  }
  return out;
}

// Probabilities whose logarithm is below `least_log_p` may count as zero.
inline Gradient cross_entropy_gradient(const Row& r, const Options& o, const Result& f, const Upstream& up,
                                       double least_log_p = -kInfinity) {
  const size_t n = r.x.size();
  Gradient g;
  Sum q_total = 0, t_total = 0;
  double q_size = 0, t_size = 0;
  for (size_t j = 0; j < n; ++j) {
    q_total += loss_weight(r, o, j);
    q_size += std::fabs(loss_weight(r, o, j));
    t_total += r.ignored ? 0 : r.t[j];
    t_size += r.ignored ? 0 : std::fabs(r.t[j]);
  }
  const double q_sum = (double)q_total, t_sum = (double)t_total;
  const double sums = sum_error((int64_t)n) + 4 * f.z_units + 2 * f.log_sum, loss_up = r.ignored ? 0 : up.loss;
  for (size_t j = 0; j < n; ++j) {
    const double p = std::exp(f.log_p[j]), q = loss_weight(r, o, j), t = r.ignored ? 0 : r.t[j];
    const double own = p == 0 ? 0 : std::fabs(f.log_p[j]);
    const double log_p = p == 0 ? 0 : f.log_p[j];
    double dz = loss_up * (q_sum * p - q + 2 * o.z_loss * f.lse * p);
    dz += up.lse * p;
    dz += up.entropy * -p * (log_p + f.entropy);
    dz += up.logprob * (t - t_sum * p);
    // Every product above with its factors' errors.
    double size = std::fabs(loss_up) * (q_size + 2 * std::fabs(o.z_loss * f.lse)) + std::fabs(up.lse) +
                  std::fabs(up.logprob) * t_size;
    double units =
        p * (sums + 2 * own + sum_error((int64_t)n)) * size + 8 * (std::fabs(loss_up * q) + std::fabs(up.logprob * t));
    units += p * std::fabs(loss_up * 2 * o.z_loss) * f.lse_units;
    units += p * std::fabs(up.entropy) * ((sums + 2 * own) * (1 + own + f.entropy) + f.entropy_units);
    if (f.log_p[j] < least_log_p) units += p * (size + std::fabs(up.entropy) * (own + f.entropy)) / kUnit<double>;
    const double u = o.softcap != 0 ? f.z[j] / o.softcap : 0, slope = (1 - u * u) * o.logit_scale;
    g.x.push_back(dz * slope);
    // 1 - u^2 errs by units of one, however small it is; so does a z that rounding moved.
    units = units * std::fabs(slope) +
            std::fabs(dz * o.logit_scale) * (o.softcap != 0 ? 8 * (1 + f.z_units / o.softcap) : 2);
    g.x_units.push_back(units);

    const double slope_t = loss_up * (1 - o.smoothing) * r.w[j] - up.logprob;
    g.t.push_back(-f.log_p[j] * slope_t);
    const double size_t_ = std::fabs(loss_up * (1 - o.smoothing) * r.w[j]) + std::fabs(up.logprob);
    g.t_units.push_back(size_t_ * (sums + 8 * (std::fabs(f.log_p[j]) + f.log_sum)));
  }
  return g;
}

}  // namespace test
