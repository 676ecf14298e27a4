// regfast::softmax saves its output alone; regfast::logsumexp saves input and result.
#include "shared/torch_api.h"

#include "autograd/node.h"
#include "autograd/op_of.h"
#include "autograd/register.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Signature = Tensor(const Tensor&, int64_t, bool);
using SoftmaxBackwardSignature = Tensor(const Tensor&, const Tensor&, int64_t, bool);
using LogsumexpBackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t);
constexpr auto composite_softmax = op_of<Signature, "regfast::composite_softmax">;
constexpr auto composite_logsumexp = op_of<Signature, "regfast::composite_logsumexp">;
constexpr auto softmax_forward = kernels_of<Signature, "regfast::softmax_forward">;
constexpr auto logsumexp_forward = kernels_of<Signature, "regfast::logsumexp_forward">;
constexpr auto softmax_backward = op_of<SoftmaxBackwardSignature, "regfast::softmax_backward">;
constexpr auto logsumexp_backward = op_of<LogsumexpBackwardSignature, "regfast::logsumexp_backward">;

struct SoftmaxBackward {
  struct Options {
    int64_t dim;
    bool log;

    auto members() const { return std::tie(dim, log); }
  };
  static constexpr int kInputs = 1, kSaved = 1;

  static variable_list backward(const Recorded<SoftmaxBackward>& op, const variable_list& grads) {
    const Tensor &y = op.saved[0], &g = grads[0];
    const auto [dim, log] = op.options;
    if (backward_takes_composite("softmax_backward", {&g, &y})) {
      // The output carries the graph, so this expression of it can be differentiated again.
      const auto acc = acc_type(y.scalar_type());
      const Tensor ya = y.to(acc), ga = g.to(acc);
      const Tensor dx = log ? ga - ya.exp() * ga.sum(dim, true) : ya * (ga - (ga * ya).sum(dim, true));
      return {dx.to(y.scalar_type())};
    }
    return {softmax_backward(g, y, dim, log)};
  }
};

struct LogsumexpBackward {
  struct Options {
    int64_t dim;
    bool keepdim;

    auto members() const { return std::tie(dim, keepdim); }
  };
  static constexpr int kInputs = 1, kSaved = 2;

  static variable_list backward(const Recorded<LogsumexpBackward>& op, const variable_list& grads) {
    const Tensor &x = op.saved[0], &lse = op.saved[1];
    const Options& o = op.options;
    if (backward_takes_composite("logsumexp_backward", {&grads[0], &x}))
      return composite_gradients({x}, {grads[0]}, [&](const std::vector<Tensor>& in) {
        return std::vector<Tensor>{composite_logsumexp(in[0], o.dim, o.keepdim)};
      });
    return {logsumexp_backward(grads[0], x, lse, o.dim)};
  }
};

Tensor softmax(const Tensor& x, int64_t dim, bool log) {
  check_floating(softmax_name(log), x);
  if (takes_composite(softmax_name(log), {&x})) return composite_softmax(x, dim, log);
  dim = checked_dim(softmax_name(log), x, dim);
  if (rows_by_aten(softmax_name(log), x, dim)) {
    const Autocast off(x);  // the result has x's type, whoever computes it
    return log ? at::log_softmax(x, dim) : at::softmax(x, dim);
  }
  const Tensor y = softmax_forward(x, dim, log);
  if (any_requires_grad({&x})) record<SoftmaxBackward>(y, {&x}, {&y}, {dim, log});
  return y;
}

Tensor logsumexp(const Tensor& x, int64_t dim, bool keepdim) {
  if (takes_composite("logsumexp", {&x})) return composite_logsumexp(x, dim, keepdim);
  dim = checked_dim("logsumexp", x, dim);
  if (rows_by_aten("logsumexp", x, dim)) {
    const Autocast off(x);
    return at::logsumexp(x, dim, keepdim);
  }
  const Tensor lse = logsumexp_forward(x, dim, keepdim), y = as_type(lse, x.scalar_type());
  if (any_requires_grad({&x})) record<LogsumexpBackward>(y, {&x}, {&x, &lse}, {dim, keepdim});
  return y;
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
