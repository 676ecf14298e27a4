// linear_nll on the CPU. A chunk of rows at a time: their predictions into one panel that is used again and again, the
// panel turned into losses and slopes in place, the slopes multiplied into dX and dW, whose sums over the chunks stay
// in the accumulator's type. A few outputs take one pass over x instead, and no panel.
#include "shared/torch_api.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/drivers/linear_cross_entropy.h"
#include "cpu/ops/device.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Operands = LinearNllOperands;
using Options = LinearNllOptions;

// A call's tensors as the kernels want them; all but x, w and target are of the accumulator's type.
struct Problem {
  Tensor x, w, target;  // rows x features, outputs x features, rows x outputs
  Tensor bias, output_factor, constant, row_weight;
  int64_t rows, features, outputs;
  DType dtype;
  at::ScalarType acc;
  Family family;
  bool stirling;
  double denominator;  // of a mean

  at::TensorOptions options() const { return x.options().dtype(acc); }
};

// A number for each output, and the same one for all.
template <class F>
Tensor by_output(const Problem& p, F&& value) {
  Tensor t = at::empty({p.outputs}, p.options());
  const auto fill = [&](auto* to) {
    for (int64_t j = 0; j < p.outputs; ++j) to[j] = value(j);
  };
  p.acc == at::kDouble ? fill(t.mutable_data_ptr<double>()) : fill(t.mutable_data_ptr<float>());
  return t;
}
Tensor for_outputs(const Problem& p, double value) {
  return by_output(p, [&](int64_t) { return value; });
}

// A tensor with leading dimensions as a matrix; a call of few rows is mostly dispatch, so none that changes nothing.
Tensor as_rows(const Tensor& t, int64_t rows, int64_t columns) { return t.dim() == 2 ? t : t.reshape({rows, columns}); }

Problem problem_of(const Operands& t, const Options& o) {
  Problem p;
  const Tensor &input = t.input, &weight = t.weight;
  p.dtype = dtype_of(input.scalar_type());
  p.acc = acc_type(input.scalar_type());
  p.rows = rows_of(input);
  p.outputs = weight.size(0);
  p.features = weight.size(1);
  p.x = as_rows(input, p.rows, p.features);
  p.w = weight;
  p.target = as_rows(t.target, p.rows, p.outputs);
  if (t.bias.has_value()) p.bias = as_type(*t.bias, p.acc).contiguous();
  p.family = (Family)o.family;
  p.stirling = p.family == Family::poisson && o.full;
  if (p.family == Family::gaussian) {
    const double constant = o.full ? 0.5 * std::log(2 * M_PI) : 0;
    if (t.scale.has_value()) {
      // Not by ATen's loops, which compute a logarithm at the end of a thread's part in another way than inside.
      const Tensor variances = t.scale->to(p.acc).expand({p.outputs}).to(at::kDouble).contiguous();
      const double* v = variances.const_data_ptr<double>();
      p.output_factor = by_output(p, [&](int64_t j) { return 1 / v[j]; });
      p.constant = by_output(p, [&](int64_t j) { return 0.5 * std::log(v[j]) + constant; });
    } else {
      p.output_factor = for_outputs(p, 1 / o.variance);
      p.constant = for_outputs(p, 0.5 * std::log(o.variance) + constant);
    }
  } else if (p.family == Family::squared) {
    p.output_factor = for_outputs(p, 2);
  } else if (p.family == Family::bernoulli) {
    p.output_factor = t.scale.has_value() ? t.scale->to(p.acc).expand({p.outputs}).contiguous() : for_outputs(p, 1);
  }
  p.denominator = (double)p.rows * (double)p.outputs;
  if (t.sample_weight.has_value()) {
    p.row_weight = t.sample_weight->to(p.acc).reshape({p.rows}).contiguous();
    p.denominator = (double)p.outputs * ordered_sum(p.row_weight);
  }
  return p;
}

// What a call computes, undefined or false where not wanted.
struct Outputs {
  bool value = false;
  Tensor each;                  // losses, acc, rows x outputs
  Tensor x, w, bias, variance;  // gradients: x's in its own type or the accumulator's, the others in the latter
  Tensor grad;                  // upstream, acc: of each loss; or none, and
  double grad_scale = 1;

  bool slope() const { return x.defined() || w.defined() || bias.defined() || variance.defined(); }
};

// Stirling's approximation of log(y!), where y > 1.
double stirling(double y) { return y <= 1 ? 0 : y * std::log(y) - y + 0.5 * std::log(2 * M_PI * y); }

// Rows from `begin` on; their targets are kept in `target`.
LikelihoodArgs likelihood_args(const Problem& p, const Outputs& to, int64_t begin, int64_t rows, Tensor* target) {
  *target = rows_from(p.target, begin, rows);
  if (target->scalar_type() != p.acc || !target->is_contiguous()) *target = as_type(*target, p.acc).contiguous();
  const int64_t at = begin * p.outputs * acc_size(p.dtype);
  const auto from = [](const Tensor& t, int64_t bytes) { return t.defined() ? (char*)t.data_ptr() + bytes : nullptr; };
  return {{p.family, p.outputs, target->const_data_ptr(), from(p.row_weight, begin * acc_size(p.dtype)),
           from(to.grad, at), from(to.each, at)},
          data_or_null(p.output_factor),
          data_or_null(p.constant),
          to.grad_scale};
}

// Adds Stirling's term to the losses from row `begin` on, and returns its sum.
template <class A>
double add_stirling(const Problem& p, const Outputs& to, int64_t begin, const Tensor& target) {
  const int64_t rows = target.size(0);
  const A* y = target.const_data_ptr<A>();
  const A* weight = p.row_weight.defined() ? p.row_weight.const_data_ptr<A>() + begin : nullptr;
  A* each = to.each.defined() ? to.each.mutable_data_ptr<A>() + begin * p.outputs : nullptr;
  std::vector<double> sums(rows);
  parallel_for(rows, tuning::kParallelElements / (8 * p.outputs) + 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t i = r * p.outputs; i < (r + 1) * p.outputs; ++i) {
        const double term = stirling((double)y[i]) * (weight ? (double)weight[r] : 1);
        if (each) each[i] += (A)term;
        sums[r] += term;
      }
  });
  return ordered_sum(sums.data(), rows);
}
double add_stirling(const Problem& p, const Outputs& to, int64_t begin, const Tensor& target) {
  if (!p.stirling || !to.value) return 0;
  return p.acc == at::kDouble ? add_stirling<double>(p, to, begin, target) : add_stirling<float>(p, to, begin, target);
}

// Features that may lie apart in one pass: one is a column however that lies.
int64_t most_in_tiles(const Problem& p) { return std::max<int64_t>(1, kernels().tile_features[(int)p.dtype]); }

double one_pass(const Problem& p, const Outputs& to) {
  const bool in_place = p.features <= most_in_tiles(p) || p.x.stride(1) == 1;
  const Tensor w = p.w.contiguous(), x = in_place ? p.x : p.x.contiguous();
  Tensor target;
  FewOutputsArgs a = {};
  a.x = x.const_data_ptr();
  a.x_stride = x.stride(0);
  a.feature_stride = p.features <= 1 ? 1 : x.stride(1);
  a.features = p.features;
  a.weight = w.const_data_ptr();
  a.bias = data_or_null(p.bias);
  a.likelihood = likelihood_args(p, to, 0, p.rows, &target);
  a.grad_weight = data_or_null(to.w);
  a.grad_x = data_or_null(to.x);
  a.wide_grad_x = to.x.defined() && to.x.scalar_type() == p.acc;
  const double sum =
      few_outputs(p.dtype, a, p.rows, {to.value, to.slope(), data_or_null(to.bias), data_or_null(to.variance), 0});
  return sum + add_stirling(p, to, 0, target);
}

double over_chunks(const Problem& p, const Outputs& to) {
  const bool widens = p.target.scalar_type() != p.acc || !p.target.is_contiguous();
  const int64_t most = chunk_rows({.dtype = p.dtype,
                                   .rows = p.rows,
                                   .features = p.features,
                                   .classes = p.outputs,
                                   .positions = 1,
                                   .panels = widens ? 2 : 1,
                                   .memory_budget = default_memory_budget()});
  const Tensor panel = at::empty({most, p.outputs}, p.options());
  const auto column_sums = [&](const Tensor& t) { return t.defined() ? at::empty_like(t) : Tensor(); };
  const Tensor bias = column_sums(to.bias), variance = column_sums(to.variance);
  std::vector<CompensatedSum> bias_totals(bias.defined() ? p.outputs : 0);
  std::vector<CompensatedSum> variance_totals(variance.defined() ? p.outputs : 0);
  const DType acc = acc_dtype(p.dtype);
  CompensatedSum total;
  for (int64_t begin = 0; begin < p.rows; begin += most) {
    const int64_t rows = std::min(most, p.rows - begin);
    const Tensor x = rows_from(p.x, begin, rows), eta = rows_from(panel, 0, rows);
    multiply(Cpu(p.x), x, transpose(p.w), eta, p.bias);
    Tensor target;
    const LikelihoodArgs args = likelihood_args(p, to, begin, rows, &target);
    total.add(likelihood(acc, args, eta.data_ptr(), rows,
                         {to.value, to.slope(), data_or_null(bias), data_or_null(variance), 0}));
    total.add(add_stirling(p, to, begin, target));
    if (bias.defined()) add_to_totals(acc, bias.const_data_ptr(), p.outputs, bias_totals.data());
    if (variance.defined()) add_to_totals(acc, variance.const_data_ptr(), p.outputs, variance_totals.data());
    if (to.x.defined()) multiply(Cpu(p.x), eta, p.w, rows_from(to.x, begin, rows));
    if (to.w.defined()) multiply(Cpu(p.x), transpose(eta), x, to.w, {}, begin > 0 ? Sum::next : Sum::first);
  }
  if (bias.defined()) round_totals(acc, bias_totals.data(), p.outputs, to.bias.data_ptr());
  if (variance.defined()) round_totals(acc, variance_totals.data(), p.outputs, to.variance.data_ptr());
  return total.value();
}

double run(const Problem& p, const Outputs& to) {
  if (p.rows == 0 || p.outputs == 0) {
    for (const Tensor* t : {&to.w, &to.bias, &to.variance})
      if (t->defined()) Tensor(*t).zero_();
    if (to.x.defined()) Tensor(to.x).zero_();
    return 0;
  }
  // Of transposed rows, the products' kernels have columns to read; a copy would take longer than they do.
  const bool transposed = p.features > most_in_tiles(p) && p.x.stride(1) != 1 && p.x.stride(0) == 1;
  return !transposed && few_outputs_fit(p.dtype, p.features, p.outputs) ? one_pass(p, to) : over_chunks(p, to);
}

void allocate_gradients(const Problem& p, at::ScalarType dx_type, std::array<bool, 4> mask, Outputs* to) {
  if (mask[0]) to->x = empty_result({p.rows, p.features}, p.x.options().dtype(dx_type));
  if (mask[1]) to->w = empty_result({p.outputs, p.features}, p.options());
  if (mask[2]) to->bias = at::empty({p.outputs}, p.options());
  if (mask[3]) to->variance = at::empty({p.outputs}, p.options());
}

// As the ops return them: in the shapes of what they belong to, and, rounded, in its types.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_of(const Outputs& to, const Operands& of, bool rounded) {
  const auto finished = [&](const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
    if (!t.defined()) return at::empty({0}, like.options());
    const Tensor result = rounded ? as_type(t, like.scalar_type()) : t;
    return result.sizes() == sizes ? result : result.view(sizes);
  };
  const Tensor &weight = of.weight, &v = of.scale.has_value() ? *of.scale : weight;
  const bool one_variance = to.variance.defined() && v.dim() == 0;
  return {
      finished(to.x, of.input, of.input.sizes()), finished(to.w, weight, weight.sizes()),
      finished(to.bias, weight, weight.sizes().slice(0, 1)),
      finished(one_variance ? number(ordered_sum(to.variance), to.variance.scalar_type()) : to.variance, v, v.sizes())};
}

Tensor forward_cpu(const Operands& t, const Options& o, OptionalType loss_dtype) {
  check_linear_nll_forward(t, o, loss_dtype);
  const Problem p = problem_of(t, o);
  Outputs to;
  to.value = true;
  if (o.reduction == at::Reduction::None) to.each = empty_result({p.rows, p.outputs}, p.options());
  const double sum = run(p, to);
  const auto type = loss_type(t.input, t.target, loss_dtype);
  if (o.reduction == at::Reduction::None) return as_type(to.each, type).view(t.target.sizes());
  return number(o.reduction == at::Reduction::Mean ? sum / p.denominator : sum, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_cpu(const Operands& t, const Options& o,
                                                                        OptionalType loss_dtype,
                                                                        std::array<bool, 4> mask) {
  check_linear_nll_forward(t, o, loss_dtype, mask[3]);
  check_reduced("linear_nll_forward_backward", o.reduction);
  const Problem p = problem_of(t, o);
  Outputs to;
  to.value = true;
  allocate_gradients(p, p.acc, mask, &to);
  if (o.reduction == at::Reduction::Mean) to.grad_scale = 1 / p.denominator;
  const double sum = run(p, to);
  auto [dx, dw, db, dv] = gradients_of(to, t, false);
  return {
      number(o.reduction == at::Reduction::Mean ? sum / p.denominator : sum, loss_type(t.input, t.target, loss_dtype)),
      dx, dw, db, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Operands& t, const Options& o,
                                                        std::array<bool, 4> mask) {
  check_linear_nll_backward(grad, t, o, mask[3]);
  const Problem p = problem_of(t, o);
  Outputs to;
  allocate_gradients(p, t.input.scalar_type(), mask, &to);
  if (o.reduction == at::Reduction::None)
    to.grad = as_type(grad, p.acc).reshape({p.rows, p.outputs}).contiguous();
  else
    to.grad_scale = grad.item<double>() / (o.reduction == at::Reduction::Mean ? p.denominator : 1);
  run(p, to);
  return gradients_of(to, t, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<forward_cpu>(m, "linear_nll_forward", isa_in_use);
  register_kernels<forward_backward_cpu>(m, "linear_nll_forward_backward", isa_in_use);
  register_kernels<backward_cpu>(m, "linear_nll_backward", isa_in_use);
}

}  // namespace rf
