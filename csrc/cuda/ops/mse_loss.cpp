// mse_loss on a CUDA device: tensors to plain structs and allocation.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf::cuda {
namespace {

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_mse_loss("mse_loss", input, target, reduction);
  const OnDevice device(input);
  const Tensor x = without_gaps(input), y = in_order_of(x, target);
  const bool each = reduction == at::Reduction::None;
  Tensor out = each ? at::empty_like(x) : at::empty({}, x.options());
  if (out.numel() == 0) return out;
  Workspace workspace(each ? 0 : mse_loss_workspace(x.numel()), x);
  launch_mse_loss(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                  each ? out.mutable_data_ptr() : nullptr, each ? nullptr : out.mutable_data_ptr(),
                  reduction == at::Reduction::Mean ? 1.0 / (double)x.numel() : 1.0, workspace.data(), x.numel(),
                  device.stream);
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                             int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, input, target, reduction);
  const OnDevice device(input);
  const Tensor x = without_gaps(input), y = in_order_of(x, target);
  const Tensor g = reduction == at::Reduction::None ? in_order_of(x, grad) : grad.contiguous();
  Tensor dx = mask[0] ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor dy = mask[1] ? at::empty_like(x) : at::empty({0}, x.options());
  launch_mse_loss_backward(
      dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(), g.const_data_ptr(),
      reduction == at::Reduction::None, reduction == at::Reduction::Mean ? 2.0 / (double)x.numel() : 2.0,
      mask[0] ? dx.mutable_data_ptr() : nullptr, mask[1] ? dy.mutable_data_ptr() : nullptr, x.numel(), device.stream);
  return {dx, dy};
}

}  // namespace

void register_mse_loss(torch::Library& m) {
  register_kernels<mse_loss_forward>(m, "mse_loss_forward", architecture_in_use);
  register_kernels<mse_loss_backward>(m, "mse_loss_backward", architecture_in_use);
}

}  // namespace rf::cuda
