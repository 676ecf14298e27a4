// regfast::mse_loss saves input and target; the residual is recomputed in backward.
#include "shared/torch_api.h"

#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Signature = Tensor(const Tensor&, const Tensor&, int64_t);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                     std::array<bool, 2>);
constexpr auto composite = op_of<Signature, "regfast::composite_mse_loss">;
constexpr auto forward = kernels_of<Signature, "regfast::mse_loss_forward">;
constexpr auto backward_kernels = op_of<BackwardSignature, "regfast::mse_loss_backward">;

struct MseLossBackward {
  struct Options {
    int64_t reduction;

    auto members() const { return std::tie(reduction); }
  };
  static constexpr int kInputs = 2, kSaved = 2;

  static variable_list backward(const Recorded<MseLossBackward>& op, const variable_list& grads) {
    const Tensor &x = op.saved[0], &y = op.saved[1];
    const int64_t reduction = op.options.reduction;
    if (backward_takes_composite("mse_loss_backward", {&grads[0], &x, &y}))
      return composite_gradients({x, y}, {grads[0]}, [&](const std::vector<Tensor>& in) {
        return std::vector<Tensor>{composite(in[0], in[1], reduction)};
      });
    const auto [dx, dy] = backward_kernels(grads[0], x, y, reduction, op.needs);
    return op.wanted({&dx, &dy});
  }
};

Tensor mse_loss(const Tensor& x, const Tensor& y, int64_t reduction) {
  // Shapes that broadcast (with torch's warning), types that promote and devices that differ are torch's own special
  // cases.
  if (any_unusual("mse_loss", {&x, &y})) return composite(x, y, reduction);
  const bool special = x.sym_sizes() != y.sym_sizes() || x.scalar_type() != y.scalar_type() || x.device() != y.device();
  if (takes_composite("mse_loss", {&x, &y}, special ? "input and target differ in kind" : nullptr))
    return composite(x, y, reduction);
  const Tensor loss = forward(x, y, reduction);
  if (any_requires_grad({&x, &y})) record<MseLossBackward>(loss, {&x, &y}, {&x, &y}, {reduction});
  return loss;
}

// As F.mse_loss: in float32 under autocast.
Tensor mse_loss_autocast(const Tensor& x, const Tensor& y, int64_t reduction) {
  const Autocast cast(x, at::kFloat);
  return rf::mse_loss(cast(x), cast(y), reduction);
}

Tensor mse_loss_forward_meta(const Tensor& x, const Tensor& y, int64_t reduction) {
  check_mse_loss("mse_loss", x, y, reduction);
  return reduction == at::Reduction::None ? at::empty_like(x) : at::empty({}, x.options());
}

std::tuple<Tensor, Tensor> mse_loss_backward_meta(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                  int64_t reduction, std::array<bool, 2> mask) {
  check_mse_loss_backward(grad, x, y, reduction);
  const auto like = [&](bool wanted) { return wanted ? at::empty_like(x) : at::empty({0}, x.options()); };
  return {like(mask[0]), like(mask[1])};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<mse_loss, composite, mse_loss_autocast>(m, "mse_loss");
  register_meta<mse_loss_forward_meta>(m, "mse_loss_forward");
  register_meta<mse_loss_backward_meta>(m, "mse_loss_backward");
}

}  // namespace rf
