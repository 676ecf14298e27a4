// mse_loss on the CPU: tensors to plain structs and allocation.
#include "shared/torch_api.h"

#include <ATen/ExpandUtils.h>

#include <algorithm>

#include "cpu/ops/device.h"
#include "cpu/tuning.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

// Dimensions in the order in which results like x lie in memory, the outermost first.
std::vector<int64_t> order_of_results(const Tensor& x) {
  const auto strides = at::infer_dense_strides(x.sizes(), x.strides());
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// A tensor's elements in the order of results like x: where they lie, but for those that no line of memory brings
// together, which torch's transposition copies.
Elements elements(const Tensor& x, const Tensor& t, Tensor* keep) {
  *keep = t;
  const bool as_results = x.is_non_overlapping_and_dense() && is_in_order_of(x, t);
  if (as_results || t.numel() <= 1) return {t.const_data_ptr()};
  std::vector<Run> runs;
  for (int64_t d : order_of_results(x)) {
    if (!runs.empty() && runs.back().stride == t.size(d) * t.stride(d))
      runs.back() = {runs.back().size * t.size(d), t.stride(d)};
    else
      runs.push_back({t.size(d), t.stride(d)});
  }
  if (runs.size() == 1 && runs[0].stride == 1) return {t.const_data_ptr()};
  if (runs.back().stride > tuning::kGatherStep || runs.back().size < tuning::kGatherRun) {
    *keep = at::empty_like(x, t.options()).copy_(t);
    return {keep->const_data_ptr()};
  }
  return {t.const_data_ptr(), std::move(runs)};
}

Tensor mse_loss_forward_cpu(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_mse_loss("mse_loss", input, target, reduction);
  Tensor keep_x, keep_y;
  const Elements x = elements(input, input, &keep_x), y = elements(input, target, &keep_y);
  const bool each = reduction == at::Reduction::None;
  Tensor out = each ? empty_result_like(input) : Tensor();
  const double sum =
      mse_loss(dtype_of(input.scalar_type()), x, y, each ? out.mutable_data_ptr() : nullptr, input.numel());
  if (each) return out;
  return number(reduction == at::Reduction::Mean ? sum / (double)input.numel() : sum, input.scalar_type());
}

std::tuple<Tensor, Tensor> mse_loss_backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& target,
                                                 int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, input, target, reduction);
  Tensor keep_x, keep_y, keep_grad;
  const bool each = reduction == at::Reduction::None;
  const Elements x = elements(input, input, &keep_x), y = elements(input, target, &keep_y);
  const Elements g = each ? elements(input, grad, &keep_grad) : Elements{grad.const_data_ptr()};
  Tensor dx = mask[0] ? empty_result_like(input) : empty_result({0}, input.options());
  Tensor dy = mask[1] ? empty_result_like(input) : empty_result({0}, input.options());
  const double scale = reduction == at::Reduction::Mean ? 2.0 / (double)input.numel() : 2.0;
  mse_loss_backward(dtype_of(input.scalar_type()), x, y, g, each, scale, mask[0] ? dx.mutable_data_ptr() : nullptr,
                    mask[1] ? dy.mutable_data_ptr() : nullptr, input.numel());
  return {dx, dy};
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<mse_loss_forward_cpu>(m, "mse_loss_forward", isa_in_use);
  register_kernels<mse_loss_backward_cpu>(m, "mse_loss_backward", isa_in_use);
}

}  // namespace rf
