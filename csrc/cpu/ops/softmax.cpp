// softmax, log_softmax and logsumexp on the CPU.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "shared/softmax_ops.h"

namespace rf {
namespace {

struct CpuSoftmax : Cpu {
  using Cpu::Cpu;
  static constexpr SoftmaxOp forward = SoftmaxOp::forward, backward = SoftmaxOp::backward;
  static constexpr SoftmaxOp logsumexp_forward = SoftmaxOp::logsumexp_forward;
  static constexpr SoftmaxOp logsumexp_backward = SoftmaxOp::logsumexp_backward;

  void run(SoftmaxOp op, DType dtype, const SoftmaxProblem& p, int64_t rows) const { softmax(op, dtype, {p}, rows); }
};

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_softmax<CpuSoftmax>(m, isa_in_use); }

}  // namespace rf
