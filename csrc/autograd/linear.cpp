// regfast::linear: saves the operands that a derivative needs and what the activation's derivative is computed from
// (nothing, the output or the pre-activation); computes only the gradients that are asked for.
#include "shared/torch_api.h"

#include "autograd/activation.h"
#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, string_view);
using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, string_view,
                                                    bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                             const OptionalTensor&, const OptionalTensor&, string_view,
                                                             std::array<bool, 3>);
constexpr auto composite = op_of<Signature, "regfast::composite_linear">;
constexpr auto forward = kernels_of<ForwardSignature, "regfast::linear_forward">;
constexpr auto backward_kernels = op_of<BackwardSignature, "regfast::linear_backward">;

Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias, string_view activation);

struct LinearBackward {
  struct Options {
    int64_t activation;

    auto members() const { return std::tie(activation); }
  };
  static constexpr int kInputs = 3, kSaved = 4;

  static variable_list backward(const Recorded<LinearBackward>& op, const variable_list& grads) {
    const Tensor &g = grads[0], &x = op.saved[0], &w = op.saved[1], &b = op.saved[2], &saved = op.saved[3];
    const auto activation = (Activation)op.options.activation;
    if (backward_takes_composite("linear_backward", {&g, &x, &w})) {
      // The graph of the pre-activation is that of a linear layer without one; its values are there.
      const auto with_graph = [&](const Tensor& z) {
        const Tensor none;
        record<LinearBackward>(z, {&x, &w, &b}, {&x, &w, &b, &none}, {(int64_t)Activation::none});
      };
      const Tensor dz = activation_gradient(g, saved, activation, with_graph), rows = as_rows(dz);
      const auto type = g.scalar_type(), acc = dz.scalar_type();
      variable_list result(kInputs);
      if (op.needs[0]) result[0] = as_type(linear(dz, as_type(w, acc).t(), {}, "none"), type);
      if (op.needs[1]) result[1] = as_type(linear(rows.t(), as_type(as_rows(x), acc).t(), {}, "none"), type);
      if (op.needs[2]) result[2] = as_type(rows.sum(0), type);
      return result;
    }
    const auto [dx, dw, db] =
        backward_kernels(g, optional(x), optional(w), optional(saved), name_of(activation), op.needs);
    return op.wanted({&dx, &dw, &db});
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
  const bool recorded = any_requires_grad({&x, &w, &b});
  const Saved kind = saved_for(act);
  const auto [y, z] = forward(x, w, bias, name_of(act), recorded && kind == Saved::preactivation);
  if (recorded) {
    // For second derivatives a pre-activation becomes a function of all operands again; an output is one already.
    const bool all = kind == Saved::preactivation;
    const Tensor none, &saved = kind == Saved::output ? y : kind == Saved::preactivation ? z : none;
    record<LinearBackward>(
        y, {&x, &w, &b},
        {all || w.requires_grad() ? &x : &none, all || x.requires_grad() ? &w : &none, all ? &b : &none, &saved},
        {(int64_t)act});
  }
  return y;
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

Tensor product_meta(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  const auto acc = check_product("_product", a, b);
  check_product_bias(a, b, bias);
  return at::empty_symint({a.sym_size(0), b.sym_size(1)}, a.options().dtype(acc));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<linear, composite, linear_autocast>(m, "linear");
  register_meta<linear_forward_meta>(m, "linear_forward");
  register_meta<linear_backward_meta>(m, "linear_backward");
  register_meta<product_meta>(m, "_product");
  register_meta<check_add_product>(m, "_add_product_");
}

}  // namespace rf
