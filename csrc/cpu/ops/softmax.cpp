// softmax, log_softmax and logsumexp on the CPU: tensors to plain structs and allocation.
#include "cpu/drivers/drivers.h"
#include "cpu/ops/outputs.h"
#include "cpu/ops/traced.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

Tensor softmax_cpu(const Tensor& input, int64_t dim, bool log) {
  dim = check_softmax_forward(softmax_name(log), input, dim);
  const Tensor x = walkable(input, dim);
  Tensor y = advised(at::empty(input.sizes(), input.options()));
  if (y.numel() == 0) return y;
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.output = y.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(y, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.log = log;
  softmax(SoftmaxOp::forward, dtype_of(x.scalar_type()), a, rows_without(x, dim));
  return y;
}

Tensor softmax_backward_cpu(const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  dim = check_softmax_backward(grad, output, dim);
  const Tensor g = walkable(grad, dim), y = walkable(output, dim);
  Tensor dx = advised(at::empty(y.sizes(), y.options()));
  if (y.numel() == 0) return dx;
  SoftmaxArgs a = {};
  a.input = y.const_data_ptr();
  a.grad = g.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = *row_layout(y, dim);
  a.grad_in = *row_layout(g, dim);
  a.out = *row_layout(dx, dim);
  a.classes = y.dim() ? y.size(dim) : 1;
  a.log = log;
  softmax(SoftmaxOp::backward, dtype_of(y.scalar_type()), a, rows_without(y, dim));
  return dx;
}

// In accumulator type: the op rounds, backward does not have to.
Tensor logsumexp_cpu(const Tensor& input, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", input, dim);
  const Tensor x = walkable(input, dim);
  Tensor result = at::empty(reduced_sizes(x, dim, keepdim), x.options().dtype(acc_type(x.scalar_type())));
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = {1, 0, 0, 1};
  a.classes = x.dim() ? x.size(dim) : 1;
  a.row_result = result.mutable_data_ptr();
  softmax(SoftmaxOp::logsumexp_forward, dtype_of(x.scalar_type()), a, result.numel());
  return result;
}

// lse and grad have the shape that logsumexp returned, with or without the reduced dimension.
Tensor logsumexp_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& lse, int64_t dim) {
  dim = check_logsumexp_backward(grad, input, lse, dim);
  const Tensor x = walkable(input, dim);
  const auto acc = acc_type(x.scalar_type());
  const Tensor g = grad.to(acc).contiguous(), l = lse.to(acc).contiguous();
  Tensor dx = advised(at::empty(x.sizes(), x.options()));
  if (dx.numel() == 0) return dx;
  SoftmaxArgs a = {};
  a.input = x.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(dx, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.row_result = l.data_ptr();
  a.row_grad = g.const_data_ptr();
  softmax(SoftmaxOp::logsumexp_backward, dtype_of(x.scalar_type()), a, l.numel());
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<softmax_cpu>(m, "softmax_forward", isa_in_use);
  register_kernels<softmax_backward_cpu>(m, "softmax_backward", isa_in_use);
  register_kernels<logsumexp_cpu>(m, "logsumexp_forward", isa_in_use);
  register_kernels<logsumexp_backward_cpu>(m, "logsumexp_backward", isa_in_use);
}

}  // namespace rf
