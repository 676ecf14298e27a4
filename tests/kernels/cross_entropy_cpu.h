// The CPU's cross-entropy for cross_entropy_cases.h and cross_entropy_edge_cases.h.
#pragma once
#include "cpu/drivers/drivers.h"
#include "cross_entropy_cases.h"

namespace test {

struct Cpu {
  using Memory = AnyMemory;
  template <class T>
  static double least_log_p() {
    return std::is_same_v<rf::acc_t<T>, double> ? -689.9 : -68.9;
  }
  static rf::CrossEntropyArgs args(const rf::CrossEntropyProblem& p, double class_weight_sum) {
    return {p, class_weight_sum, nullptr, nullptr};
  }
  static rf::CrossEntropyGrads grads(const rf::CrossEntropyBackward& g, const double* mean_of, bool stream) {
    return {g, mean_of ? 1 / *mean_of : 1, stream};
  }
  template <class T>
  static Sums forward(const rf::CrossEntropyProblem& p, int64_t rows, double class_weight_sum,
                      const rf::CrossEntropyOutputs& out, Reduction) {
    const auto s = rf::cross_entropy_forward(Format<T>::dtype, args(p, class_weight_sum), out, rows);
    return {s.loss, s.weight, s.bad_row};
  }
  template <class T>
  static void backward(const rf::CrossEntropyProblem& p, int64_t rows, double class_weight_sum,
                       const rf::CrossEntropyBackward& g, const double* mean_of, bool stream) {
    rf::cross_entropy_backward(Format<T>::dtype, args(p, class_weight_sum), grads(g, mean_of, stream), rows);
  }
};

}  // namespace test
