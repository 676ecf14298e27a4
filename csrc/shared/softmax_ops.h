// softmax, log_softmax and logsumexp for every device: tensors to plain structs and allocation. Device is what one has
// of its own, made for a call with a tensor of it: memory for results, and what runs each of the four kernels.
#pragma once
#include "shared/layouts.h"
#include "shared/op_checks.h"
#include "shared/problems.h"

namespace rf {

// What each op takes from the tensor that its rows are of.
inline SoftmaxProblem softmax_problem(const Tensor& x, int64_t dim, bool log) {
  SoftmaxProblem p = {};
  p.input = x.const_data_ptr();
  p.in = p.grad_in = p.out = *row_layout(x, dim);
  p.classes = x.dim() ? x.size(dim) : 1;
  p.log = log;
  return p;
}

template <class Device>
Tensor softmax_forward(const Tensor& input, int64_t dim, bool log) {
  dim = check_softmax_forward(softmax_name(log), input, dim);
  const Device device(input);
  const Tensor x = as_strided_rows(input, dim);
  const Tensor y = device.empty(input.sizes(), input.options());
  if (y.numel() == 0) return y;
  SoftmaxProblem p = softmax_problem(x, dim, log);
  p.output = y.mutable_data_ptr();
  p.out = *row_layout(y, dim);
  device.run(Device::forward, dtype_of(x.scalar_type()), p, rows_without(x, dim));
  return y;
}

template <class Device>
Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  dim = check_softmax_backward(grad, output, dim);
  const Device device(output);
  const Tensor g = as_strided_rows(grad, dim), y = as_strided_rows(output, dim);
  const Tensor dx = device.empty(y.sizes(), y.options());
  if (y.numel() == 0) return dx;
  SoftmaxProblem p = softmax_problem(y, dim, log);
  p.grad = g.const_data_ptr();
  p.grad_in = *row_layout(g, dim);
  p.output = dx.mutable_data_ptr();
  p.out = *row_layout(dx, dim);
  device.run(Device::backward, dtype_of(y.scalar_type()), p, rows_without(y, dim));
  return dx;
}

// In accumulator type: the op rounds, backward does not have to.
template <class Device>
Tensor logsumexp_forward(const Tensor& input, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", input, dim);
  const Device device(input);
  const Tensor x = as_strided_rows(input, dim);
  const Tensor result = device.empty(reduced_sizes(x, dim, keepdim), x.options().dtype(acc_type(x.scalar_type())));
  if (result.numel() == 0) return result;
  SoftmaxProblem p = softmax_problem(x, dim, false);
  p.row_result = result.mutable_data_ptr();
  device.run(Device::logsumexp_forward, dtype_of(x.scalar_type()), p, result.numel());
  return result;
}

// lse and grad have the shape that logsumexp returned, with or without the reduced dimension.
template <class Device>
Tensor logsumexp_backward(const Tensor& grad, const Tensor& input, const Tensor& lse, int64_t dim) {
  dim = check_logsumexp_backward(grad, input, lse, dim);
  const Device device(input);
  const Tensor x = as_strided_rows(input, dim);
  const auto acc = acc_type(x.scalar_type());
  const Tensor g = grad.to(acc).contiguous(), l = lse.to(acc).contiguous();
  const Tensor dx = device.empty(x.sizes(), x.options());
  if (dx.numel() == 0) return dx;
  SoftmaxProblem p = softmax_problem(x, dim, false);
  p.output = dx.mutable_data_ptr();
  p.out = *row_layout(dx, dim);
  p.row_result = l.data_ptr();
  p.row_grad = g.const_data_ptr();
  device.run(Device::logsumexp_backward, dtype_of(x.scalar_type()), p, l.numel());
  return dx;
}

template <class Device>
void register_softmax(torch::Library& m, std::string (*by)(const Tensor&)) {
  register_kernels<softmax_forward<Device>>(m, "softmax_forward", by);
  register_kernels<softmax_backward<Device>>(m, "softmax_backward", by);
  register_kernels<logsumexp_forward<Device>>(m, "logsumexp_forward", by);
  register_kernels<logsumexp_backward<Device>>(m, "logsumexp_backward", by);
}

}  // namespace rf
