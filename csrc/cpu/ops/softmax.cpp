// softmax, log_softmax and logsumexp on the CPU.
#include "shared/torch_api.h"

#include "cpu/drivers/drivers.h"
#include "cpu/ops/outputs.h"
#include "cpu/ops/traced.h"
#include "shared/softmax_ops.h"

namespace rf {
namespace {

struct Cpu {
  static constexpr SoftmaxOp forward = SoftmaxOp::forward, backward = SoftmaxOp::backward;
  static constexpr SoftmaxOp logsumexp_forward = SoftmaxOp::logsumexp_forward;
  static constexpr SoftmaxOp logsumexp_backward = SoftmaxOp::logsumexp_backward;

  explicit Cpu(const Tensor& t) : dtype(dtype_of(t.scalar_type())) {}
  Tensor empty(at::IntArrayRef sizes, at::TensorOptions options) const { return empty_result(sizes, options); }
  void run(SoftmaxOp op, const SoftmaxProblem& p, int64_t rows) const { softmax(op, dtype, {p}, rows); }

  DType dtype;
};

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_softmax<Cpu>(m, isa_in_use); }

}  // namespace rf
