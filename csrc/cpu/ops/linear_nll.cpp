// linear_nll on the CPU: the row loss of the loop over chunks, whose panels have the accumulator's type; a few outputs
// take one pass over x instead, and no panel.
#include "shared/torch_api.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/drivers/linear_cross_entropy.h"
#include "cpu/ops/device.h"
#include "cpu/ops/ordered_sum.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/linear_nll_ops.h"

namespace rf {
namespace {

// Stirling's approximation of log(y!), where y > 1.
double stirling(double y) { return y <= 1 ? 0 : y * std::log(y) - y + 0.5 * std::log(2 * M_PI * y); }

struct RowLoss : LinearNllTensors, RowLossOfAll {
  RowLoss(const LinearNllOperands& t, const LinearNllOptions& o);

  at::ScalarType dx_type() const { return x.scalar_type(); }
  void set_upstream(const Tensor& upstream) {
    if (each())
      set_grad(upstream.reshape({rows, outputs}));
    else
      grad_scale = upstream.item<double>() / (reduction == at::Reduction::Mean ? denominator : 1);
  }
  Tensor new_losses(at::ScalarType type) {
    set_observed(type);
    return losses = device.empty({rows, outputs}, options().dtype(observed));
  }
  void run();
  Tensor reduced(at::ScalarType type) const {
    return number(reduction == at::Reduction::Mean ? sum / denominator : sum, type);
  }
  const Tensor& of_bias() const { return dbias; }
  Tensor of_scale(bool one) const { return one && dscale.defined() ? number(ordered_sum(dscale), acc) : dscale; }
  void finish(const Tensor&) const {}

  Tensor read(const Tensor& x, const Chunk& c) const {
    const Tensor rows_x = rows_of_chunk(x, c);
    return packed.defined() ? rows_from(packed, 0, c.rows).copy_(rows_x) : rows_x;
  }
  Tensor turn(const Chunk& c, const Tensor& predictions);

  const Cpu device;

 private:
  template <class F>
  Tensor by_output(F&& value) const;
  Tensor for_outputs(double value) const {
    return by_output([&](int64_t) { return value; });
  }
  void set_gaussian(const LinearNllOperands& t, const LinearNllOptions& o);
  void set_observed(at::ScalarType type);
  void set_grad(const Tensor& upstream) {
    set_observed(upstream.scalar_type());
    grad = as_type(upstream, observed);
  }
  struct Observed {  // of a chunk, rows adjacent
    Tensor target, grad;
  };
  LikelihoodArgs likelihood_args(const Chunk& c, Observed* keep) const;
  template <class A>
  double add_stirling(const Chunk& c, const Tensor& rows_target) const;
  double add_stirling(const Chunk& c, const Tensor& rows_target) const;
  void one_pass();
  void by_chunks();
  // Features that may lie apart in one pass: one is a column however that lies.
  int64_t most_in_tiles() const { return std::max<int64_t>(1, kernels().tile_features[(int)dtype]); }
  // Of transposed rows, the products' kernels have columns to read; a copy would take longer than they do.
  bool takes_one_pass() const {
    const bool transposed = features > most_in_tiles() && x.stride(1) != 1 && x.stride(0) == 1;
    return !transposed && few_outputs_fit(dtype, features, outputs);
  }
  bool slope() const { return dx.defined() || dw.defined() || bias_too || scale_too; }

  Tensor output_factor, constant;  // acc
  bool full_poisson;               // with Stirling's term
  double denominator;              // of a mean
  at::ScalarType observed;         // the type of targets, losses and upstream gradients as the kernels see them
  Tensor grad;                     // upstream, observed: of each loss; or none, and
  double grad_scale = 1;
  // Results: losses, observed; gradients of bias and scale, acc; and the losses' sum.
  Tensor losses, dbias, dscale;
  double sum = 0;
  // Of the loop: scattered rows; sums of a chunk's columns, and of those.
  Tensor packed;
  Tensor bias_sums, scale_sums;
  std::vector<CompensatedSum> bias_totals, scale_totals;
  CompensatedSum total;
};

// A number for each output, and the same one for all.
template <class F>
Tensor RowLoss::by_output(F&& value) const {
  Tensor t = empty_result({outputs}, options());
  const auto fill = [&](auto* to) {
    for (int64_t j = 0; j < outputs; ++j) to[j] = value(j);
  };
  acc == at::kDouble ? fill(t.mutable_data_ptr<double>()) : fill(t.mutable_data_ptr<float>());
  return t;
}

RowLoss::RowLoss(const LinearNllOperands& t, const LinearNllOptions& o)
    : LinearNllTensors(t, o, /*wide_bias=*/true), device(t.input) {
  full_poisson = family == Family::poisson && o.full;
  if (family == Family::gaussian)
    set_gaussian(t, o);
  else if (family == Family::squared)
    output_factor = for_outputs(2);
  else if (family == Family::bernoulli)
    output_factor = t.scale.has_value() ? t.scale->to(acc).expand({outputs}).contiguous() : for_outputs(1);
  denominator = (double)rows * (double)outputs;
  if (row_weight.defined()) denominator = (double)outputs * ordered_sum(row_weight);
  if (reduction == at::Reduction::Mean) grad_scale = 1 / denominator;
  set_observed(each() ? acc : x.scalar_type());
}

// Rows of predictions are compared with targets of a half type as they are, if each loss or its upstream gradient has
// that type too: widened, they would be twice the bytes to move. Stirling's term is added to wide losses.
void RowLoss::set_observed(at::ScalarType type) {
  const bool as_given = type == x.scalar_type() && type == target.scalar_type() && !full_poisson && !takes_one_pass();
  observed = as_given ? type : acc;
}

void RowLoss::set_gaussian(const LinearNllOperands& t, const LinearNllOptions& o) {
  const double summand = o.full ? 0.5 * std::log(2 * M_PI) : 0;
  if (!t.scale.has_value()) {
    output_factor = for_outputs(1 / o.variance);
    constant = for_outputs(0.5 * std::log(o.variance) + summand);
    return;
  }
  // Not by ATen's loops, which compute a logarithm at the end of a thread's part in another way than inside.
  const Tensor variances = t.scale->to(acc).expand({outputs}).to(at::kDouble).contiguous();
  const double* v = variances.const_data_ptr<double>();
  output_factor = by_output([&](int64_t j) { return 1 / v[j]; });
  constant = by_output([&](int64_t j) { return 0.5 * std::log(v[j]) + summand; });
}

LikelihoodArgs RowLoss::likelihood_args(const Chunk& c, Observed* keep) const {
  const auto adjacent = [&](const Tensor& t) { return as_type(rows_of_chunk(t, c), observed).contiguous(); };
  *keep = {adjacent(target), grad.defined() ? adjacent(grad) : Tensor()};
  const auto from = [&](const Tensor& t, int64_t row) {
    return t.defined() ? (char*)t.data_ptr() + c.begin * row * t.element_size() : nullptr;
  };
  return {{family, outputs, keep->target.const_data_ptr(), from(row_weight, 1), data_or_null(keep->grad),
           from(losses, outputs)},
          data_or_null(output_factor),
          data_or_null(constant),
          grad_scale};
}

// Adds Stirling's term to a chunk's losses, and returns its sum.
template <class A>
double RowLoss::add_stirling(const Chunk& c, const Tensor& rows_target) const {
  const A* y = rows_target.const_data_ptr<A>();
  const A* weight = row_weight.defined() ? row_weight.const_data_ptr<A>() + c.begin : nullptr;
  A* each = losses.defined() ? losses.mutable_data_ptr<A>() + c.begin * outputs : nullptr;
  std::vector<double> sums(c.rows);
  parallel_for(c.rows, tuning::kParallelElements / (8 * outputs) + 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t i = r * outputs; i < (r + 1) * outputs; ++i) {
        const double term = stirling((double)y[i]) * (weight ? (double)weight[r] : 1);
        if (each) each[i] += (A)term;
        sums[r] += term;
      }
  });
  return ordered_sum(sums.data(), c.rows);
}
double RowLoss::add_stirling(const Chunk& c, const Tensor& rows_target) const {
  if (!full_poisson || !value) return 0;
  return acc == at::kDouble ? add_stirling<double>(c, rows_target) : add_stirling<float>(c, rows_target);
}

void RowLoss::one_pass() {
  const bool in_place = features <= most_in_tiles() || x.stride(1) == 1;
  const Tensor weight = w.contiguous(), read = in_place ? x : x.contiguous();
  const Chunk all = {0, rows};
  Observed seen;
  FewOutputsArgs a = {};
  a.x = read.const_data_ptr();
  a.x_stride = read.stride(0);
  a.feature_stride = features <= 1 ? 1 : read.stride(1);
  a.features = features;
  a.weight = weight.const_data_ptr();
  a.bias = data_or_null(bias);
  a.likelihood = likelihood_args(all, &seen);
  a.grad_weight = data_or_null(dw);
  a.grad_x = data_or_null(dx);
  a.wide_grad_x = dx.defined() && dx.scalar_type() == acc;
  sum = few_outputs(dtype, a, rows, {value, slope(), data_or_null(dbias), data_or_null(dscale), 0});
  sum += add_stirling(all, seen.target);
}

Tensor RowLoss::turn(const Chunk& c, const Tensor& predictions) {
  Observed seen;
  const LikelihoodArgs args = likelihood_args(c, &seen);
  const DType type = acc_dtype(dtype);
  total.add(likelihood(dtype_of(observed), args, predictions.data_ptr(), c.rows,
                       {value, slope(), data_or_null(bias_sums), data_or_null(scale_sums), 0}));
  total.add(add_stirling(c, seen.target));
  if (bias_too) add_to_totals(type, bias_sums.const_data_ptr(), outputs, bias_totals.data());
  if (scale_too) add_to_totals(type, scale_sums.const_data_ptr(), outputs, scale_totals.data());
  return predictions;
}

void RowLoss::by_chunks() {
  const bool widens = target.scalar_type() != observed || !target.is_contiguous();
  const int64_t most = chunk_rows({.dtype = dtype,
                                   .rows = rows,
                                   .features = features,
                                   .classes = outputs,
                                   .positions = 1,
                                   .panels = widens ? 2 : 1,
                                   .memory_budget = std::nullopt});
  const Tensor panel = empty_result({most, outputs}, options());
  if (is_scattered(x)) packed = empty_result({most, features}, x.options());
  if (bias_too) bias_sums = empty_result_like(dbias);
  if (scale_too) scale_sums = empty_result_like(dscale);
  bias_totals.resize(bias_too ? outputs : 0);
  scale_totals.resize(scale_too ? outputs : 0);
  over_chunks(device, {x, w, bias, rows, dx, dw}, most, panel, *this);
  if (bias_too) round_totals(acc_dtype(dtype), bias_totals.data(), outputs, dbias.data_ptr());
  if (scale_too) round_totals(acc_dtype(dtype), scale_totals.data(), outputs, dscale.data_ptr());
  sum = total.value();
}

void RowLoss::run() {
  const auto column = [&] { return empty() ? at::zeros({outputs}, options()) : empty_result({outputs}, options()); };
  if (bias_too) dbias = column();
  if (scale_too) dscale = column();
  if (empty()) return;
  takes_one_pass() ? one_pass() : by_chunks();
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_linear_nll<RowLoss>(m, isa_in_use); }

}  // namespace rf
