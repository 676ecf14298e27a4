// linear_nll on CUDA: the row loss of the loop over chunks. Panels have the accumulator's type: what is left over of a
// prediction may be less than a half type's last digit. Slopes take the predictions' place, or of half types a panel
// beside them. Nothing here waits for the device.
#include "shared/torch_api.h"

#include <cmath>

#include "cuda/ops/ops.h"
#include "shared/chunks.h"
#include "shared/linear_nll_ops.h"

namespace rf::cuda {
namespace {

struct RowLoss : LinearNllTensors, RowLossOfAll {
  RowLoss(const LinearNllOperands& t, const LinearNllOptions& o)
      : LinearNllTensors(t, o, /*wide_bias=*/false), device(t.input) {
    if (t.scale.has_value()) scale = t.scale->to(acc).expand({outputs}).contiguous();
    all.family = family;
    all.outputs = outputs;
    all.bias = data_or_null(bias);
    all.scale = data_or_null(scale);
    all.variance = o.variance;
    all.full = o.full;
    all.factor = 1;
    if (reduction == at::Reduction::Mean) set_mean();
  }

  // A reduced loss's upstream gradient is known to the device alone, and multiplies in the end.
  at::ScalarType dx_type() const { return each() ? x.scalar_type() : acc; }
  void set_upstream(const Tensor& grad) { upstream = each() ? grad.reshape({rows, outputs}) : grad; }
  Tensor new_losses(at::ScalarType type) { return losses = at::empty({rows, outputs}, options().dtype(type)); }
  void run();
  Tensor reduced(at::ScalarType type) const {
    const Tensor total = loss_parts.sum();
    return (divisor.defined() ? total / divisor : total).to(type);
  }
  Tensor of_bias() const { return bias_too ? bias_parts.sum(0) : Tensor(); }
  Tensor of_scale(bool one) const { return !scale_too ? Tensor() : one ? scale_parts.sum() : scale_parts.sum(0); }
  void finish(const Tensor& gradient) const {
    if (divisor.defined() && !empty()) gradient.div_(divisor);
    if (upstream.defined() && !each()) gradient.mul_(upstream);
  }

  Tensor turn(const Chunk& c, const Tensor& predictions);

  const Cuda device;

 private:
  void set_mean();
  bool slopes_too() const { return dx.defined() || dw.defined(); }

  Tensor scale;         // acc
  Likelihood all = {};  // what it is in every chunk
  // What is left of a mean's denominator for the end; float64, undefined where there is nothing.
  Tensor divisor;
  Tensor upstream;  // undefined: 1
  // Results: losses, of the type that they are returned in, or the numbers whose sums are the total and the gradients
  // of bias and scale: a row for each part of each chunk.
  Tensor losses, loss_parts, bias_parts, scale_parts;
  // Of the loop: panels beside the predictions', undefined where not needed; and the parts until here.
  Tensor slopes, wide_losses;
  int64_t block = 0, part = 0;
  at::ScalarType target_type;
};

// A mean's denominator divides the losses and slopes of single elements. Of float16 it would take all of them out of
// range, so there its square root does, and the sums are divided by the rest.
void RowLoss::set_mean() {
  const double count = (double)rows * (double)outputs;
  const Tensor weights = row_weight.defined() ? row_weight.sum(at::kDouble) : Tensor();
  if (count == 0 || dtype == DType::f16) {
    if (count != 0) all.factor = std::exp2(-std::floor(std::log2(count) / 2));
    divisor = weights.defined() ? weights * ((double)outputs * all.factor)
                                : at::full({}, count * all.factor, x.options().dtype(at::kDouble));
  } else if (weights.defined()) {
    row_weight = row_weight / (weights * (double)outputs);
  } else {
    all.factor = 1 / count;
  }
}

Tensor RowLoss::turn(const Chunk& c, const Tensor& predictions) {
  const auto of_chunk = [&](const Tensor& t) { return t.defined() ? rows_of_chunk(t, c) : t; };
  const Tensor rows_target = of_chunk(target).to(target_type).contiguous();
  const Tensor grads = each() && upstream.defined() ? of_chunk(upstream).to(acc).contiguous() : Tensor();
  const Tensor to = slopes.defined() ? rows_from(slopes, 0, c.rows) : predictions, row_losses = of_chunk(losses);
  Likelihood a = all;
  a.rows = c.rows;
  a.product = predictions.const_data_ptr();
  a.target = rows_target.const_data_ptr();
  a.target_is_acc = target_type == acc;
  a.row_weight = data_or_null(of_chunk(row_weight));
  a.grad = data_or_null(grads);
  a.loss = data_or_null(wide_losses.defined() ? wide_losses : row_losses);
  a.loss_sums = loss_parts.defined() ? loss_parts.mutable_data_ptr<double>() + block : nullptr;
  a.gradient = slopes_too() ? to.data_ptr() : nullptr;
  a.bias_sums = bias_too ? bias_parts.select(0, part).data_ptr() : nullptr;
  a.scale_sums = scale_too ? scale_parts.select(0, part).data_ptr() : nullptr;
  launch_likelihood(dtype, a, device.stream);
  block += likelihood_blocks(dtype, c.rows, outputs);
  part += likelihood_parts(dtype, c.rows, outputs);
  if (wide_losses.defined()) row_losses.copy_(rows_from(wide_losses, 0, c.rows));
  return slopes_too() ? to : Tensor();
}

void RowLoss::run() {
  const bool half = x.scalar_type() != acc, each_upstream = each() && upstream.defined();
  target_type = target.scalar_type() == x.scalar_type() ? x.scalar_type() : acc;
  const bool wide_too = losses.defined() && losses.scalar_type() != acc;
  const auto copied = [](const Tensor& t, at::ScalarType type) {
    return t.scalar_type() != type || !t.is_contiguous();
  };
  const int64_t panels = 1 + half + copied(target, target_type) + (each_upstream && copied(upstream, acc)) + wide_too;
  const int64_t most = cuda_chunk_rows({.dtype = dtype,
                                        .rows = rows,
                                        .features = features,
                                        .classes = outputs,
                                        .positions = 1,
                                        .panels = panels,
                                        .memory_budget = cuda_default_memory_budget(memory_of_device(x))});
  const int64_t chunks = outputs ? ceil_div(rows, most) : 0;

  const auto in_all = [&](int64_t (*of_rows)(DType, int64_t, int64_t)) {
    if (chunks == 0) return int64_t(0);
    return (chunks - 1) * of_rows(dtype, most, outputs) + of_rows(dtype, rows - (chunks - 1) * most, outputs);
  };
  const auto parts = [&] { return at::empty({in_all(likelihood_parts), outputs}, options()); };
  if (bias_too) bias_parts = parts();
  if (scale_too) scale_parts = parts();
  if (value && !each()) loss_parts = at::empty({in_all(likelihood_blocks)}, options().dtype(at::kDouble));
  const Tensor panel = at::empty({most, outputs}, options()), no_bias;  // the kernel adds it
  if (half && slopes_too()) slopes = at::empty({most, outputs}, x.options());
  if (wide_too) wide_losses = at::empty({most, outputs}, options());
  over_chunks(device, {x, w, no_bias, chunks > 0 ? rows : 0, dx, dw}, most, panel, *this);
}

}  // namespace

void register_linear_nll(torch::Library& m) { rf::register_linear_nll<RowLoss>(m, architecture_in_use); }

}  // namespace rf::cuda
