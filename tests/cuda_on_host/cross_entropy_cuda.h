// CUDA's cross-entropy for cross_entropy_cases.h and cross_entropy_edge_cases.h.
#pragma once
#include "cross_entropy_cases.h"
#include "cuda/launch.h"
#include "device_memory.h"

namespace test {

struct Cuda {
  using Memory = LentMemory;
  template <class T>
  static double least_log_p() {
    return -kInfinity;
  }

  // What the kernels read and write besides the problem, in memory of its own.
  template <class T>
  struct Call {
    using A = rf::acc_t<T>;
    const rf::cuda::CrossEntropyRows rows;
    const Reduction reduction;
    const Buffer<A> class_weight_sum;
    Buffer<double> total{1}, weight_sum{1};
    Buffer<char> workspace;

    Call(const rf::CrossEntropyProblem& p, int64_t count, double weights, Reduction reduction)
        : rows{p, count, nullptr},
          reduction(reduction),
          class_weight_sum(input<A>(1, [&] { return weights; })),
          workspace(rf::cuda::cross_entropy_workspace(count)) {}
    rf::cuda::CrossEntropyRows args() const {
      return {rows, rows.rows, rows.class_weight ? class_weight_sum.data() : nullptr};
    }
    // Runs a launcher that gives results; the sum of the losses only if there are any.
    template <class Launch>
    Sums results(const rf::CrossEntropyOutputs& out, Launch&& launch) {
      const bool reduced = out.loss && reduction != Reduction::none;
      {
        const Lent lent[] = {Lent(class_weight_sum), Lent(total), Lent(weight_sum), Lent(workspace)};
        launch(args(),
               rf::cuda::CrossEntropyResults{out, reduced ? total.data() : nullptr, rf::DType::f64,
                                             reduction == Reduction::mean, weight_sum.data(), workspace.data()});
      }
      const double by = reduction == Reduction::mean ? weight_sum.value(0) : 1;
      return {reduced ? std::optional(total.value(0) * by) : std::nullopt, weight_sum.value(0), -1};
    }
  };

  template <class T>
  static Sums forward(const rf::CrossEntropyProblem& p, int64_t rows, double class_weight_sum,
                      const rf::CrossEntropyOutputs& out, Reduction reduction) {
    return Call<T>(p, rows, class_weight_sum, reduction).results(out, [](const auto& args, const auto& results) {
      rf::cuda::launch_cross_entropy_forward(Format<T>::dtype, args, results, nullptr);
    });
  }
  template <class T>
  static void backward(const rf::CrossEntropyProblem& p, int64_t rows, double class_weight_sum,
                       const rf::CrossEntropyBackward& g, const double* mean_of, bool = false, double unless = NAN) {
    const Call<T> call(p, rows, class_weight_sum, Reduction::none);
    const Buffer<double> weight_sum = input<double>(1, [&] { return mean_of ? *mean_of : kNaN; });
    const Lent lent[] = {Lent(call.class_weight_sum), Lent(weight_sum)};
    rf::cuda::launch_cross_entropy_backward(Format<T>::dtype, call.args(),
                                            {g, mean_of ? weight_sum.data() : nullptr, unless}, nullptr);
  }
};

}  // namespace test
