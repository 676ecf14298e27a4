// linear_nll on CUDA. A chunk of rows at a time: the products into one panel that is used again and again, its slopes
// in their place, or beside them in a half type, the slopes multiplied into dX and dW, whose sums over the chunks stay
// in the accumulator's type. Products of half types stay in float32 until then: what is left over of a prediction may
// be less than its last digit. Nothing here waits for the device.
#include "shared/torch_api.h"

#include <cmath>

#include "cuda/ops/ops.h"
#include "shared/chunks.h"
#include "shared/linear_cross_entropy_tensors.h"
#include "shared/op_checks.h"

namespace rf::cuda {
namespace {

using Operands = LinearNllOperands;
using Options = LinearNllOptions;

// A call's tensors as the loop over chunks wants them.
struct Problem {
  Tensor x, w, bias, target;  // N x D, outputs x D, outputs, N x outputs; target of any type
  Tensor scale, row_factor;   // acc
  int64_t rows, outputs;
  DType dtype;
  at::ScalarType acc;
  Likelihood likelihood = {};  // what it is in every chunk
  // What is left of a mean's denominator for the end; float64, undefined where there is nothing.
  Tensor divisor;

  at::TensorOptions options() const { return x.options().dtype(acc); }
};

// A mean's denominator divides the losses and slopes of single elements. Of float16 it would take all of them out of
// range, so there its square root does, and the sums are divided by the rest.
void set_mean(Problem& p) {
  const double count = (double)p.rows * (double)p.outputs;
  const Tensor weights = p.row_factor.defined() ? p.row_factor.sum(at::kDouble) : Tensor();
  if (count == 0 || p.dtype == DType::f16) {
    if (count != 0) p.likelihood.factor = std::exp2(-std::floor(std::log2(count) / 2));
    p.divisor = weights.defined() ? weights * ((double)p.outputs * p.likelihood.factor)
                                  : at::full({}, count * p.likelihood.factor, p.x.options().dtype(at::kDouble));
  } else if (weights.defined()) {
    p.row_factor = p.row_factor / (weights * (double)p.outputs);
  } else {
    p.likelihood.factor = 1 / count;
  }
}

Problem make_problem(const Operands& t, const Options& o) {
  Problem p;
  const Tensor &input = t.input, &weight = t.weight;
  p.dtype = dtype_of(input.scalar_type());
  p.acc = acc_type(input.scalar_type());
  p.rows = rows_of(input);
  p.outputs = weight.size(0);
  p.x = input.reshape({p.rows, weight.size(1)});
  p.w = weight;
  p.target = t.target.reshape({p.rows, p.outputs});
  if (t.bias.has_value()) p.bias = t.bias->contiguous();
  if (t.scale.has_value()) p.scale = t.scale->to(p.acc).expand({p.outputs}).contiguous();
  if (t.sample_weight.has_value()) p.row_factor = t.sample_weight->to(p.acc).reshape({p.rows}).contiguous();
  Likelihood& a = p.likelihood;
  a.family = (Family)o.family;
  a.outputs = p.outputs;
  a.bias = p.bias.defined() ? p.bias.const_data_ptr() : nullptr;
  a.scale = p.scale.defined() ? p.scale.const_data_ptr() : nullptr;
  a.variance = o.variance;
  a.full = o.full;
  a.factor = 1;
  if (o.reduction == at::Reduction::Mean) set_mean(p);
  return p;
}

// What a call computes, undefined or false where not wanted.
struct Outputs {
  Tensor each;         // losses, N x outputs, of the type that they are returned in
  bool total = false;  // of the losses
  Tensor x, w;         // gradients, the latter acc
  bool bias = false, scale = false;
  Tensor upstream;  // of each loss, N x outputs; 1 if undefined

  bool slopes() const { return x.defined() || w.defined(); }
};

// The numbers whose sums are the total and the gradients of bias and scale: a row for each part of each chunk.
struct Parts {
  Tensor total, bias, scale;
};

Tensor rows_of_chunk(const Tensor& t, int64_t begin, int64_t rows) {
  return t.defined() ? t.narrow(0, begin, rows) : Tensor();
}

Parts over_chunks(const Cuda& device, const Problem& p, const Outputs& to) {
  const bool half = p.x.scalar_type() != p.acc;
  const auto target_type = p.target.scalar_type() == p.x.scalar_type() ? p.x.scalar_type() : p.acc;
  const bool spare_loss = to.each.defined() && to.each.scalar_type() != p.acc;
  const auto copied = [](const Tensor& t, at::ScalarType type) {
    return t.defined() && (t.scalar_type() != type || !t.is_contiguous());
  };
  const int64_t panels = 1 + half + copied(p.target, target_type) + copied(to.upstream, p.acc) + spare_loss;
  const int64_t most = cuda_chunk_rows({.dtype = p.dtype,
                                        .rows = p.rows,
                                        .features = p.x.size(1),
                                        .classes = p.outputs,
                                        .positions = 1,
                                        .panels = panels,
                                        .memory_budget = cuda_default_memory_budget(memory_of_device(p.x))});
  const int64_t chunks = p.outputs ? ceil_div(p.rows, most) : 0;

  const auto in_all = [&](int64_t (*of_rows)(DType, int64_t, int64_t)) {
    if (chunks == 0) return int64_t(0);
    return (chunks - 1) * of_rows(p.dtype, most, p.outputs) + of_rows(p.dtype, p.rows - (chunks - 1) * most, p.outputs);
  };
  const auto columns = [&](bool wanted) {
    return wanted ? at::empty({in_all(likelihood_parts), p.outputs}, p.options()) : Tensor();
  };
  Parts parts = {{}, columns(to.bias), columns(to.scale)};
  if (to.total) parts.total = at::empty({in_all(likelihood_blocks)}, p.x.options().dtype(at::kDouble));

  const Tensor panel = at::empty({most, p.outputs}, p.options());
  const Tensor beside = half && to.slopes() ? at::empty({most, p.outputs}, p.x.options()) : Tensor();
  const Tensor spare = spare_loss ? at::empty({most, p.outputs}, p.options()) : Tensor();
  int64_t block = 0, part = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = i * most, rows = std::min(most, p.rows - begin);
    const Tensor x = p.x.narrow(0, begin, rows);
    const Tensor target = p.target.narrow(0, begin, rows).to(target_type).contiguous();
    Tensor upstream = rows_of_chunk(to.upstream, begin, rows);
    if (upstream.defined()) upstream = upstream.to(p.acc).contiguous();
    Tensor each = rows_of_chunk(to.each, begin, rows);
    Tensor predictions = panel.narrow(0, 0, rows);
    multiply(device, x, transpose(p.w), predictions);
    const Tensor slopes = half ? rows_of_chunk(beside, 0, rows) : predictions;

    Likelihood a = p.likelihood;
    a.rows = rows;
    a.product = predictions.const_data_ptr();
    a.target = target.const_data_ptr();
    a.target_is_acc = target_type == p.acc;
    a.row_weight = p.row_factor.defined() ? p.row_factor.narrow(0, begin, rows).const_data_ptr() : nullptr;
    a.grad = data_or_null(upstream);
    a.loss = data_or_null(spare_loss ? spare : each);
    a.loss_sums = to.total ? parts.total.mutable_data_ptr<double>() + block : nullptr;
    a.gradient = to.slopes() ? slopes.data_ptr() : nullptr;
    a.bias_sums = to.bias ? parts.bias.select(0, part).data_ptr() : nullptr;
    a.scale_sums = to.scale ? parts.scale.select(0, part).data_ptr() : nullptr;
    launch_likelihood(p.dtype, a, device.device.stream);
    block += likelihood_blocks(p.dtype, rows, p.outputs);
    part += likelihood_parts(p.dtype, rows, p.outputs);
    if (spare_loss) each.copy_(spare.narrow(0, 0, rows));

    if (to.x.defined()) {
      Tensor dx = to.x.narrow(0, begin, rows);
      multiply(device, slopes, p.w, dx, {}, Sum::first);
    }
    if (to.w.defined()) {
      Tensor dw = to.w;
      multiply(device, transpose(slopes), x, dw, {}, i > 0 ? Sum::next : Sum::first);
    }
  }
  return parts;
}

Outputs outputs_for_gradients(const Problem& p, at::ScalarType dx_type, std::array<bool, 4> mask) {
  const auto matrix = [&](at::IntArrayRef sizes, at::ScalarType type) {
    const auto options = p.x.options().dtype(type);
    return p.rows * p.outputs == 0 ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  Outputs to;
  if (mask[0]) to.x = matrix(p.x.sizes(), dx_type);
  if (mask[1]) to.w = matrix(p.w.sizes(), p.acc);
  to.bias = mask[2];
  to.scale = mask[3];
  return to;
}

Tensor total_of(const Problem& p, const Parts& parts) {
  const Tensor total = parts.total.sum();
  return p.divisor.defined() ? total / p.divisor : total;
}

// In the shapes of what they belong to, and, rounded, in its types; those of a reduced loss for its upstream gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_of(const Problem& p, const Outputs& to, const Parts& parts,
                                                        const Operands& of, const Tensor& upstream, bool rounded) {
  const auto finished = [&](Tensor t, const Tensor& like, at::IntArrayRef sizes) {
    if (!t.defined()) return at::empty({0}, like.options());
    if (p.divisor.defined() && p.rows * p.outputs > 0) t.div_(p.divisor);
    if (upstream.defined()) t.mul_(upstream);
    return (rounded ? t.to(like.scalar_type()) : t).view(sizes);
  };
  const Tensor &weight = of.weight, &v = of.scale.has_value() ? *of.scale : weight;
  const Tensor of_scale = !to.scale ? Tensor() : v.dim() == 0 ? parts.scale.sum() : parts.scale.sum(0);
  return {finished(to.x, of.input, of.input.sizes()), finished(to.w, weight, weight.sizes()),
          finished(to.bias ? parts.bias.sum(0) : Tensor(), weight, weight.sizes().slice(0, 1)),
          finished(of_scale, v, v.sizes())};
}

Tensor forward(const Operands& t, const Options& o, OptionalType loss_dtype) {
  check_linear_nll_forward(t, o, loss_dtype);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o);
  const auto type = loss_type(t.input, t.target, loss_dtype);
  Outputs to;
  to.total = o.reduction != at::Reduction::None;
  if (!to.total) to.each = at::empty({p.rows, p.outputs}, p.x.options().dtype(type));
  const Parts parts = over_chunks(device, p, to);
  return to.total ? total_of(p, parts).to(type) : to.each.view(t.target.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward(const Operands& t, const Options& o,
                                                                    OptionalType loss_dtype, std::array<bool, 4> mask) {
  check_linear_nll_forward(t, o, loss_dtype, mask[3]);
  check_reduced("linear_nll_forward_backward", o.reduction);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o);
  Outputs to = outputs_for_gradients(p, p.acc, mask);
  to.total = true;
  const Parts parts = over_chunks(device, p, to);
  auto [dx, dw, db, dv] = gradients_of(p, to, parts, t, {}, false);
  return {total_of(p, parts).to(loss_type(t.input, t.target, loss_dtype)), dx, dw, db, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Operands& t, const Options& o,
                                                    std::array<bool, 4> mask) {
  check_linear_nll_backward(grad, t, o, mask[3]);
  const Cuda device(t.input);
  const Problem p = make_problem(t, o);
  const bool each = o.reduction == at::Reduction::None;
  Outputs to = outputs_for_gradients(p, each ? t.input.scalar_type() : p.acc, mask);
  if (each) to.upstream = grad.reshape({p.rows, p.outputs});
  const Parts parts = over_chunks(device, p, to);
  return gradients_of(p, to, parts, t, each ? Tensor() : grad, true);
}

}  // namespace

void register_linear_nll(torch::Library& m) {
  register_kernels<forward>(m, "linear_nll_forward", architecture_in_use);
  register_kernels<forward_backward>(m, "linear_nll_forward_backward", architecture_in_use);
  register_kernels<backward>(m, "linear_nll_backward", architecture_in_use);
}

}  // namespace rf::cuda
