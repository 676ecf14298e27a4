// linear_cross_entropy on CUDA. A chunk of rows at a time: their logits into one panel of input's type that is used
// again and again, the panel turned into its gradient in place, the gradient multiplied into dX and dW, whose sums over
// the chunks stay in the accumulator's type. Nothing here waits for the device, so ignored rows are multiplied like the
// others: to gather the rest, the host would have to know how many there are.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/chunks.h"
#include "shared/cross_entropy_tensors.h"
#include "shared/linear_cross_entropy_tensors.h"
#include "shared/op_checks.h"

namespace rf::cuda {
namespace {

using Operands = LinearCrossEntropyOperands;
using Options = CrossEntropyOptions;
using Budget = std::optional<int64_t>;

// A call's tensors as the loop over chunks wants them. A "row" is one of input's; it has `positions` losses, one after
// another, each over as many logits as there are classes, which lie `positions` apart.
struct Problem {
  Tensor x, w, bias;                      // N x D, and outputs x D; of input's type
  Tensor classes_of_rows;                 // int64, positions for each row
  Tensor probabilities;                   // N x classes (x positions), as row_layout can walk it
  Tensor class_weight, class_weight_sum;  // acc
  // Of a mean: what divides the loss, and what divides the gradients, which are 0 where all losses are ignored.
  // float64.
  Tensor denominator, grads_denominator;
  int64_t rows, positions, outputs, chunk, chunks;
  at::ScalarType acc;
  // The cross-entropy is computed in float32, beside a panel of a half type, where the probabilities have it.
  bool widens;
  CrossEntropyRows loss = {};
};

// The rows' terms of a mean's denominator are class weights, or 1, and known to the device alone.
void set_denominator(Problem& p) {
  const auto numbers = p.x.options().dtype(at::kDouble);
  if (p.probabilities.defined()) {
    p.denominator = p.grads_denominator = at::full({}, (double)(p.rows * p.positions), numbers);
    return;
  }
  const Tensor y = p.classes_of_rows.flatten(), counts = y.ne(p.loss.ignore_index);
  const Tensor terms =
      p.class_weight.defined()
          ? p.class_weight.index_select(0, y.clamp(0, p.loss.classes - 1)).masked_fill_(counts.logical_not(), 0)
          : counts;
  p.denominator = terms.sum(at::kDouble);
  p.grads_denominator = p.denominator.masked_fill(counts.any().logical_not(), 1);
}

Problem make_problem(const Operands& t, const Options& o, Budget memory_budget) {
  Problem p;
  const Tensor &input = t.input, &linear_weight = t.linear_weight, &target = t.target;
  p.acc = acc_type(input.scalar_type());
  p.x = as_matrix(input);
  p.rows = p.x.size(0);
  p.positions = positions_of(linear_weight);
  p.outputs = linear_weight.size(0) * p.positions;
  p.w = linear_weight.reshape({p.outputs, linear_weight.size(-1)});
  if (t.linear_bias.has_value()) p.bias = t.linear_bias->reshape({p.outputs}).contiguous();
  CrossEntropyRows& a = p.loss;
  a.classes = linear_weight.size(0);
  a.layout = {p.positions, p.outputs, p.positions == 1 ? 0 : 1, p.positions};
  if (t.weight.has_value()) {
    p.class_weight = t.weight->to(p.acc).contiguous();
    a.class_weight = p.class_weight.const_data_ptr();
    if (o.label_smoothing != 0) {
      p.class_weight_sum = p.class_weight.sum();
      a.class_weight_sum = p.class_weight_sum.const_data_ptr();
    }
  }
  set_options(a, o);
  if (at::isFloatingType(target.scalar_type()))
    p.probabilities = as_strided_rows(input.dim() == 1 ? target.unsqueeze(0) : target, 1);
  else
    p.classes_of_rows = target.to(at::kLong).contiguous();
  p.widens = p.probabilities.defined() && p.probabilities.scalar_type() != input.scalar_type();
  p.chunk = cuda_chunk_rows({dtype_of(input.scalar_type()), p.rows, p.x.size(1), a.classes, p.positions, 1 + p.widens,
                             memory_budget.value_or(cuda_default_memory_budget(memory_of_device(input)))});
  p.chunks = p.positions ? ceil_div(p.rows, p.chunk) : 0;
  if (o.reduction == at::Reduction::Mean) set_denominator(p);
  return p;
}

// Numbers per loss, acc but for argmax, and each chunk's sum of losses, float64; undefined where not wanted.
struct Outputs {
  Tensor loss, lse, entropy, logprob, argmax, totals;
};
using Gradients = LinearCrossEntropyGradients;

void* at_loss(const Tensor& t, int64_t index) {
  return t.defined() ? (char*)t.data_ptr() + index * (int64_t)t.element_size() : nullptr;
}

// Gradients, if wanted, are those for `up`, or, without it, those of the sum of the losses, from the one read of the
// logits that gives the outputs.
void over_chunks(const Cuda& device, const Problem& p, const Outputs& out, Gradients* grads,
                 const CrossEntropyRowGrads* up) {
  const auto options = p.x.options().dtype(p.acc);
  const auto read_as = p.widens ? p.acc : p.x.scalar_type();
  const int64_t losses_of_chunk = p.chunk * p.positions;
  const Tensor panel = at::empty({p.chunk, p.outputs}, p.x.options());
  const Tensor wide = p.widens ? at::empty({p.chunk, p.outputs}, options) : Tensor();
  const bool entropy = out.entropy.defined() || (up && up->entropy.defined());
  const Tensor stats =
      at::empty({cross_entropy_stat_rows(p.probabilities.defined(), entropy), losses_of_chunk}, options);
  const Tensor spare = at::empty({losses_of_chunk}, options);
  Workspace workspace(cross_entropy_workspace(losses_of_chunk), p.x);
  const bool logits_too = grads && (grads->x.defined() || grads->w.defined() || grads->bias.defined());

  for (int64_t i = 0; i < p.chunks; ++i) {
    const int64_t begin = i * p.chunk, rows = std::min(p.chunk, p.rows - begin), first = begin * p.positions;
    const Tensor x = p.x.narrow(0, begin, rows);
    Tensor logits = panel.narrow(0, 0, rows);
    multiply(device, x, transpose(p.w), logits, p.bias);
    Tensor read = logits;
    if (p.widens) (read = wide.narrow(0, 0, rows)).copy_(logits);

    CrossEntropyRows a = p.loss;
    a.rows = rows * p.positions;
    a.logits = read.const_data_ptr();
    point_to_stats(a, stats);
    if (out.entropy.defined()) a.row_entropy = at_loss(out.entropy, first);
    CrossEntropyResults r = {};
    r.loss = out.totals.defined() ? at_loss(spare, 0) : at_loss(out.loss, first);
    // Where lse has a gradient, ignored rows have one too, and statistics only if it is asked for.
    r.lse = up && up->lse.defined() ? at_loss(spare, 0) : at_loss(out.lse, first);
    r.logprob = at_loss(out.logprob, first);
    r.argmax = (int64_t*)at_loss(out.argmax, first);
    r.total = at_loss(out.totals, i);
    r.total_dtype = DType::f64;
    r.workspace = workspace.data();
    CrossEntropyUpstream g = {};
    g.grad_logits = logits_too ? read.mutable_data_ptr() : nullptr;
    g.grad_layout = a.layout;
    if (p.probabilities.defined()) {
      const Tensor t = p.probabilities.narrow(0, begin, rows);
      a.probabilities = t.const_data_ptr();
      a.probability_layout = *row_layout(t, 1);
      if (grads && grads->target.defined()) {
        const Tensor dt = grads->target.narrow(0, begin, rows);
        g.grad_probabilities = dt.mutable_data_ptr();
        g.grad_probability_layout = *row_layout(dt, 1);
      }
    } else {
      a.target = (const int64_t*)at_loss(p.classes_of_rows, first);
    }

    const DType dtype = dtype_of(read_as);
    if (grads && !up) {
      launch_cross_entropy_forward_backward(dtype, a, r, g.grad_logits, g.grad_layout, device.device.stream);
    } else {
      launch_cross_entropy_forward(dtype, a, r, device.device.stream);
    }
    if (up) {
      g.loss_stride = up->loss.defined() && up->loss.numel() > 1;
      g.loss = at_loss(up->loss, g.loss_stride ? first : 0);
      g.weight_sum = p.denominator.defined() ? p.denominator.const_data_ptr<double>() : nullptr;
      g.lse = at_loss(up->lse, first);
      g.entropy = at_loss(up->entropy, first);
      g.logprob = at_loss(up->logprob, first);
      launch_cross_entropy_backward(dtype, a, g, device.device.stream);
    }
    if (!logits_too) continue;

    if (grads->bias.defined()) grads->bias.add_(at::sum(read, {0}, false, p.acc));
    if (p.widens) logits.copy_(read);
    if (grads->x.defined()) {
      Tensor dx = grads->x.narrow(0, begin, rows);
      multiply(device, logits, p.w, dx, {}, Sum::first);
    }
    if (grads->w.defined()) multiply(device, transpose(logits), x, grads->w, {}, i > 0 ? Sum::next : Sum::first);
  }
}

Outputs new_outputs(const Problem& p, int64_t reduction, int64_t outputs) {
  const auto per_loss = [&](bool wanted, at::ScalarType type) {
    return wanted ? at::empty({p.rows * p.positions}, p.x.options().dtype(type)) : Tensor();
  };
  const bool loss = outputs & kOutputLoss, each = reduction == at::Reduction::None;
  Outputs out;
  out.loss = per_loss(loss && each, p.acc);
  out.lse = per_loss(outputs & kOutputLse, p.acc);
  out.entropy = per_loss(outputs & kOutputEntropy, p.acc);
  out.logprob = per_loss(outputs & kOutputLogprob, p.acc);
  out.argmax = per_loss(outputs & kOutputArgmax, at::kLong);
  if (loss && !each) out.totals = at::empty({p.chunks}, p.x.options().dtype(at::kDouble));
  return out;
}

Tensor reduced(const Problem& p, const Outputs& out) {
  const Tensor total = out.totals.sum();
  if (!p.denominator.defined()) return total;
  // As mean_of, on the device.
  const Tensor mean = total / p.denominator;
  return p.class_weight.defined() ? mean.masked_fill_(p.denominator == 0, std::numeric_limits<double>::quiet_NaN())
                                  : mean;
}

std::vector<Tensor> forward(const Operands& t, const Options& o, int64_t outputs, Budget memory_budget,
                            OptionalType loss_dtype) {
  check_linear_cross_entropy_forward(t, o, outputs, memory_budget, loss_dtype);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o, memory_budget);
  const Outputs out = new_outputs(p, o.reduction, outputs);
  over_chunks(device, p, out, nullptr, nullptr);

  const auto shape = loss_shape(t.input, t.linear_weight);
  const auto type = loss_type(t.input, t.target, loss_dtype), other = loss_dtype.value_or(t.input.scalar_type());
  std::vector<Tensor> results;
  if (outputs & kOutputLoss)
    results.push_back((out.totals.defined() ? reduced(p, out) : out.loss.view(shape)).to(type));
  if (outputs & kOutputLse) results.push_back(out.lse.view(shape).to(other));
  if (outputs & kOutputEntropy) results.push_back(out.entropy.view(shape).to(other));
  if (outputs & kOutputLogprob) results.push_back(out.logprob.view(shape).to(type));
  if (outputs & kOutputArgmax) results.push_back(out.argmax.view(shape));
  return results;
}

Gradients new_gradients(const Problem& p, const Tensor& target, at::ScalarType dx_type, std::array<bool, 4> mask) {
  const auto options = p.x.options().dtype(p.acc);
  const auto matrix = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return p.chunks == 0 ? at::zeros(sizes, options.dtype(type)) : at::empty(sizes, options.dtype(type));
  };
  Gradients g;
  if (mask[0]) g.x = matrix(p.x.sizes(), dx_type);
  if (mask[1]) g.w = matrix(p.w.sizes(), p.acc);
  if (mask[2]) g.bias = at::zeros({p.outputs}, options);
  if (mask[3]) g.target = at::empty(p.probabilities.sizes(), target.options());
  return g;
}

// filter_eps has no effect: no entry is left out of the products, which are dense.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward(const Operands& t, const Options& o,
                                                                    bool argmax_too, Budget memory_budget,
                                                                    double filter_eps, OptionalType loss_dtype,
                                                                    std::array<bool, 3> mask) {
  check_linear_cross_entropy_forward(t, o, kOutputLoss, memory_budget, loss_dtype, filter_eps);
  check_reduced("linear_cross_entropy_forward_backward", o.reduction);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o, memory_budget);
  Gradients g = new_gradients(p, t.target, p.acc, {mask[0], mask[1], mask[2], false});
  const Outputs out = new_outputs(p, o.reduction, argmax_too ? kOutputLoss | kOutputArgmax : kOutputLoss);
  over_chunks(device, p, out, &g, nullptr);
  // Those of a sum until here: of a mean over many rows, a half type would lose the small ones in the panel.
  if (p.denominator.defined() && p.chunks > 0)
    for (Tensor* each : {&g.x, &g.w, &g.bias})
      if (each->defined()) each->div_(p.grads_denominator);
  auto [dx, dw, db, none] = g.shaped(t, false);
  return {reduced(p, out).to(loss_type(t.input, t.target, loss_dtype)),
          argmax_too ? out.argmax.view(loss_shape(t.input, t.linear_weight))
                     : at::empty({0}, t.input.options().dtype(at::kLong)),
          dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const CrossEntropyOutputGrads& grads, const Operands& t,
                                                    const Options& o, Budget memory_budget, double filter_eps,
                                                    std::array<bool, 4> mask) {
  check_linear_cross_entropy_backward(grads, t, o, memory_budget, filter_eps, mask[3]);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o, memory_budget);
  Gradients g = new_gradients(p, t.target, t.input.scalar_type(), mask);
  const CrossEntropyRowGrads up(grads, p.acc);
  over_chunks(device, p, {}, &g, &up);
  return g.shaped(t, true);
}

}  // namespace

void register_linear_cross_entropy(torch::Library& m) {
  register_kernels<forward>(m, "linear_cross_entropy_forward", architecture_in_use);
  register_kernels<forward_backward>(m, "linear_cross_entropy_forward_backward", architecture_in_use);
  register_kernels<backward>(m, "linear_cross_entropy_backward", architecture_in_use);
}

}  // namespace rf::cuda
