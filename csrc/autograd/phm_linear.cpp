// regfast::phm_linear: saves its operands and what the activation's derivative is computed from, never the weight that
// they stand for; computes only the gradients that are asked for.
#include "shared/torch_api.h"

#include "autograd/activation.h"
#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, string_view);
using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                    string_view, bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                                     const Tensor&, const Tensor&,
                                                                     const OptionalTensor&, string_view,
                                                                     std::array<bool, 4>);
constexpr auto composite = op_of<Signature, "regfast::composite_phm_linear">;
constexpr auto forward = kernels_of<ForwardSignature, "regfast::phm_linear_forward">;
constexpr auto backward_kernels = op_of<BackwardSignature, "regfast::phm_linear_backward">;

struct PhmLinearBackward {
  struct Options {
    int64_t activation;

    auto members() const { return std::tie(activation); }
  };
  static constexpr int kInputs = 4, kSaved = 5;

  static variable_list backward(const Recorded<PhmLinearBackward>& op, const variable_list& grads) {
    const Tensor &g = grads[0], &x = op.saved[0], &a = op.saved[1], &s = op.saved[2], &b = op.saved[3];
    const auto activation = (Activation)op.options.activation;
    if (backward_takes_composite("phm_linear_backward", {&g, &x, &a, &s})) {
      // The graph of the pre-activation is that of a layer without one; its values are there.
      const auto with_graph = [&](const Tensor& z) {
        const Tensor none;
        record<PhmLinearBackward>(z, {&x, &a, &s, &b}, {&x, &a, &s, &b, &none}, {(int64_t)Activation::none});
      };
      return gradients_in_graph(op, activation_gradient(g, op.saved[4], activation, with_graph));
    }
    const auto [dx, da, ds, db] =
        backward_kernels(g, optional(x), a, s, optional(op.saved[4]), name_of(activation), op.needs);
    return op.wanted({&dx, &da, &ds, &db});
  }

  // By products with the weight that a and s stand for, whose derivatives have graphs of their own.
  static variable_list gradients_in_graph(const Recorded<PhmLinearBackward>& op, const Tensor& dz) {
    const Tensor &x = op.saved[0], &a = op.saved[1], &s = op.saved[2];
    const auto acc = dz.scalar_type(), type = a.scalar_type();
    const Tensor rows = as_rows(dz);
    // W[i q' + k, j d' + l] is the sum over m of a[m, i, j] s[m, k, l]: in this order of places a product.
    const c10::SymInt n = a.sym_size(0), q = s.sym_size(1), d = s.sym_size(2);
    const Tensor a_rows = as_type(a, acc).flatten(1), s_rows = as_type(s, acc).flatten(1);
    variable_list result(kInputs);
    if (op.needs[0]) {
      const Tensor w = at::matmul(a_rows.t(), s_rows).view_symint({n, n, q, d}).transpose(1, 2);
      result[0] = as_type(at::matmul(dz, w.reshape_symint({n * q, n * d})), type);
    }
    if (op.needs[1] || op.needs[2]) {
      const Tensor dw = at::matmul(rows.t(), as_type(as_rows(x), acc))
                            .view_symint({n, q, n, d})
                            .transpose(1, 2)
                            .flatten(2)
                            .flatten(0, 1);
      if (op.needs[1]) result[1] = as_type(at::matmul(s_rows, dw.t()).view_symint(a.sym_sizes()), type);
      if (op.needs[2]) result[2] = as_type(at::matmul(a_rows, dw).view_symint(s.sym_sizes()), type);
    }
    if (op.needs[3]) result[3] = as_type(rows.sum(0), type);
    return result;
  }
};

Tensor phm_linear(const Tensor& x, const Tensor& a, const Tensor& s, const OptionalTensor& bias,
                  string_view activation) {
  const Tensor& b = value_or_undefined(bias);
  const Activation act = parse_activation(activation, "phm_linear");
  if (any_unusual("phm_linear", {&x, &a, &s, &b})) return composite(x, a, s, bias, activation);
  check_phm_linear(x, a, s, b);
  if (takes_composite("phm_linear", {&x, &a, &s, &b})) return composite(x, a, s, bias, activation);
  const bool recorded = any_requires_grad({&x, &a, &s, &b});
  const Saved kind = saved_for(act);
  const auto [y, z] = forward(x, a, s, bias, name_of(act), recorded && kind == Saved::preactivation);
  if (recorded) {
    // For second derivatives a pre-activation becomes a function of all operands again; an output is one already.
    const bool all = kind == Saved::preactivation;
    const Tensor none, &saved = kind == Saved::output ? y : kind == Saved::preactivation ? z : none;
    record<PhmLinearBackward>(
        y, {&x, &a, &s, &b},
        {all || a.requires_grad() || s.requires_grad() ? &x : &none, &a, &s, all ? &b : &none, &saved}, {(int64_t)act});
  }
  return y;
}

// As linear.
Tensor phm_linear_autocast(const Tensor& x, const Tensor& a, const Tensor& s, const OptionalTensor& b,
                           string_view activation) {
  const Autocast cast(x);
  return phm_linear(cast(x), cast(a), cast(s), cast(b), activation);
}

std::tuple<Tensor, Tensor> phm_linear_forward_meta(const Tensor& x, const Tensor& a, const Tensor& s,
                                                   const OptionalTensor& b, string_view activation,
                                                   bool save_preactivation) {
  check_phm_linear_forward(x, a, s, b, activation);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = a.sym_size(0) * s.sym_size(1);
  return {at::empty_symint(sizes, x.options()),
          save_preactivation ? at::empty_symint(sizes, x.options()) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> phm_linear_backward_meta(const Tensor& grad, const OptionalTensor& x,
                                                                    const Tensor& a, const Tensor& s,
                                                                    const OptionalTensor& saved, string_view activation,
                                                                    std::array<bool, 4> mask) {
  check_phm_linear_backward(grad, x, a, s, saved, activation, mask);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  const c10::SymInt n = a.sym_size(0);
  auto sizes = grad.sym_sizes().vec();
  sizes.back() = n * s.sym_size(2);
  return {mask[0] ? at::empty_symint(sizes, grad.options()) : none(),
          mask[1] ? at::empty_symint({n, n, n}, grad.options()) : none(),
          // n to each row of S, as the kernels multiply it
          mask[2] ? at::empty_symint({s.sym_size(1), n, s.sym_size(2)}, grad.options()).permute({1, 0, 2}) : none(),
          mask[3] ? at::empty_symint({grad.sym_size(-1)}, grad.options()) : none()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<phm_linear, composite, phm_linear_autocast>(m, "phm_linear");
  register_meta<phm_linear_forward_meta>(m, "phm_linear_forward");
  register_meta<phm_linear_backward_meta>(m, "phm_linear_backward");
}

}  // namespace rf
