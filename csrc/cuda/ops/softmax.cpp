// softmax, log_softmax and logsumexp on a CUDA device: tensors to plain structs and allocation.
#include "cuda/ops/ops.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf::cuda {
namespace {

Tensor softmax_forward(const Tensor& input, int64_t dim, bool log) {
  dim = check_softmax_forward(softmax_name(log), input, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  Tensor y = at::empty(input.sizes(), input.options());
  if (y.numel() == 0) return y;
  SoftmaxRows a = {};
  a.rows = rows_without(x, dim);
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.output = y.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(y, dim);
  a.log = log;
  launch_softmax_forward(dtype_of(x.scalar_type()), a, device.stream);
  return y;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  dim = check_softmax_backward(grad, output, dim);
  const OnDevice device(output);
  const Tensor g = walkable(grad, dim), y = walkable(output, dim);
  Tensor dx = at::empty(y.sizes(), y.options());
  if (y.numel() == 0) return dx;
  SoftmaxRows a = {};
  a.rows = rows_without(y, dim);
  a.classes = y.dim() ? y.size(dim) : 1;
  a.input = y.const_data_ptr();
  a.grad = g.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = *row_layout(y, dim);
  a.grad_in = *row_layout(g, dim);
  a.out = *row_layout(dx, dim);
  a.log = log;
  launch_softmax_backward(dtype_of(y.scalar_type()), a, device.stream);
  return dx;
}

// In accumulator type: the op rounds, backward does not have to.
Tensor logsumexp_forward(const Tensor& input, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", input, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  Tensor result = at::empty(reduced_sizes(x, dim, keepdim), x.options().dtype(acc_type(x.scalar_type())));
  if (result.numel() == 0) return result;
  SoftmaxRows a = {};
  a.rows = result.numel();
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = a.in;
  a.row_result = result.mutable_data_ptr();
  launch_logsumexp_forward(dtype_of(x.scalar_type()), a, device.stream);
  return result;
}

// lse and grad have the shape that logsumexp returned, with or without the reduced dimension.
Tensor logsumexp_backward(const Tensor& grad, const Tensor& input, const Tensor& lse, int64_t dim) {
  dim = check_logsumexp_backward(grad, input, lse, dim);
  const OnDevice device(input);
  const Tensor x = walkable(input, dim);
  const auto acc = acc_type(x.scalar_type());
  const Tensor g = grad.to(acc).contiguous(), l = lse.to(acc).contiguous();
  Tensor dx = at::empty(x.sizes(), x.options());
  if (dx.numel() == 0) return dx;
  SoftmaxRows a = {};
  a.rows = l.numel();
  a.classes = x.dim() ? x.size(dim) : 1;
  a.input = x.const_data_ptr();
  a.output = dx.mutable_data_ptr();
  a.in = a.grad_in = *row_layout(x, dim);
  a.out = *row_layout(dx, dim);
  a.row_result = l.data_ptr();
  a.row_grad = g.const_data_ptr();
  launch_logsumexp_backward(dtype_of(x.scalar_type()), a, device.stream);
  return dx;
}

}  // namespace

void register_softmax(torch::Library& m) {
  register_kernels<softmax_forward>(m, "softmax_forward", architecture_in_use);
  register_kernels<softmax_backward>(m, "softmax_backward", architecture_in_use);
  register_kernels<logsumexp_forward>(m, "logsumexp_forward", architecture_in_use);
  register_kernels<logsumexp_backward>(m, "logsumexp_backward", architecture_in_use);
}

}  // namespace rf::cuda
