// linear_cross_entropy on the CPU: the row loss of the loop over chunks. Panels have the accumulator's type; rows
// without a loss take no part; few large entries of the slopes are multiplied one by one.
#include "shared/torch_api.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/drivers/linear_cross_entropy.h"
#include "cpu/ops/device.h"
#include "cpu/ops/linear_cross_entropy_problem.h"
#include "shared/linear_cross_entropy_ops.h"

namespace rf {
namespace {

using Outputs = LinearCrossEntropyOutputs;
using Gradients = LinearCrossEntropyGradients;
using Upstream = LinearCrossEntropyUpstream;

// Memory that all chunks use in turn.
struct Work {
  int64_t rows;        // of a chunk
  Tensor panel;        // logits, then their gradient
  Tensor wide;         // probabilities in acc, where they have another type
  Tensor wide_grad;    // and their gradient
  Tensor stats;        // of the losses
  Tensor x, dx, sums;  // listed or scattered rows; the former's gradient; column sums of a chunk

  Work(const LinearCrossEntropyProblem& p, std::optional<int64_t> memory_budget, const Gradients& grads, bool entropy) {
    const bool widens = p.probabilities.defined() && p.probabilities.scalar_type() != p.acc;
    const bool narrows = widens && grads.target.defined();
    rows = chunk_rows({p.dtype, p.rows, p.features, p.classes, p.positions, 1 + widens + narrows, memory_budget});
    const auto options = p.x.options().dtype(p.acc);
    const auto panel_like = [&] { return empty_result({rows, p.outputs}, options); };
    panel = panel_like();
    if (widens) wide = panel_like();
    if (narrows) wide_grad = panel_like();
    stats = empty_result({cross_entropy_stat_rows(p.probabilities.defined(), entropy), rows * p.positions}, options);
    if (p.listed || is_scattered(p.x)) x = empty_result({rows, p.features}, p.x.options());
    if (p.listed && grads.x.defined()) dx = empty_result({rows, p.features}, grads.x.options());
    if (grads.bias.defined()) sums = empty_result({p.outputs}, options);
  }
};

struct RowLoss : LinearCrossEntropyProblem, RowLossOfAll {
  RowLoss(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o, std::optional<int64_t> memory_budget,
          double filter_eps, bool every_row)
      : LinearCrossEntropyProblem(t, o, every_row),
        device(t.input),
        reduction(o.reduction),
        memory_budget(memory_budget),
        filter_eps(filter_eps) {}

  bool writes_x() const { return !listed; }
  bool writes_w() const { return rows > 0; }
  void finish(const Gradients&) const {}
  Tensor reduced(double sum, at::ScalarType type) const {
    return number(reduction == at::Reduction::Mean ? mean_of(sum, denominator) : sum, type);
  }

  // The sum of the losses.
  double run(const Outputs& results, const Upstream* upstream, const Gradients& gradients) {
    const Work memory(*this, memory_budget, gradients, upstream && upstream->entropy.defined());
    work = &memory;
    out = &results;
    up = upstream;
    grads = &gradients;
    bias_sums.resize(gradients.bias.defined() ? outputs : 0);
    over_chunks(device, {x, w, bias, rows, gradients.x, gradients.w}, memory.rows, memory.panel, *this);
    if (gradients.bias.defined())
      round_totals(acc_dtype(dtype), bias_sums.data(), outputs, gradients.bias.mutable_data_ptr());
    return total.value();
  }

  // ---- what over_chunks asks for ----

  Tensor read(const Tensor& x, const Chunk& c) const {
    if (!work->x.defined()) return rows_of_chunk(x, c);
    const Tensor packed = rows_from(work->x, 0, c.rows);
    if (!listed) return packed.copy_(rows_of_chunk(x, c));
    copy_rows(c, packed, x, true);
    return packed;
  }
  Tensor to_write(const Tensor& dx, const Chunk& c) const {
    return listed ? rows_from(work->dx, 0, c.rows) : rows_of_chunk(dx, c);
  }
  void written(const Tensor& dx, const Chunk& c, const Tensor& packed) const {
    if (listed) copy_rows(c, packed, dx, false);
  }
  Tensor turn(const Chunk& c, const Tensor& logits);
  bool multiply_slopes(const Chunk& c, const Tensor& x, const Tensor& slopes) const;

  const Cpu device;

 private:
  CrossEntropyGrads upstream_of(const Chunk& c, const Tensor& logits) const;
  std::vector<double> filter_bounds(const Chunk& c, const Tensor& slopes) const;
  void add_bias_gradient(const Chunk& c, const Tensor& slopes);

  const int64_t reduction;
  const std::optional<int64_t> memory_budget;
  const double filter_eps;
  // Of a run.
  const Work* work;
  const Outputs* out;
  const Upstream* up;  // null: no gradients
  const Gradients* grads;
  CompensatedSum total;
  std::vector<CompensatedSum> bias_sums;
};

// Upstream gradients of a chunk's losses, and that the logits' takes their place.
CrossEntropyGrads RowLoss::upstream_of(const Chunk& c, const Tensor& logits) const {
  static const float single = 1;
  static const double wide = 1;
  const int64_t first = c.begin * positions;
  CrossEntropyGrads g = {};
  g.loss_stride = reduction == at::Reduction::None && up->loss.defined();
  g.loss = !up->is_one ? at_loss(up->loss, g.loss_stride * first) : acc == at::kDouble ? (const void*)&wide : &single;
  g.loss_scale = reduction == at::Reduction::Mean ? 1 / denominator : 1;
  g.lse = at_loss(up->lse, first);
  g.entropy = at_loss(up->entropy, first);
  g.logprob = at_loss(up->logprob, first);
  g.grad_logits = logits.data_ptr();
  g.grad_layout = loss.layout;
  return g;
}

// Losses and statistics of a chunk's logits and, with upstream gradients, the logits' gradient in their place.
Tensor RowLoss::turn(const Chunk& c, const Tensor& logits) {
  const int64_t first = c.begin * positions, losses = c.rows * positions;
  CrossEntropyArgs a = loss;
  a.logits = logits.data_ptr();
  point_to_stats(a, work->stats);
  // Null, and not computed, where nobody wants it.
  if (!up || !up->entropy.defined()) a.row_entropy = at_loss(out->entropy, first);
  CrossEntropyGrads g = up ? upstream_of(c, logits) : CrossEntropyGrads{};
  Tensor dt;  // in the kernel's type
  if (probabilities.defined()) {
    const Tensor t = rows_of_chunk(probabilities, c);
    const auto in_panel = [&](const Tensor& panel) { return rows_from(panel, 0, c.rows).view(t.sizes()); };
    const Tensor read = work->wide.defined() ? in_panel(work->wide).copy_(t) : t;
    a.probabilities = read.const_data_ptr();
    a.probability_layout = *row_layout(read, 1);
    if (grads->target.defined()) {
      dt = work->wide_grad.defined() ? in_panel(work->wide_grad) : rows_of_chunk(grads->target, c);
      g.grad_probabilities = dt.mutable_data_ptr();
      g.grad_probability_layout = *row_layout(dt, 1);
    }
  } else {
    a.target = classes_of_rows.const_data_ptr<int64_t>() + first;
  }
  const CrossEntropyOutputs here = {at_loss(out->loss, first), at_loss(out->lse, first), at_loss(out->logprob, first),
                                    (int64_t*)at_loss(out->argmax, first)};
  const DType type = acc_dtype(dtype);
  if (!up) {
    total.add(cross_entropy_forward(type, a, here, losses).loss);
    return {};
  }
  total.add(cross_entropy_forward_backward(type, a, here, g, losses).loss);
  if (work->wide_grad.defined()) rows_of_chunk(grads->target, c).copy_(dt);
  if (grads->bias.defined()) add_bias_gradient(c, logits);
  return logits;
}

void RowLoss::add_bias_gradient(const Chunk& c, const Tensor& slopes) {
  ActivationBackwardArgs a = {};
  a.grad = slopes.const_data_ptr();
  a.grad_layout = {1, outputs, 0, 1};
  a.columns = outputs;
  a.activation = Activation::none;
  a.column_sums = work->sums.mutable_data_ptr();
  activation_backward(acc_dtype(dtype), a, c.rows);
  add_to_totals(acc_dtype(dtype), work->sums.const_data_ptr(), outputs, bias_sums.data());
}

// The bounds under which filter_eps drops entries of a chunk's gradient: a row's upstream gradients, of its positions
// those of the least.
std::vector<double> RowLoss::filter_bounds(const Chunk& c, const Tensor& slopes) const {
  const CrossEntropyGrads g = upstream_of(c, slopes);
  const auto number = [&](const void* at, int64_t i) {
    return !at ? 0.0 : std::fabs(dtype == DType::f64 ? ((const double*)at)[i] : (double)((const float*)at)[i]);
  };
  const double most = dtype == DType::f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  std::vector<double> bounds(c.rows, most);
  for (int64_t i = 0; i < c.rows * positions; ++i) {
    const double upstream = number(g.loss, i * g.loss_stride) * std::fabs(g.loss_scale) + number(g.lse, i) +
                            number(g.entropy, i) + number(g.logprob, i);
    // A bound that is not finite would drop infinities.
    const double bound = filter_eps * upstream < most ? filter_eps * upstream : 0;
    bounds[i / positions] = std::min(bounds[i / positions], bound);
  }
  return bounds;
}

// dX of a chunk and its part of dW, entry by entry, if few entries of the gradient are above filter_eps' bounds.
bool RowLoss::multiply_slopes(const Chunk& c, const Tensor& x_rows, const Tensor& slopes) const {
  // Rows of W and x are read where they lie.
  if (filter_eps <= 0 || w.stride(1) != 1 || (grads->w.defined() && x_rows.stride(1) != 1)) return false;
  SparseMatrix large;
  if (!list_large_entries(dtype, slopes.const_data_ptr(), c.rows, outputs, filter_bounds(c, slopes).data(),
                          most_sparse_entries(c.rows, outputs), &large))
    return false;
  if (grads->x.defined()) {
    const bool in_place = grads->x.scalar_type() == acc && !listed;
    const Tensor dx =
        in_place ? rows_of_chunk(grads->x, c) : empty_result({c.rows, features}, grads->x.options().dtype(acc));
    sparse_product(dtype, large, view_of(w), features, dx.mutable_data_ptr(), features, false);
    if (listed)
      copy_rows(c, dx.to(grads->x.scalar_type()), grads->x, false);
    else if (!in_place)
      rows_of_chunk(grads->x, c).copy_(dx);
  }
  if (grads->w.defined()) {
    if (c.begin == 0) Tensor(grads->w).zero_();
    sparse_product(dtype, transposed(dtype, large, outputs), view_of(x_rows), features, grads->w.mutable_data_ptr(),
                   features, true);
  }
  return true;
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_linear_cross_entropy<RowLoss>(m, isa_in_use); }

}  // namespace rf
