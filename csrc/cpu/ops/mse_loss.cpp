// mse_loss on the CPU: tensors to plain structs and allocation.
#include "shared/torch_api.h"

#include "cpu/drivers/drivers.h"
#include "cpu/ops/outputs.h"
#include "cpu/ops/traced.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

Tensor mse_loss_forward_cpu(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_mse_loss("mse_loss", input, target, reduction);
  const Tensor x = without_gaps(input), y = in_order_of(x, target);
  const bool each = reduction == at::Reduction::None;
  Tensor out = each ? empty_result_like(x) : Tensor();
  const double sum = mse_loss(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                              each ? out.mutable_data_ptr() : nullptr, x.numel());
  if (each) return out;
  return number(reduction == at::Reduction::Mean ? sum / (double)x.numel() : sum, x.scalar_type());
}

std::tuple<Tensor, Tensor> mse_loss_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& target,
                                                 int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, input, target, reduction);
  const Tensor x = without_gaps(input), y = in_order_of(x, target);
  const Tensor g = reduction == at::Reduction::None ? in_order_of(x, grad) : grad.contiguous();
  Tensor dx = mask[0] ? empty_result_like(x) : at::empty({0}, x.options());
  Tensor dy = mask[1] ? empty_result_like(x) : at::empty({0}, x.options());
  const double scale = reduction == at::Reduction::Mean ? 2.0 / (double)x.numel() : 2.0;
  mse_loss_backward(dtype_of(x.scalar_type()), x.const_data_ptr(), y.const_data_ptr(), g.const_data_ptr(),
                    reduction == at::Reduction::None, scale, mask[0] ? dx.mutable_data_ptr() : nullptr,
                    mask[1] ? dy.mutable_data_ptr() : nullptr, x.numel());
  return {dx, dy};
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<mse_loss_forward_cpu>(m, "mse_loss_forward", isa_in_use);
  register_kernels<mse_loss_backward_cpu>(m, "mse_loss_backward", isa_in_use);
}

}  // namespace rf
