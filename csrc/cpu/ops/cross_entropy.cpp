// cross_entropy on the CPU.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/tuning.h"
#include "shared/cross_entropy_ops.h"

namespace rf {
namespace {

using Tensors = CrossEntropyTensors<CrossEntropyArgs>;

struct CpuCrossEntropy : Cpu {
  using Cpu::Cpu;
  static constexpr bool kSumsRows = false;

  static bool knows(const Tensor& grad, double value) { return grad.item<double>() == value; }

  Tensors tensors(const CrossEntropyOperands& given, const CrossEntropyOptions& o) const {
    Tensors t = cross_entropy_tensors<CrossEntropyArgs>(given, o);
    const bool smoothed = given.weight.has_value() && o.label_smoothing != 0;
    t.args.class_weight_sum = smoothed ? ordered_sum(t.weight) : (double)t.args.classes;
    return t;
  }

  CrossEntropyTotal forward(const Tensors& t, const CrossEntropyOptions& o, const CrossEntropyOutputs& out,
                            OptionalType total_type) const {
    CrossEntropyPartial sums = cross_entropy_forward(t.dtype, t.args, out, t.rows);
    check_row(t.args, sums.bad_row);
    if (t.weight.defined()) sums.weight = denominator_of(t);
    return {total_type ? reduced(o, sums.loss, sums.weight, *total_type) : Tensor(), number(sums.weight, at::kDouble)};
  }

  CrossEntropyTotal forward_backward(const Tensors& t, const CrossEntropyOptions& o, const CrossEntropyBackward& given,
                                     int64_t bytes, double upstream, at::ScalarType type) const {
    const double denominator = denominator_of(t), scale = o.reduction == at::Reduction::Mean ? 1 / denominator : 1;
    const float single = (float)upstream;
    CrossEntropyGrads g = {given, scale, bytes >= tuning::kStreamBytes};
    g.loss = t.dtype == DType::f64 ? (const void*)&upstream : &single;
    const CrossEntropyPartial sums = cross_entropy_forward_backward(t.dtype, t.args, {}, g, t.rows);
    check_row(t.args, sums.bad_row);
    return {reduced(o, sums.loss, denominator, type), number(denominator, at::kDouble)};
  }

  void backward(const Tensors& t, const CrossEntropyBackward& g, int64_t bytes, const double* denominator,
                double /*unless*/) const {
    const CrossEntropyGrads grads = {g, denominator ? 1.0 / *denominator : 1.0, bytes >= tuning::kStreamBytes};
    check_row(t.args, cross_entropy_backward(t.dtype, t.args, grads, t.rows));
  }

 private:
  static void check_row(const CrossEntropyArgs& a, int64_t bad) {
    RF_CHECK(TORCH_CHECK_INDEX, bad < 0, "cross_entropy", "target", c10::str("classes from 0 to ", a.classes - 1),
             a.target[bad]);
  }
  // Of rows whose classes' weights are to be summed in the same order wherever the mean is needed.
  static double denominator_of(const Tensors& t) { return cross_entropy_denominator(t.dtype, t.args, t.rows); }
  static Tensor reduced(const CrossEntropyOptions& o, double loss, double denominator, at::ScalarType type) {
    return number(o.reduction == at::Reduction::Mean ? mean_of(loss, denominator) : loss, type);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_cross_entropy<CpuCrossEntropy>(m, isa_in_use); }

}  // namespace rf
