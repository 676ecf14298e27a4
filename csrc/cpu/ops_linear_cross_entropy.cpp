// linear_cross_entropy on the CPU. A chunk of rows at a time: their logits into one panel that is used again and again,
// the panel turned into loss and gradient in place, the gradient multiplied into dX and dW, whose sums over the chunks
// stay in the accumulator's type. Nothing else has the size of the logits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../checks.h"
#include "../torch_api.h"
#include "drivers.h"
#include "gemm_packed.h"
#include "linear_cross_entropy.h"
#include "linear_cross_entropy_tensors.h"
#include "parallel.h"
#include "tuning.h"

namespace rf {

namespace {

struct Options {
  int64_t ignore_index, reduction;
  double label_smoothing, z_loss;
  std::optional<double> softcap, logit_scale;
  std::optional<int64_t> memory_budget;
  double filter_eps = 0;
};

// A call's tensors as the loop over chunks wants them. A "row" is one of input's; it has `positions` losses, one after
// another, each over `classes` logits that lie `positions` apart.
struct Problem {
  Tensor x, w;                // N x D, and classes * positions x D
  Tensor bias, class_weight;  // acc
  Tensor classes_of_rows;     // int64, positions for each row that takes part
  Tensor probabilities;       // N x classes (x positions), as row_layout can walk it
  std::vector<int64_t> list;  // rows that take part, where some have no loss at all
  bool listed = false;
  int64_t all_rows, rows, features, classes, positions, outputs;  // rows: those that take part
  double denominator;
  DType dtype;
  at::ScalarType acc;
  CrossEntropyArgs loss = {};
};

Problem make_problem(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                     const OptionalTensor& linear_bias, const OptionalTensor& weight, const Options& o,
                     bool every_row) {
  Problem p;
  p.dtype = dtype_of(input.scalar_type());
  p.acc = acc_type(input.scalar_type());
  p.x = as_matrix(input);
  p.w = linear_weight.reshape({product(linear_weight.sizes(), 0, linear_weight.dim() - 1), linear_weight.size(-1)});
  p.all_rows = p.rows = p.x.size(0);
  p.features = p.x.size(1);
  p.classes = linear_weight.size(0);
  p.outputs = p.w.size(0);
  p.positions = positions_of(linear_weight);
  if (linear_bias.has_value()) p.bias = linear_bias->to(p.acc).contiguous();
  CrossEntropyArgs& a = p.loss;
  a.classes = p.classes;
  a.layout = {p.positions, p.outputs, p.positions == 1 ? 0 : 1, p.positions};
  a.class_weight_sum = (double)p.classes;
  if (weight.has_value()) {
    p.class_weight = weight->to(p.acc).contiguous();
    a.class_weight = p.class_weight.const_data_ptr();
    a.class_weight_sum = p.class_weight.sum(at::kDouble).item<double>();
  }
  a.ignore_index = o.ignore_index;
  a.label_smoothing = o.label_smoothing;
  a.z_loss = o.z_loss;
  a.softcap = o.softcap.value_or(0.0);
  a.logit_scale = o.logit_scale.value_or(1.0);

  if (at::isFloatingType(target.scalar_type())) {
    p.probabilities = walkable(input.dim() == 1 ? target.unsqueeze(0) : target, 1);
    p.denominator = (double)(p.rows * p.positions);
    return p;
  }
  p.classes_of_rows = target.to(at::kLong).contiguous();
  const int64_t* y = p.classes_of_rows.const_data_ptr<int64_t>();
  const Tensor weights = weight.has_value() ? p.class_weight.to(at::kDouble) : Tensor();
  const double* w = weight.has_value() ? weights.const_data_ptr<double>() : nullptr;
  p.denominator = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    bool any = false;
    for (int64_t i = r * p.positions; i < (r + 1) * p.positions; ++i) {
      if (y[i] == o.ignore_index) continue;
      RF_CHECK(TORCH_CHECK_INDEX, y[i] >= 0 && y[i] < p.classes, "linear_cross_entropy", "target",
               c10::str("classes from 0 to ", p.classes - 1), c10::str("Target ", y[i], " is out of bounds."));
      p.denominator += w ? w[y[i]] : 1;
      any = true;
    }
    if (any) p.list.push_back(r);
  }
  p.listed = !every_row && (int64_t)p.list.size() < p.rows;
  if (p.listed) {
    if (p.x.stride(1) != 1) p.x = p.x.contiguous();
    const Tensor rows = at::from_blob(p.list.data(), {(int64_t)p.list.size()}, at::kLong);
    p.classes_of_rows = p.classes_of_rows.view({p.rows, p.positions}).index_select(0, rows);
    p.rows = (int64_t)p.list.size();
  }
  return p;
}

// Numbers per loss in the order of the rows that take part; and back, with 0 for the others.
Tensor of_listed(const Problem& p, const Tensor& t) {
  const Tensor rows = t.to(p.acc).reshape({p.all_rows, p.positions});
  return p.listed ? rows.index_select(0, at::from_blob((void*)p.list.data(), {p.rows}, at::kLong)) : rows.contiguous();
}
Tensor of_all(const Problem& p, const Tensor& t, int64_t all_rows) {
  if (!p.listed) return t;
  return at::zeros({all_rows, p.positions}, t.options())
      .index_copy_(0, at::from_blob((void*)p.list.data(), {p.rows}, at::kLong), t.view({p.rows, p.positions}));
}

MatrixView view_of(const Tensor& t) { return {t.const_data_ptr(), 1, t.stride(0), 0, t.stride(1)}; }

// c = a b + bias, or c += a b, by whichever GEMM the table names. a may have the accumulator's type beside a b of a
// half type, and so may c.
void multiply(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const DType dtype = dtype_of(b.scalar_type());
  const int64_t m = c.size(0), n = c.size(1), k = b.size(0);
  if (a.scalar_type() == b.scalar_type() && c.scalar_type() == b.scalar_type() && gemm_by_aten(dtype, m, n, k)) {
    Tensor out = c;
    if (accumulate)
      out.addmm_(a, b);
    else if (bias.defined())
      at::addmm_out(out, bias, a, b);
    else
      at::mm_out(out, a, b);
    return;
  }
  Gemm g = {};
  g.m = m;
  g.n = n;
  g.k = k;
  // A matrix whose rows are adjacent down its columns is the transpose of one that is stored by rows.
  g.a_transposed = a.stride(1) != 1 && a.stride(0) == 1;
  g.a = view_of(g.a_transposed ? a.t() : a);
  g.b_transposed = b.stride(1) != 1 && b.stride(0) == 1;
  g.b = view_of(g.b_transposed ? b.t() : b);
  g.wide_a = a.scalar_type() != b.scalar_type();
  g.wide_c = c.scalar_type() != b.scalar_type();
  g.accumulate = accumulate;
  g.epilogue.c = c.mutable_data_ptr();
  g.epilogue.c_stride = c.stride(0);
  g.epilogue.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  gemm(dtype, g);
}

// Rows of a chunk gathered from, or scattered to, where the list says they lie.
void copy_rows(const Problem& p, int64_t begin, const Tensor& chunk, const Tensor& whole, bool gather) {
  const int64_t bytes = p.features * (int64_t)whole.element_size(), stride = whole.stride(0) * whole.element_size();
  char *packed = (char*)chunk.mutable_data_ptr(), *spread = (char*)whole.data_ptr();
  parallel_for(chunk.size(0), tuning::kParallelElements / std::max<int64_t>(1, p.features) + 1,
               [&](int64_t from, int64_t to) {
                 for (int64_t i = from; i < to; ++i) {
                   char *a = packed + i * bytes, *b = spread + p.list[begin + i] * stride;
                   std::memcpy(gather ? a : b, gather ? b : a, (size_t)bytes);
                 }
               });
}

// The bounds under which filter_eps drops entries of a chunk's gradient: a row's upstream gradients, of its positions
// those of the least.
std::vector<double> filter_bounds(const Problem& p, double eps, const CrossEntropyGrads& g, int64_t rows) {
  const auto number = [&](const void* at, int64_t i) {
    return !at ? 0.0 : std::fabs(p.dtype == DType::f64 ? ((const double*)at)[i] : (double)((const float*)at)[i]);
  };
  std::vector<double> bounds(rows, std::numeric_limits<double>::infinity());
  for (int64_t i = 0; i < rows * p.positions; ++i) {
    const double upstream = number(g.loss, i * g.loss_stride) * std::fabs(g.loss_scale) + number(g.lse, i) +
                            number(g.entropy, i) + number(g.logprob, i);
    bounds[i / p.positions] = std::min(bounds[i / p.positions], eps * upstream);
  }
  return bounds;
}

// What to compute: numbers per loss (acc, in the order of the rows that take part; null: not wanted), and gradients.
struct Upstream {
  Tensor loss, lse, entropy, logprob;  // acc, per loss; loss may be one number
  double scale = 1;
};
using Gradients = LinearCrossEntropyGradients;

// Advances a pointer to a number per loss.
void* at_loss(const Tensor& t, int64_t index) {
  return t.defined() ? (char*)t.data_ptr() + index * (int64_t)t.element_size() : nullptr;
}

CrossEntropyPartial over_chunks(const Problem& p, const Options& o, const CrossEntropyOutputs& out,
                                const Tensor& entropy, const Upstream* up, const Gradients& grads) {
  const bool by_probability = p.probabilities.defined();
  const bool widens = by_probability && p.probabilities.scalar_type() != p.acc,
             narrows = widens && grads.target.defined();
  const auto options = p.x.options().dtype(p.acc);
  const int64_t size = acc_size(p.dtype);
  const int64_t chunk = chunk_rows({p.dtype, p.rows, p.features, p.classes, p.positions, 1 + widens + narrows,
                                    o.memory_budget.value_or(default_memory_budget())});
  const auto panel_like = [&] { return advised(at::empty({chunk, p.outputs}, options)); };
  const Tensor panel = panel_like();
  const Tensor wide = widens ? panel_like() : Tensor(), wide_grad = narrows ? panel_like() : Tensor();
  const Tensor stats = at::empty({5, chunk * p.positions}, options);
  const Tensor gathered = p.listed ? at::empty({chunk, p.features}, p.x.options()) : Tensor();
  const Tensor dx_chunk = p.listed && grads.x.defined() ? at::empty({chunk, p.features}, grads.x.options()) : Tensor();
  const Tensor sums = grads.bias.defined() ? at::empty({p.outputs}, options) : Tensor();
  const DType acc = acc_dtype(p.dtype);
  const bool by_rows =
      p.w.stride(1) == 1 && (p.x.stride(1) == 1 || !grads.w.defined());  // else filter_eps has no effect

  CrossEntropyPartial total = {0, 0, -1};
  for (int64_t begin = 0; begin < p.rows; begin += chunk) {
    const int64_t rows = std::min(chunk, p.rows - begin), losses = rows * p.positions, first = begin * p.positions;
    const Tensor logits = panel.narrow(0, 0, rows);
    Tensor x = p.listed ? gathered.narrow(0, 0, rows) : p.x.narrow(0, begin, rows);
    if (p.listed) copy_rows(p, begin, x, p.x, true);
    multiply(x, p.w.t(), logits, p.bias, false);

    CrossEntropyArgs a = p.loss;
    a.logits = logits.data_ptr();
    a.row_max = at_loss(stats[kMax], 0);
    a.row_log_sum = at_loss(stats[kLogSum], 0);
    a.row_entropy = entropy.defined()             ? at_loss(entropy, first)
                    : up && up->entropy.defined() ? at_loss(stats[kEntropy], 0)
                                                  : nullptr;
    CrossEntropyGrads g = {};
    if (by_probability) {
      const Tensor t = p.probabilities.narrow(0, begin, rows);
      a.row_mass = at_loss(stats[kMass], 0);
      a.row_target_mass = at_loss(stats[kTargetMass], 0);
      const Tensor kernels_own = widens ? wide.narrow(0, 0, rows).view(t.sizes()) : t;
      if (widens) Tensor(kernels_own).copy_(t);
      a.probabilities = kernels_own.const_data_ptr();
      a.probability_layout = *row_layout(kernels_own, 1);
      if (grads.target.defined()) {
        const Tensor dt = narrows ? wide_grad.narrow(0, 0, rows).view(t.sizes()) : grads.target.narrow(0, begin, rows);
        g.grad_probabilities = dt.mutable_data_ptr();
        g.grad_probability_layout = *row_layout(dt, 1);
      }
    } else {
      a.target = p.classes_of_rows.const_data_ptr<int64_t>() + first;
    }
    CrossEntropyOutputs here = out;
    for (void** each : {&here.loss, &here.lse, &here.logprob})
      if (*each) *each = (char*)*each + first * size;
    if (here.argmax) here.argmax += first;

    CrossEntropyPartial sum;
    if (!up) {
      sum = cross_entropy_forward(acc, a, here, losses);
    } else {
      g.loss = up->loss.defined() ? at_loss(up->loss, up->loss.numel() == 1 ? 0 : first) : nullptr;
      g.loss_stride = g.loss && up->loss.numel() > 1;
      g.loss_scale = up->scale;
      g.lse = at_loss(up->lse, first);
      g.entropy = at_loss(up->entropy, first);
      g.logprob = at_loss(up->logprob, first);
      g.grad_logits = logits.data_ptr();
      g.grad_layout = p.loss.layout;
      sum = cross_entropy_forward_backward(acc, a, here, g, losses);
    }
    total.loss += sum.loss;
    if (narrows)
      grads.target.narrow(0, begin, rows)
          .copy_(wide_grad.narrow(0, 0, rows).view(grads.target.narrow(0, begin, rows).sizes()));
    if (grads.bias.defined()) {
      activation_backward(acc,
                          {logits.const_data_ptr(),
                           nullptr,
                           {1, p.outputs, 0, 1},
                           nullptr,
                           p.outputs,
                           Activation::none,
                           sums.mutable_data_ptr()},
                          rows);
      Tensor(grads.bias).add_(sums);
    }
    SparseMatrix large;
    if (o.filter_eps > 0 && by_rows &&
        list_large_entries(p.dtype, logits.const_data_ptr(), rows, p.outputs,
                           filter_bounds(p, o.filter_eps, g, rows).data(), most_sparse_entries(rows, p.outputs),
                           &large)) {
      if (grads.x.defined()) {
        const Tensor own = grads.x.scalar_type() == p.acc && !p.listed ? grads.x.narrow(0, begin, rows)
                                                                       : at::empty({rows, p.features}, options);
        sparse_product(p.dtype, large, view_of(p.w), p.features, own.mutable_data_ptr(), p.features, false);
        if (p.listed)
          copy_rows(p, begin, own.to(grads.x.scalar_type()), grads.x, false);
        else if (grads.x.scalar_type() != p.acc)
          grads.x.narrow(0, begin, rows).copy_(own);
      }
      if (grads.w.defined()) {
        if (begin == 0) Tensor(grads.w).zero_();
        sparse_product(p.dtype, transposed(p.dtype, large, p.outputs), view_of(x), p.features,
                       grads.w.mutable_data_ptr(), p.features, true);
      }
      continue;
    }
    if (grads.x.defined()) {
      const Tensor dx = p.listed ? dx_chunk.narrow(0, 0, rows) : grads.x.narrow(0, begin, rows);
      multiply(logits, p.w, dx, Tensor(), false);
      if (p.listed) copy_rows(p, begin, dx, grads.x, false);
    }
    if (grads.w.defined()) multiply(logits.t(), x, grads.w, Tensor(), begin > 0);
  }
  return total;
}

Tensor number(double value, at::ScalarType type) { return at::scalar_tensor(value, at::TensorOptions(type)); }

std::vector<Tensor> forward_cpu(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t ignore_index,
                                int64_t reduction, double label_smoothing, double z_loss, std::optional<double> softcap,
                                std::optional<double> logit_scale, int64_t outputs,
                                std::optional<int64_t> memory_budget, std::optional<at::ScalarType> loss_dtype) {
  const Options o = {ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, memory_budget};
  const bool every_row = outputs & ~(kOutputLoss | kOutputLogprob);
  const Problem p = make_problem(input, linear_weight, target, linear_bias, weight, o, every_row);
  const auto shape = loss_shape(input, linear_weight);
  const int64_t all_rows = as_matrix(input).size(0);
  const auto per_loss = [&](bool wanted) {
    return wanted ? at::empty({p.rows * p.positions}, input.options().dtype(p.acc)) : Tensor();
  };
  const bool each = reduction == at::Reduction::None && (outputs & kOutputLoss);
  const Tensor loss = per_loss(each), lse = per_loss(outputs & kOutputLse),
               entropy = per_loss(outputs & kOutputEntropy), logprob = per_loss(outputs & kOutputLogprob);
  const Tensor argmax =
      outputs & kOutputArgmax ? at::empty({p.rows * p.positions}, input.options().dtype(at::kLong)) : Tensor();
  const CrossEntropyOutputs out = {at_loss(loss, 0), at_loss(lse, 0), at_loss(logprob, 0),
                                   (int64_t*)at_loss(argmax, 0)};
  const CrossEntropyPartial sums = over_chunks(p, o, out, entropy, nullptr, {});

  const auto type = loss_type(input, target, loss_dtype), other = loss_dtype.value_or(input.scalar_type());
  const auto finished = [&](const Tensor& t, at::ScalarType to) {
    return of_all(p, t, all_rows).reshape(shape).to(to);
  };
  std::vector<Tensor> results;
  if (each)
    results.push_back(finished(loss, type));
  else if (outputs & kOutputLoss)
    results.push_back(number(reduction == at::Reduction::Mean ? sums.loss / p.denominator : sums.loss, type));
  if (outputs & kOutputLse) results.push_back(finished(lse, other));
  if (outputs & kOutputEntropy) results.push_back(finished(entropy, other));
  if (outputs & kOutputLogprob) results.push_back(finished(logprob, type));
  if (outputs & kOutputArgmax) results.push_back(argmax.reshape(shape));
  return results;
}

Gradients new_gradients(const Problem& p, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                        at::ScalarType dx_type, std::array<bool, 4> mask) {
  const auto options = input.options();
  Gradients g;
  if (mask[0])
    g.x = p.listed ? at::zeros(as_matrix(input).sizes(), options.dtype(dx_type))
                   : advised(at::empty(as_matrix(input).sizes(), options.dtype(dx_type)));
  if (mask[1]) {
    g.w = advised(at::empty({p.outputs, p.features}, options.dtype(p.acc)));
    if (p.rows == 0) g.w.zero_();
  }
  if (mask[2]) g.bias = at::zeros({p.outputs}, options.dtype(p.acc));
  if (mask[3]) g.target = advised(at::empty(p.probabilities.sizes(), target.options()));
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_cpu(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptionalTensor& linear_bias,
    const OptionalTensor& weight, int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss,
    std::optional<double> softcap, std::optional<double> logit_scale, bool argmax_too,
    std::optional<int64_t> memory_budget, double filter_eps, std::optional<at::ScalarType> loss_dtype,
    std::array<bool, 3> mask) {
  const Options o = {ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, memory_budget, filter_eps};
  const Problem p = make_problem(input, linear_weight, target, linear_bias, weight, o, argmax_too);
  const Gradients g = new_gradients(p, input, linear_weight, target, p.acc, {mask[0], mask[1], mask[2], false});
  Upstream up;
  up.loss = at::ones({1}, input.options().dtype(p.acc));
  up.scale = reduction == at::Reduction::Mean ? 1 / p.denominator : 1;
  const Tensor argmax = at::empty({argmax_too ? p.rows * p.positions : 0}, input.options().dtype(at::kLong));
  CrossEntropyOutputs out = {};
  if (argmax_too) out.argmax = argmax.mutable_data_ptr<int64_t>();
  const CrossEntropyPartial sums = over_chunks(p, o, out, Tensor(), &up, g);
  auto [dx, dw, db, none] = g.shaped(input, linear_weight, target, false);
  return {number(reduction == at::Reduction::Mean ? sums.loss / p.denominator : sums.loss,
                 loss_type(input, target, loss_dtype)),
          argmax_too ? argmax.reshape(loss_shape(input, linear_weight)) : argmax, dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_logprob, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double z_loss, std::optional<double> softcap, std::optional<double> logit_scale,
    std::optional<int64_t> memory_budget, double filter_eps, std::array<bool, 4> mask) {
  const Options o = {ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, memory_budget, filter_eps};
  const bool every_row = grad_lse.has_value() || grad_entropy.has_value();
  const Problem p = make_problem(input, linear_weight, target, linear_bias, weight, o, every_row);
  const Gradients g = new_gradients(p, input, linear_weight, target, input.scalar_type(), mask);
  Upstream up;
  const auto rows = [&](const OptionalTensor& t) { return t.has_value() ? of_listed(p, *t) : Tensor(); };
  if (grad_loss.has_value())
    up.loss = reduction == at::Reduction::None ? rows(grad_loss) : grad_loss->to(p.acc).reshape({1});
  up.scale = reduction == at::Reduction::Mean ? 1 / p.denominator : 1;
  up.lse = rows(grad_lse);
  up.entropy = rows(grad_entropy);
  up.logprob = rows(grad_logprob);
  over_chunks(p, o, {}, Tensor(), &up, g);
  return g.shaped(input, linear_weight, target, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  m.impl("linear_cross_entropy_forward", forward_cpu);
  m.impl("linear_cross_entropy_forward_backward", forward_backward_cpu);
  m.impl("linear_cross_entropy_backward", backward_cpu);
}

}  // namespace rf
