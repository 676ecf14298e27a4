// regfast::linear: saves the operands that a derivative needs and what the activation's derivative is computed from
// (nothing, the output or the pre-activation); computes only the gradients that are asked for.
#include "autograd/register.h"
#include "shared/op_checks.h"
#include "shared/torch_api.h"

namespace rf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor composite(const Tensor& x, const Tensor& w, const OptionalTensor& b, string_view activation) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, string_view)>("regfast::composite_linear");
  return op.call(x, w, b, activation);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w, const OptionalTensor& b, Activation activation,
                                   bool save_preactivation) {
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, string_view, bool)>(
          "regfast::linear_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, w, b, name_of(activation), save_preactivation);
}

using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                             const OptionalTensor&, const OptionalTensor&, string_view,
                                                             std::array<bool, 3>);

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, const OptionalTensor& b,
                        Activation act) {
    const Saved kind = saved_for(act);
    auto [y, z] = rf::forward(x, w, b, act, kind == Saved::preactivation);
    // A derivative of an activation's derivative starts again from all operands.
    const bool all = act != Activation::none;
    ctx->save_for_backward({all || w.requires_grad() ? x : Tensor(), all || x.requires_grad() ? w : Tensor(),
                            all ? value_or_undefined(b) : Tensor(),
                            kind == Saved::output          ? y
                            : kind == Saved::preactivation ? z
                                                           : Tensor()});
    ctx->saved_data["has_bias"] = b.has_value() && b->defined();
    ctx->saved_data["activation"] = (int64_t)act;
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = grads[0], &x = saved[0], &w = saved[1], &b = saved[2];
    const auto activation = (Activation)ctx->saved_data["activation"].toInt();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)};
    if (backward_takes_composite("linear_backward", {&g, &x, &w})) {
      if (activation == Activation::none) {
        if (mask[0]) result[0] = at::matmul(g, w);
        const Tensor rows = g.dim() == 1 ? g.unsqueeze(0) : g.flatten(0, -2);
        if (mask[1]) result[1] = at::matmul(rows.t(), x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2));
        if (mask[2]) result[2] = rows.sum(0);
        return result;
      }
      auto computed = composite_gradients({x, w, b}, {g}, [&](const std::vector<Tensor>& in) {
        return std::vector<Tensor>{composite(in[0], in[1], optional(in[2]), name_of(activation))};
      });
      std::copy(computed.begin(), computed.end(), result.begin());
      return result;
    }
    static const auto op = find_op<BackwardSignature>("regfast::linear_backward");
    auto [dx, dw, db] = op.call(g, optional(x), optional(w), optional(saved[3]), name_of(activation), mask);
    if (mask[0]) result[0] = dx;
    if (mask[1]) result[1] = dw;
    if (mask[2]) result[2] = db;
    return result;
  }
};

Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias, string_view activation) {
  const Tensor& b = value_or_undefined(bias);
  const Activation act = parse_activation(activation, "linear");
  if (any_unusual("linear", {&x, &w, &b})) return composite(x, w, bias, activation);
  // A vector as weight and a bias that broadcasts are torch's own special cases.
  const bool special = w.dim() != 2 || (b.defined() && (b.dim() != 1 || (b.sym_size(0) == 1 && w.sym_size(0) != 1)));
  if (takes_composite("linear", {&x, &w, &b}, special ? "weight or bias of an unusual shape" : nullptr))
    return composite(x, w, bias, activation);
  if (any_requires_grad({&x, &w, &b})) return LinearFunction::apply(x, w, bias, act);
  return std::get<0>(forward(x, w, bias, act, false));
}

// As F.linear: autocast's lower precision for single precision and half types, float64 as it is.
Tensor linear_autocast(const Tensor& x, const Tensor& w, const OptionalTensor& b, string_view activation) {
  const Autocast cast(x);
  return linear(cast(x), cast(w), cast(b), activation);
}

std::tuple<Tensor, Tensor> linear_forward_meta(const Tensor& x, const Tensor& w, const OptionalTensor& b,
                                               string_view activation, bool save_preactivation) {
  check_linear_forward(x, w, b, activation);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = w.sym_size(0);
  return {at::empty_symint(sizes, x.options()),
          save_preactivation ? at::empty_symint(sizes, x.options()) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_meta(const Tensor& grad, const OptionalTensor& x,
                                                        const OptionalTensor& w, const OptionalTensor& saved,
                                                        string_view activation, std::array<bool, 3> mask) {
  check_linear_backward(grad, x, w, saved, activation, mask);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  const c10::SymInt outputs = grad.sym_size(-1);
  auto sizes = grad.sym_sizes().vec();
  if (mask[0]) sizes.back() = w->sym_size(1);
  return {mask[0] ? at::empty_symint(sizes, grad.options()) : none(),
          mask[1] ? at::empty_symint({outputs, x->sym_size(-1)}, grad.options()) : none(),
          mask[2] ? at::empty_symint({outputs}, grad.options()) : none()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<linear, composite, linear_autocast>(m, "linear");
  register_meta<linear_forward_meta>(m, "linear_forward");
  register_meta<linear_backward_meta>(m, "linear_backward");
}

}  // namespace rf
