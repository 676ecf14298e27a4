// regfast::softmax saves its output alone; regfast::logsumexp saves input and result.
#include "autograd/register.h"
#include "shared/op_checks.h"
#include "shared/torch_api.h"

namespace rf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor composite_softmax(const Tensor& x, int64_t dim, bool log) {
  static const auto op = find_op<Tensor(const Tensor&, int64_t, bool)>("regfast::composite_softmax");
  return op.call(x, dim, log);
}
Tensor composite_logsumexp(const Tensor& x, int64_t dim, bool keepdim) {
  static const auto op = find_op<Tensor(const Tensor&, int64_t, bool)>("regfast::composite_logsumexp");
  return op.call(x, dim, keepdim);
}

Tensor softmax_forward(const Tensor& x, int64_t dim, bool log) {
  static const auto op = find_op<Tensor(const Tensor&, int64_t, bool)>("regfast::softmax_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, dim, log);
}
Tensor logsumexp_forward(const Tensor& x, int64_t dim, bool keepdim) {
  static const auto op = find_op<Tensor(const Tensor&, int64_t, bool)>("regfast::logsumexp_forward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, dim, keepdim);
}

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t dim, bool log) {
    Tensor y = softmax_forward(x, dim, log);
    ctx->save_for_backward({y});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["log"] = log;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor y = ctx->get_saved_variables()[0], &g = grads[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    const bool log = ctx->saved_data["log"].toBool();
    if (backward_takes_composite("softmax_backward", {&g, &y})) {
      // The output carries the graph, so this expression of it can be differentiated again.
      const auto acc = acc_type(y.scalar_type());
      const Tensor ya = y.to(acc), ga = g.to(acc);
      const Tensor dx = log ? ga - ya.exp() * ga.sum(dim, true) : ya * (ga - (ga * ya).sum(dim, true));
      return {dx.to(y.scalar_type()), Tensor(), Tensor()};
    }
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, int64_t, bool)>("regfast::softmax_backward");
    return {op.call(g, y, dim, log), Tensor(), Tensor()};
  }
};

struct LogsumexpFunction : torch::autograd::Function<LogsumexpFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t dim, bool keepdim) {
    Tensor lse = logsumexp_forward(x, dim, keepdim);
    ctx->save_for_backward({x, lse});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["keepdim"] = keepdim;
    return lse.scalar_type() == x.scalar_type() ? lse.alias() : lse.to(x.scalar_type());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (backward_takes_composite("logsumexp_backward", {&grads[0], &saved[0]})) {
      const bool keepdim = ctx->saved_data["keepdim"].toBool();
      auto g = composite_gradients({saved[0]}, {grads[0]}, [&](const std::vector<Tensor>& in) {
        return std::vector<Tensor>{composite_logsumexp(in[0], dim, keepdim)};
      });
      return {g[0], Tensor(), Tensor()};
    }
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>("regfast::logsumexp_backward");
    return {op.call(grads[0], saved[0], saved[1], dim), Tensor(), Tensor()};
  }
};

Tensor softmax(const Tensor& x, int64_t dim, bool log) {
  check_floating(softmax_name(log), x);
  if (takes_composite(softmax_name(log), {&x})) return composite_softmax(x, dim, log);
  dim = checked_dim(softmax_name(log), x, dim);
  if (any_requires_grad({&x})) return SoftmaxFunction::apply(x, dim, log);
  return softmax_forward(x, dim, log);
}

Tensor logsumexp(const Tensor& x, int64_t dim, bool keepdim) {
  if (takes_composite("logsumexp", {&x})) return composite_logsumexp(x, dim, keepdim);
  dim = checked_dim("logsumexp", x, dim);
  if (any_requires_grad({&x})) return LogsumexpFunction::apply(x, dim, keepdim);
  return logsumexp_forward(x, dim, keepdim).to(x.scalar_type());
}

Tensor like(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

Tensor softmax_forward_meta(const Tensor& x, int64_t dim, bool log) {
  check_softmax_forward(softmax_name(log), x, dim);
  return like(x);
}

Tensor softmax_backward_meta(const Tensor& grad, const Tensor& y, int64_t dim, bool) {
  check_softmax_backward(grad, y, dim);
  return like(y);
}

Tensor logsumexp_forward_meta(const Tensor& x, int64_t dim, bool keepdim) {
  dim = check_softmax_forward("logsumexp", x, dim);
  auto sizes = x.sym_sizes().vec();
  if (x.dim()) {
    if (keepdim)
      sizes[dim] = 1;
    else
      sizes.erase(sizes.begin() + dim);
  }
  return at::empty_symint(sizes, x.options().dtype(acc_type(x.scalar_type())));
}

Tensor logsumexp_backward_meta(const Tensor& grad, const Tensor& x, const Tensor& lse, int64_t dim) {
  check_logsumexp_backward(grad, x, lse, dim);
  return like(x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) {
  register_op<softmax, composite_softmax>(m, "softmax");
  register_op<logsumexp, composite_logsumexp>(m, "logsumexp");
  register_meta<softmax_forward_meta>(m, "softmax_forward");
  register_meta<softmax_backward_meta>(m, "softmax_backward");
  register_meta<logsumexp_forward_meta>(m, "logsumexp_forward");
  register_meta<logsumexp_backward_meta>(m, "logsumexp_backward");
}

}  // namespace rf
