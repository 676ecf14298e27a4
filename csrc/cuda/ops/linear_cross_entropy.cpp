// linear_cross_entropy on CUDA: the row loss of the loop over chunks. Panels have input's type. Nothing here waits for
// the device, so ignored rows are multiplied like the others: to gather the rest, the host would have to know how many
// there are. filter_eps has no effect: no entry is left out of the products, which are dense.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/chunks.h"
#include "shared/linear_cross_entropy_ops.h"

namespace rf::cuda {
namespace {

using Outputs = LinearCrossEntropyOutputs;
using Gradients = LinearCrossEntropyGradients;
using Upstream = LinearCrossEntropyUpstream;

struct RowLoss : LinearCrossEntropyTensors<CrossEntropyRows>, RowLossOfAll {
  RowLoss(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o, std::optional<int64_t> memory_budget,
          double /*filter_eps*/, bool /*every_row*/)
      : LinearCrossEntropyTensors(t, o, /*wide_panel=*/false), device(t.input) {
    if (class_weight.defined() && o.label_smoothing != 0) {
      class_weight_sum = class_weight.sum();
      loss.class_weight_sum = class_weight_sum.const_data_ptr();
    }
    widens = probabilities.defined() && probabilities.scalar_type() != t.input.scalar_type();
    chunk = cuda_chunk_rows({dtype, rows, features, classes, positions, 1 + widens,
                             memory_budget.value_or(cuda_default_memory_budget(memory_of_device(t.input)))});
    chunks = positions ? ceil_div(rows, chunk) : 0;
    each = o.reduction == at::Reduction::None;
    if (o.reduction == at::Reduction::Mean) set_denominator(o.ignore_index);
  }

  bool writes_x() const { return chunks > 0; }
  bool writes_w() const { return chunks > 0; }
  Tensor of_rows(const Tensor& t) const { return t.to(acc).contiguous(); }
  const Tensor& of_all(const Tensor& t) const { return t; }

  // Each chunk's sum of losses, float64. Gradients for an upstream gradient of 1 are those of the sum, from the one
  // read of the logits that gives the outputs.
  Tensor run(const Outputs& results, const Upstream* upstream, const Gradients& gradients) {
    out = &results;
    up = upstream;
    grads = &gradients;
    const auto options = x.options().dtype(acc);
    const int64_t losses = chunk * positions;
    const Tensor panel = at::empty({chunk, outputs}, x.options());
    if (widens) wide = at::empty({chunk, outputs}, options);
    const bool entropy = results.entropy.defined() || (up && up->entropy.defined());
    stats = at::empty({cross_entropy_stat_rows(probabilities.defined(), entropy), losses}, options);
    spare = at::empty({losses}, options);
    const Workspace memory(cross_entropy_workspace(losses), x);
    workspace = data_or_null(memory.memory);
    if (results.total) totals = at::empty({chunks}, options.dtype(at::kDouble));
    if (gradients.bias.defined()) gradients.bias.zero_();
    const int64_t all = chunks > 0 ? rows : 0;
    over_chunks(device, {x, w, bias, all, gradients.x, gradients.w}, chunk, panel, *this);
    return totals;
  }
  Tensor reduced(const Tensor& sums, at::ScalarType type) const {
    const Tensor total = sums.sum();
    if (!denominator.defined()) return total.to(type);
    // As mean_of, on the device.
    Tensor mean = total / denominator;
    if (class_weight.defined()) mean.masked_fill_(denominator == 0, std::numeric_limits<double>::quiet_NaN());
    return mean.to(type);
  }
  // Those of a sum until here: of a mean over many rows, a half type would lose the small ones in the panel.
  void finish(const Gradients& g) const {
    if (!denominator.defined() || chunks == 0) return;
    for (const Tensor* each : {&g.x, &g.w, &g.bias})
      if (each->defined()) each->div_(grads_denominator);
  }

  Tensor turn(const Chunk& c, const Tensor& logits) const;

  const Cuda device;

 private:
  // The rows' terms of a mean's denominator are class weights, or 1, and known to the device alone.
  void set_denominator(int64_t ignore_index) {
    if (probabilities.defined()) {
      denominator = grads_denominator = at::full({}, (double)(rows * positions), x.options().dtype(at::kDouble));
      return;
    }
    const Tensor y = classes_of_rows.flatten(), counts = y.ne(ignore_index);
    const Tensor terms =
        class_weight.defined()
            ? class_weight.index_select(0, y.clamp(0, classes - 1)).masked_fill_(counts.logical_not(), 0)
            : counts;
    denominator = terms.sum(at::kDouble);
    grads_denominator = denominator.masked_fill(counts.any().logical_not(), 1);
  }

  Tensor class_weight_sum;  // acc
  // Of a mean: what divides the loss, and what divides the gradients, which are 0 where all losses are ignored.
  // float64.
  Tensor denominator, grads_denominator;
  int64_t chunk, chunks;
  bool widens;  // the cross-entropy is computed in float32, beside a panel of a half type: the probabilities have it
  bool each;
  // Of a run.
  const Outputs* out;
  const Upstream* up;  // null: no gradients
  const Gradients* grads;
  Tensor wide, stats, spare, totals;
  void* workspace;
};

Tensor RowLoss::turn(const Chunk& c, const Tensor& logits) const {
  const int64_t first = c.begin * positions;
  const bool logits_too = grads->x.defined() || grads->w.defined() || grads->bias.defined();
  Tensor read = logits;
  if (widens) (read = rows_from(wide, 0, c.rows)).copy_(logits);

  CrossEntropyRows a = loss;
  a.rows = c.rows * positions;
  a.logits = read.const_data_ptr();
  point_to_stats(a, stats);
  if (out->entropy.defined()) a.row_entropy = at_loss(out->entropy, first);
  CrossEntropyResults r = {};
  r.loss = totals.defined() ? at_loss(spare, 0) : at_loss(out->loss, first);
  // Where lse has a gradient, ignored rows have one too, and statistics only if it is asked for.
  r.lse = up && up->lse.defined() ? at_loss(spare, 0) : at_loss(out->lse, first);
  r.logprob = at_loss(out->logprob, first);
  r.argmax = (int64_t*)at_loss(out->argmax, first);
  r.total = at_loss(totals, c.begin / chunk);
  r.total_dtype = DType::f64;
  r.workspace = workspace;
  CrossEntropyUpstream g = {};
  g.grad_logits = logits_too ? read.mutable_data_ptr() : nullptr;
  g.grad_layout = a.layout;
  if (probabilities.defined()) {
    const Tensor t = rows_of_chunk(probabilities, c);
    a.probabilities = t.const_data_ptr();
    a.probability_layout = *row_layout(t, 1);
    if (grads->target.defined()) {
      const Tensor dt = rows_of_chunk(grads->target, c);
      g.grad_probabilities = dt.mutable_data_ptr();
      g.grad_probability_layout = *row_layout(dt, 1);
    }
  } else {
    a.target = (const int64_t*)at_loss(classes_of_rows, first);
  }

  const DType type = widens ? acc_dtype(dtype) : dtype;
  if (up && up->is_one) {
    launch_cross_entropy_forward_backward(type, a, r, g.grad_logits, g.grad_layout, device.stream);
  } else {
    launch_cross_entropy_forward(type, a, r, device.stream);
  }
  if (up && !up->is_one) {
    g.loss_stride = each && up->loss.defined();
    g.loss = at_loss(up->loss, g.loss_stride * first);
    g.weight_sum = denominator.defined() ? denominator.const_data_ptr<double>() : nullptr;
    g.lse = at_loss(up->lse, first);
    g.entropy = at_loss(up->entropy, first);
    g.logprob = at_loss(up->logprob, first);
    launch_cross_entropy_backward(type, a, g, device.stream);
  }
  if (!logits_too) return {};
  if (grads->bias.defined()) grads->bias.add_(at::sum(read, {0}, false, acc));
  if (widens) logits.copy_(read);
  return logits;
}

}  // namespace

void register_linear_cross_entropy(torch::Library& m) {
  rf::register_linear_cross_entropy<RowLoss>(m, architecture_in_use);
}

}  // namespace rf::cuda
