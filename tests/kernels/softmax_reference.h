// The softmax family in double precision, and what bounds the errors of kernels, for both devices.
#pragma once
#include <cmath>
#include <vector>

#include "layouts.h"
#include "shared/problems.h"

namespace test {

struct Moments {
  double max, log_sum;  // log of the sum of exp(x - max)
};
inline Moments moments(const std::vector<double>& x) {
  double m = -kInfinity;
  long double sum = 0;  // more digits than any kernel has
  for (double v : x) m = std::fmax(m, v);
  for (double v : x) sum += std::exp(v - m);
  return {m, (double)std::log(sum)};
}

// All of a call but gradients and results of rows.
template <class T>
rf::SoftmaxProblem softmax_problem(const Rows<T>& in, Rows<T>* out, bool log) {
  rf::SoftmaxProblem p = {};
  p.input = in.memory.data();
  p.in = p.grad_in = in.layout;
  p.out = {1, 0, 0, 1};
  if (out) {
    p.output = out->memory.data();
    p.out = out->layout;
  }
  p.classes = in.shape.classes;
  p.log = log;
  return p;
}

template <class T>
void check_softmax(const Rows<T>& x, Rows<T>& y, bool log) {
  Comparison<T> compare("y");
  const double sum = sum_error(x.shape.classes);
  for (int64_t r = 0; r < x.shape.rows(); ++r) {
    const std::vector<double> row = x.row(r);
    const Moments m = moments(row);
    for (int64_t c = 0; c < x.shape.classes; ++c) {
      const double t = row[c] - m.max - m.log_sum, size = std::fabs(row[c] - m.max) + m.log_sum;
      const double expected = log ? t : std::exp(t);
      compare.add(y.result(r, c), expected, (log ? 1 : expected) * (sum + 2 * size), y.at(r, c));
    }
  }
}

// g is the gradient of the result y.
template <class T>
void check_softmax_backward(const Rows<T>& y, const Rows<T>& g, Rows<T>& dx, bool log) {
  Comparison<T> compare("dx");
  for (int64_t r = 0; r < y.shape.rows(); ++r) {
    long double total = 0;
    double size = 0;
    for (int64_t c = 0; c < y.shape.classes; ++c) {
      const double term = log ? g.value(r, c) : g.value(r, c) * y.value(r, c);
      total += term;
      size += std::fabs(term);
    }
    const double sum = (double)total;
    size *= sum_error(y.shape.classes);
    for (int64_t c = 0; c < y.shape.classes; ++c) {
      const double yv = y.value(r, c), gv = g.value(r, c), p = log ? std::exp(yv) : yv;
      const double expected = log ? gv - p * sum : p * (gv - sum);
      const double units = log ? 4 * std::fabs(gv) + p * size * (2 - yv) : std::fabs(p) * (4 * std::fabs(gv) + size);
      compare.add(dx.result(r, c), expected, units, dx.at(r, c));
    }
  }
}

template <class T, class A>
void check_logsumexp(const Rows<T>& x, Buffer<A>& lse) {
  Comparison<A> compare("lse");
  for (int64_t r = 0; r < x.shape.rows(); ++r) {
    const Moments m = moments(x.row(r));
    compare.add(lse.result(r), m.max + m.log_sum, sum_error(x.shape.classes) + std::fabs(m.max) + m.log_sum, r);
  }
}

template <class T, class A>
void check_logsumexp_backward(const Rows<T>& x, const Buffer<A>& lse, const Buffer<A>& g, Rows<T>& dx) {
  Comparison<T> compare("dx");
  for (int64_t r = 0; r < x.shape.rows(); ++r)
    for (int64_t c = 0; c < x.shape.classes; ++c) {
      const double t = x.value(r, c) - lse.value(r), expected = g.value(r) * std::exp(t);
      compare.add(dx.result(r, c), expected, std::fabs(expected) * (8 + std::fabs(t)), dx.at(r, c));
    }
}

}  // namespace test
