// linear_cross_entropy on the CPU. A chunk of rows at a time: their logits into one panel that is used again and again,
// the panel turned into loss and gradient in place, the gradient multiplied into dX and dW, whose sums over the chunks
// stay in the accumulator's type. Nothing else has the size of the logits.
#include "shared/torch_api.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/drivers/linear_cross_entropy.h"
#include "cpu/ops/device.h"
#include "cpu/ops/linear_cross_entropy_problem.h"
#include "shared/op_checks.h"

namespace rf {
namespace {

using Operands = LinearCrossEntropyOperands;
using Options = CrossEntropyOptions;
using Budget = std::optional<int64_t>;
using Problem = LinearCrossEntropyProblem;

// The bounds under which filter_eps drops entries of a chunk's gradient: a row's upstream gradients, of its positions
// those of the least.
std::vector<double> filter_bounds(const Problem& p, double eps, const CrossEntropyGrads& g, int64_t rows) {
  const auto number = [&](const void* at, int64_t i) {
    return !at ? 0.0 : std::fabs(p.dtype == DType::f64 ? ((const double*)at)[i] : (double)((const float*)at)[i]);
  };
  const double most = p.dtype == DType::f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  std::vector<double> bounds(rows, most);
  for (int64_t i = 0; i < rows * p.positions; ++i) {
    const double upstream = number(g.loss, i * g.loss_stride) * std::fabs(g.loss_scale) + number(g.lse, i) +
                            number(g.entropy, i) + number(g.logprob, i);
    // A bound that is not finite would drop infinities.
    const double bound = eps * upstream < most ? eps * upstream : 0;
    bounds[i / p.positions] = std::min(bounds[i / p.positions], bound);
  }
  return bounds;
}

// What to compute: numbers per loss (acc, in the order of the rows that take part; null: not wanted), and gradients.
struct Upstream {
  const void* one_loss = nullptr;      // acc, one number for all losses, or
  Tensor loss, lse, entropy, logprob;  // acc, per loss
  double scale = 1;
};
using Gradients = LinearCrossEntropyGradients;

// Advances a pointer to a number per loss.
void* at_loss(const Tensor& t, int64_t index) {
  return t.defined() ? (char*)t.data_ptr() + index * (int64_t)t.element_size() : nullptr;
}

// Memory that all chunks use in turn.
struct Work {
  int64_t rows;        // of a chunk
  Tensor panel;        // logits, then their gradient
  Tensor wide;         // probabilities in acc, where they have another type
  Tensor wide_grad;    // and their gradient
  Tensor stats;        // of the losses
  Tensor x, dx, sums;  // listed rows, their gradient; column sums of a chunk

  Work(const Problem& p, Budget memory_budget, const Gradients& grads, bool entropy) {
    const bool widens = p.probabilities.defined() && p.probabilities.scalar_type() != p.acc;
    const bool narrows = widens && grads.target.defined();
    rows = chunk_rows({p.dtype, p.rows, p.features, p.classes, p.positions, 1 + widens + narrows,
                       memory_budget.value_or(default_memory_budget())});
    const auto options = p.x.options().dtype(p.acc);
    const auto panel_like = [&] { return empty_result({rows, p.outputs}, options); };
    panel = panel_like();
    if (widens) wide = panel_like();
    if (narrows) wide_grad = panel_like();
    stats = at::empty({cross_entropy_stat_rows(p.probabilities.defined(), entropy), rows * p.positions}, options);
    if (p.listed) x = at::empty({rows, p.features}, p.x.options());
    if (p.listed && grads.x.defined()) dx = at::empty({rows, p.features}, grads.x.options());
    if (grads.bias.defined()) sums = at::empty({p.outputs}, options);
  }
};

// Rows of a chunk: what they read, and what their losses' kernels are told.
struct Chunk {
  int64_t begin, rows;
  Tensor x, logits;
  CrossEntropyArgs args;
  CrossEntropyGrads upstream = {};
};

// Losses and statistics of a chunk's logits and, with upstream gradients, the logits' gradient in their place.
CrossEntropyPartial turn_to_loss(const Problem& p, const Work& work, const CrossEntropyOutputs& out,
                                 const Tensor& entropy, const Upstream* up, const Gradients& grads, Chunk& c) {
  const int64_t first = c.begin * p.positions, losses = c.rows * p.positions, size = acc_size(p.dtype);
  const DType acc = acc_dtype(p.dtype);
  CrossEntropyArgs& a = c.args = p.loss;
  a.logits = c.logits.data_ptr();
  point_to_stats(a, work.stats);
  // Null, and not computed, where nobody wants it.
  if (!up || !up->entropy.defined()) a.row_entropy = at_loss(entropy, first);
  Tensor dt;  // in the kernel's type
  if (p.probabilities.defined()) {
    const Tensor t = rows_from(p.probabilities, c.begin, c.rows);
    const auto in_panel = [&](const Tensor& panel) { return rows_from(panel, 0, c.rows).view(t.sizes()); };
    const Tensor read = work.wide.defined() ? in_panel(work.wide).copy_(t) : t;
    a.probabilities = read.const_data_ptr();
    a.probability_layout = *row_layout(read, 1);
    if (grads.target.defined()) {
      dt = work.wide_grad.defined() ? in_panel(work.wide_grad) : rows_from(grads.target, c.begin, c.rows);
      c.upstream.grad_probabilities = dt.mutable_data_ptr();
      c.upstream.grad_probability_layout = *row_layout(dt, 1);
    }
  } else {
    a.target = p.classes_of_rows.const_data_ptr<int64_t>() + first;
  }
  CrossEntropyOutputs here = out;
  for (void** each : {&here.loss, &here.lse, &here.logprob})
    if (*each) *each = (char*)*each + first * size;
  if (here.argmax) here.argmax += first;
  if (!up) return cross_entropy_forward(acc, a, here, losses);

  CrossEntropyGrads& g = c.upstream;
  g.loss = up->one_loss ? up->one_loss : at_loss(up->loss, first);
  g.loss_stride = up->loss.defined();
  g.loss_scale = up->scale;
  g.lse = at_loss(up->lse, first);
  g.entropy = at_loss(up->entropy, first);
  g.logprob = at_loss(up->logprob, first);
  g.grad_logits = c.logits.data_ptr();
  g.grad_layout = p.loss.layout;
  const CrossEntropyPartial sums = cross_entropy_forward_backward(acc, a, here, g, losses);
  if (work.wide_grad.defined()) rows_from(grads.target, c.begin, c.rows).copy_(dt);
  return sums;
}

void add_bias_gradient(const Problem& p, const Work& work, const Chunk& c, std::vector<CompensatedSum>& totals) {
  ActivationBackwardArgs a = {};
  a.grad = c.logits.const_data_ptr();
  a.grad_layout = {1, p.outputs, 0, 1};
  a.columns = p.outputs;
  a.activation = Activation::none;
  a.column_sums = work.sums.mutable_data_ptr();
  activation_backward(acc_dtype(p.dtype), a, c.rows);
  add_to_totals(acc_dtype(p.dtype), work.sums.const_data_ptr(), p.outputs, totals.data());
}

// dX of a chunk and its part of dW, entry by entry, if few entries of the gradient are above filter_eps' bounds.
bool multiply_large_entries(const Problem& p, double filter_eps, const Gradients& grads, const Chunk& c) {
  // Rows of W and x are read where they lie.
  if (filter_eps <= 0 || p.w.stride(1) != 1 || (grads.w.defined() && p.x.stride(1) != 1)) return false;
  SparseMatrix large;
  if (!list_large_entries(p.dtype, c.logits.const_data_ptr(), c.rows, p.outputs,
                          filter_bounds(p, filter_eps, c.upstream, c.rows).data(),
                          most_sparse_entries(c.rows, p.outputs), &large))
    return false;
  if (grads.x.defined()) {
    const bool in_place = grads.x.scalar_type() == p.acc && !p.listed;
    const Tensor dx = in_place ? rows_from(grads.x, c.begin, c.rows)
                               : at::empty({c.rows, p.features}, grads.x.options().dtype(p.acc));
    sparse_product(p.dtype, large, view_of(p.w), p.features, dx.mutable_data_ptr(), p.features, false);
    if (p.listed)
      copy_rows(p, c.begin, dx.to(grads.x.scalar_type()), grads.x, false);
    else if (!in_place)
      rows_from(grads.x, c.begin, c.rows).copy_(dx);
  }
  if (grads.w.defined()) {
    if (c.begin == 0) Tensor(grads.w).zero_();
    sparse_product(p.dtype, transposed(p.dtype, large, p.outputs), view_of(c.x), p.features, grads.w.mutable_data_ptr(),
                   p.features, true);
  }
  return true;
}

void multiply_gradient(const Problem& p, const Work& work, const Gradients& grads, const Chunk& c) {
  if (grads.x.defined()) {
    const Tensor dx = p.listed ? rows_from(work.dx, 0, c.rows) : rows_from(grads.x, c.begin, c.rows);
    multiply(Cpu(p.x), c.logits, p.w, dx);
    if (p.listed) copy_rows(p, c.begin, dx, grads.x, false);
  }
  if (grads.w.defined())
    multiply(Cpu(p.x), transpose(c.logits), c.x, grads.w, {}, c.begin > 0 ? Sum::next : Sum::first);
}

// The sum of the losses; results and gradients go where `out`, `entropy` and `grads` say.
double over_chunks(const Problem& p, Budget memory_budget, double filter_eps, const CrossEntropyOutputs& out,
                   const Tensor& entropy, const Upstream* up, const Gradients& grads) {
  const Work work(p, memory_budget, grads, up && up->entropy.defined());
  CompensatedSum loss;
  std::vector<CompensatedSum> bias(grads.bias.defined() ? p.outputs : 0);
  for (int64_t begin = 0; begin < p.rows; begin += work.rows) {
    Chunk c = {};
    c.begin = begin;
    c.rows = std::min(work.rows, p.rows - begin);
    c.x = p.listed ? rows_from(work.x, 0, c.rows) : rows_from(p.x, begin, c.rows);
    c.logits = rows_from(work.panel, 0, c.rows);
    if (p.listed) copy_rows(p, begin, c.x, p.x, true);
    multiply(Cpu(p.x), c.x, transpose(p.w), c.logits, p.bias);
    loss.add(turn_to_loss(p, work, out, entropy, up, grads, c).loss);
    if (grads.bias.defined()) add_bias_gradient(p, work, c, bias);
    if (!multiply_large_entries(p, filter_eps, grads, c)) multiply_gradient(p, work, grads, c);
  }
  if (grads.bias.defined()) round_totals(acc_dtype(p.dtype), bias.data(), p.outputs, grads.bias.mutable_data_ptr());
  return loss.value();
}

std::vector<Tensor> forward_cpu(const Operands& t, const Options& o, int64_t outputs, Budget memory_budget,
                                OptionalType loss_dtype) {
  check_linear_cross_entropy_forward(t, o, outputs, memory_budget, loss_dtype);
  const bool every_row = outputs & ~(kOutputLoss | kOutputLogprob);
  const Problem p = linear_cross_entropy_problem(t, o, every_row);
  const Tensor& input = t.input;
  const auto shape = loss_shape(input, t.linear_weight);
  const int64_t all_rows = as_matrix(input).size(0);
  const auto per_loss = [&](bool wanted) {
    return wanted ? at::empty({p.rows * p.positions}, input.options().dtype(p.acc)) : Tensor();
  };
  const bool each = o.reduction == at::Reduction::None && (outputs & kOutputLoss);
  const Tensor loss = per_loss(each), lse = per_loss(outputs & kOutputLse),
               entropy = per_loss(outputs & kOutputEntropy), logprob = per_loss(outputs & kOutputLogprob);
  const Tensor argmax =
      outputs & kOutputArgmax ? at::empty({p.rows * p.positions}, input.options().dtype(at::kLong)) : Tensor();
  const CrossEntropyOutputs out = {at_loss(loss, 0), at_loss(lse, 0), at_loss(logprob, 0),
                                   (int64_t*)at_loss(argmax, 0)};
  const double sum = over_chunks(p, memory_budget, 0, out, entropy, nullptr, {});

  const auto type = loss_type(input, t.target, loss_dtype), other = loss_dtype.value_or(input.scalar_type());
  const auto finished = [&](const Tensor& t, at::ScalarType to) {
    return as_type(of_all(p, t, all_rows).reshape(shape), to);
  };
  std::vector<Tensor> results;
  if (each)
    results.push_back(finished(loss, type));
  else if (outputs & kOutputLoss)
    results.push_back(number(o.reduction == at::Reduction::Mean ? mean_of(sum, p.denominator) : sum, type));
  if (outputs & kOutputLse) results.push_back(finished(lse, other));
  if (outputs & kOutputEntropy) results.push_back(finished(entropy, other));
  if (outputs & kOutputLogprob) results.push_back(finished(logprob, type));
  if (outputs & kOutputArgmax) results.push_back(argmax.reshape(shape));
  return results;
}

Gradients new_gradients(const Problem& p, const Operands& t, at::ScalarType dx_type, std::array<bool, 4> mask) {
  const Tensor& input = t.input;
  const auto options = input.options();
  Gradients g;
  if (mask[0])
    g.x = p.listed ? at::zeros(as_matrix(input).sizes(), options.dtype(dx_type))
                   : empty_result(as_matrix(input).sizes(), options.dtype(dx_type));
  if (mask[1]) {
    g.w = empty_result({p.outputs, p.features}, options.dtype(p.acc));
    if (p.rows == 0) g.w.zero_();
  }
  if (mask[2]) g.bias = at::empty({p.outputs}, options.dtype(p.acc));
  if (mask[3]) g.target = empty_result(p.probabilities.sizes(), t.target.options());
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_cpu(const Operands& t, const Options& o,
                                                                        bool argmax_too, Budget memory_budget,
                                                                        double filter_eps, OptionalType loss_dtype,
                                                                        std::array<bool, 3> mask) {
  check_linear_cross_entropy_forward(t, o, kOutputLoss, memory_budget, loss_dtype, filter_eps);
  check_reduced("linear_cross_entropy_forward_backward", o.reduction);
  const Problem p = linear_cross_entropy_problem(t, o, argmax_too);
  const Gradients g = new_gradients(p, t, p.acc, {mask[0], mask[1], mask[2], false});
  const auto options = t.input.options();
  Upstream up;
  static const float single = 1;
  static const double wide = 1;
  up.one_loss = p.acc == at::kDouble ? (const void*)&wide : &single;
  up.scale = o.reduction == at::Reduction::Mean ? 1 / p.denominator : 1;
  const Tensor argmax = at::empty({argmax_too ? p.rows * p.positions : 0}, options.dtype(at::kLong));
  CrossEntropyOutputs out = {};
  if (argmax_too) out.argmax = argmax.mutable_data_ptr<int64_t>();
  const double sum = over_chunks(p, memory_budget, filter_eps, out, Tensor(), &up, g);
  auto [dx, dw, db, none] = g.shaped(t, false);
  return {number(o.reduction == at::Reduction::Mean ? mean_of(sum, p.denominator) : sum,
                 loss_type(t.input, t.target, loss_dtype)),
          argmax_too ? argmax.reshape(loss_shape(t.input, t.linear_weight)) : argmax, dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(const CrossEntropyOutputGrads& grads, const Operands& t,
                                                        const Options& o, Budget memory_budget, double filter_eps,
                                                        std::array<bool, 4> mask) {
  check_linear_cross_entropy_backward(grads, t, o, memory_budget, filter_eps, mask[3]);
  const bool every_row = grads.lse.has_value() || grads.entropy.has_value();
  const Problem p = linear_cross_entropy_problem(t, o, every_row);
  const Gradients g = new_gradients(p, t, t.input.scalar_type(), mask);
  Upstream up;
  const auto rows = [&](const OptionalTensor& t) { return t.has_value() ? of_listed(p, *t) : Tensor(); };
  const Tensor one = grads.loss.has_value() ? as_type(*grads.loss, p.acc) : Tensor();
  if (o.reduction == at::Reduction::None)
    up.loss = rows(grads.loss);
  else if (one.defined())
    up.one_loss = one.const_data_ptr();
  up.scale = o.reduction == at::Reduction::Mean ? 1 / p.denominator : 1;
  up.lse = rows(grads.lse);
  up.entropy = rows(grads.entropy);
  up.logprob = rows(grads.logprob);
  over_chunks(p, memory_budget, filter_eps, {}, Tensor(), &up, g);
  return g.shaped(t, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<forward_cpu>(m, "linear_cross_entropy_forward", isa_in_use);
  register_kernels<forward_backward_cpu>(m, "linear_cross_entropy_forward_backward", isa_in_use);
  register_kernels<backward_cpu>(m, "linear_cross_entropy_backward", isa_in_use);
}

}  // namespace rf
