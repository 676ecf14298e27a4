// phm_linear on the CPU: x W^T with W[u q' + v, p d' + r] = sum over m of a[m, u, p] s[m, v, r], n x n blocks of q' x
// d', without W; with the arithmetic of the dense layer, in one of two ways.
//
// Few rows (up to q') are mixed, a chunk at a time: Z[(row, u), (m, r)] = sum over p of a[m, u, p] x[row, (p, r)],
// multiplied by S = s seen as q' x d. Backward makes the same two products that the dense layer does, of Z's gradient
// with S and of Z with the output's.
//
// For many rows, whose Z would be the larger, W is made an n-th at a time, as large as S: the rows of outputs u for
// products with x, the columns of inputs p for those with the output's gradient. W's own gradient, an n-th at a time
// too, is contracted with a and s.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/linear_ops.h"
#include "shared/phm_linear_tensors.h"

namespace rf {
namespace {

struct PhmProblem : PhmTensors {
  using PhmTensors::PhmTensors;

  MatrixView x_rows(int64_t begin) const {
    return {(const char*)x.const_data_ptr() + begin * x.stride(0) * size_of(dtype), 1, x.stride(0), 0, 1};
  }
  // Equal chunks of rows whose mixed rows stay in the L2 of a few cores.
  int64_t chunk_rows() const {
    const int64_t mixed = tuning::kMixedBytes / std::max<int64_t>(1, inputs * acc_size(dtype));
    const int64_t most = ceil_div(std::max(mixed, tuning::kLeastMixedRows), n);
    return std::max<int64_t>(1, ceil_div(rows, ceil_div(std::max<int64_t>(1, rows), most)));
  }
  Tensor mixed_rows() const { return at::empty({std::min(rows, chunk_rows()) * n, inputs}, s.options().dtype(acc)); }
  void mix(const Tensor& coefficients, int64_t begin, int64_t count, const Tensor& z) const {
    mix_parts(dtype, {x_rows(begin), n, n * n, from_part, coefficients.const_data_ptr(), z.mutable_data_ptr()}, count);
  }

  bool many_rows() const { return rows > to_part; }
  Tensor part_of_weight() const { return at::empty({to_part, inputs}, s.options().dtype(acc)); }
  // Parts of S's rows combined into those of an n-th of W, (v, (p, r)) for one u or (v, (u, r)) for one p.
  void combine(const Tensor& coefficients, int64_t which, const Tensor& w) const {
    mix_parts(dtype,
              {view_of(s), n, n, from_part, (char*)coefficients.const_data_ptr() + which * n * n * acc_size(dtype),
               w.mutable_data_ptr()},
              to_part);
  }
};

// Y of many rows, and what was before the activation where that is kept.
void forward_by_weights(const PhmProblem& p, const Tensor& bias, Activation activation, const Tensor& y,
                        const Tensor& preactivation) {
  const Tensor coefficients = p.a.permute({1, 2, 0}).contiguous(), w = p.part_of_weight();  // u, p, m
  const auto type = p.x.scalar_type();
  const Cpu device(p.x);
  const bool left_to_aten = device.why_aten({type, p.rows, p.to_part, p.inputs});
  const Tensor sums = left_to_aten && preactivation.defined() ? preactivation : y;
  for (int64_t u = 0; u < p.n; ++u) {
    p.combine(coefficients, u, w);
    const auto part = [&](const Tensor& t) { return t.narrow(-1, u * p.to_part, p.to_part); };
    const Tensor c = part(sums), b = bias.defined() ? part(bias) : bias;
    if (left_to_aten) {
      multiply(device, p.x, transpose(as_type(w, type)), c, b);
      continue;
    }
    GemmProblem g = gemm_problem(p.x, transpose(w), c);
    g.bias = data_or_null(b);
    g.activation = activation;
    g.preactivation = preactivation.defined() ? part(preactivation).mutable_data_ptr() : nullptr;
    device.gemm(p.dtype, g);
  }
  if (left_to_aten && activation != Activation::none) device.activate(sums, y, activation);
}

// Gradients of many rows, of x, of S (acc) and of a (u, m, p); undefined or null where not wanted.
void backward_by_weights(const PhmProblem& p, const Tensor& dy, const Tensor& dx, const Tensor& ds, double* da) {
  const Cpu device(dy);
  if (dx.defined()) {
    const Tensor coefficients = p.unmixing(), w = p.part_of_weight();  // p, u, m
    const bool left_to_aten = device.why_aten({dy.scalar_type(), p.rows, p.from_part, p.outputs});
    for (int64_t i = 0; i < p.n; ++i) {
      p.combine(coefficients, i, w);
      const Tensor parts = left_to_aten ? as_type(w, dy.scalar_type()) : w;
      const Tensor columns =
          parts.view({p.to_part, p.n, p.from_part}).permute({1, 0, 2}).reshape({p.outputs, p.from_part});
      multiply(device, dy, columns, dx.narrow(1, i * p.from_part, p.from_part));
    }
  }
  if (!ds.defined() && !da) return;
  const auto options = p.s.options().dtype(p.acc);
  const Tensor coefficients = p.a.permute({1, 0, 2}).contiguous();  // u, m, p
  const Tensor dw = at::empty({p.to_part, p.inputs}, options), term = ds.defined() ? at::empty_like(dw) : Tensor();
  std::vector<double> products(p.n * p.n);
  for (int64_t u = 0; u < p.n; ++u) {
    multiply(device, transpose(dy.narrow(1, u * p.to_part, p.to_part)), p.x, dw);
    if (ds.defined()) {
      const Tensor& to = u == 0 ? ds : term;
      mix_parts(acc_dtype(p.dtype),
                {view_of(dw), p.n, p.n, p.from_part,
                 (char*)coefficients.const_data_ptr() + u * p.n * p.n * acc_size(p.dtype), to.mutable_data_ptr()},
                p.to_part);
      if (u > 0) Tensor(ds).add_(term);
    }
    if (da) {  // of part p of dW's rows with part m of S's
      std::fill(products.begin(), products.end(), 0.0);
      add_part_products(p.dtype, {dw.const_data_ptr(), view_of(p.s), p.n, p.n, p.from_part, nullptr}, p.to_part,
                        products.data());
      for (int64_t i = 0; i < p.n; ++i)
        for (int64_t m = 0; m < p.n; ++m) da[(u * p.n + m) * p.n + i] = products[i * p.n + m];
    }
  }
}

std::tuple<Tensor, Tensor> phm_linear_forward(const Tensor& input, const Tensor& a, const Tensor& s,
                                              const OptionalTensor& bias, string_view activation,
                                              bool save_preactivation) {
  const Activation act = check_phm_linear_forward(input, a, s, bias, activation);
  const Cpu device(input);
  PhmProblem p(input, a, s);
  auto sizes = input.sizes().vec();
  sizes.back() = p.outputs;
  Tensor y = empty_result(sizes, input.options());
  Tensor pre = save_preactivation ? empty_result(sizes, input.options()) : at::empty({0}, input.options());
  if (y.numel() == 0) return {y, pre};
  p.set_input(input);
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  if (p.many_rows()) {
    const std::array<int64_t, 2> matrix = {p.rows, p.outputs};
    forward_by_weights(p, b, act, y.view(matrix), save_preactivation ? pre.view(matrix) : Tensor());
    return {y, pre};
  }
  const Tensor coefficients = p.mixing(), z = p.mixed_rows();
  const bool wide = p.dtype != acc_dtype(p.dtype);
  const int64_t step = p.chunk_rows(), size = size_of(p.dtype);
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t count = std::min(step, p.rows - begin), mixed = count * p.n, at = begin * p.outputs * size;
    p.mix(coefficients, begin, count, z);
    char *to = (char*)y.mutable_data_ptr() + at, *kept = save_preactivation ? (char*)pre.data_ptr() + at : nullptr;
    if (device.why_aten({input.scalar_type(), mixed, p.to_part, p.inputs, wide})) {
      const auto chunk = [&](const Tensor& t) { return t.view({p.rows, p.outputs}).narrow(0, begin, count); };
      const Tensor sums = chunk(save_preactivation ? pre : y);
      multiply(device, z.narrow(0, 0, mixed), transpose(p.s), sums.view({mixed, p.to_part}));
      if (b.defined()) Tensor(sums).add_(b);
      if (act != Activation::none) device.activate(sums, chunk(y), act);
      continue;
    }
    Gemm g = {mixed, p.to_part, p.inputs, view_of(z), false, view_of(p.s), true, {}};
    g.wide_a = wide;
    g.epilogue = {.c = to,
                  .c_stride = p.to_part,
                  .bias = b.defined() ? b.const_data_ptr() : nullptr,
                  .activation = act,
                  .preactivation = kept,
                  .bias_rows = p.n,
                  .bias_stride = p.to_part};
    phm_product(p.dtype, g, p.n);
  }
  return {y, pre};
}

// input is needed for the gradients of a and s.
std::tuple<Tensor, Tensor, Tensor, Tensor> phm_linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                               const Tensor& a, const Tensor& s,
                                                               const OptionalTensor& saved, string_view activation_name,
                                                               std::array<bool, 4> mask) {
  const Activation activation = check_phm_linear_backward(grad, input, a, s, saved, activation_name, mask);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  const Cpu device(grad);
  PhmProblem p(grad, a, s);
  if (mask[1] || mask[2]) p.set_input(*input);
  const ActivationGradient of = activation_gradient(device, grad, saved, activation, mask[3]);
  const Tensor dy = of.dz.contiguous();

  const auto acc_options = grad.options().dtype(p.acc);
  auto sizes = grad.sizes().vec();
  sizes.back() = p.inputs;
  Tensor dx = mask[0] ? empty_result(sizes, grad.options()) : none();
  Tensor ds = mask[2] ? empty_result({p.to_part, p.inputs}, acc_options) : none();
  if (mask[2] && p.rows == 0) ds.zero_();
  std::vector<double> da(mask[1] ? p.n * p.n * p.n : 0);
  if (p.many_rows()) {
    backward_by_weights(p, dy.view({p.rows, p.outputs}), mask[0] ? dx.view({p.rows, p.inputs}) : Tensor(),
                        mask[2] ? ds : Tensor(), mask[1] ? da.data() : nullptr);
  } else if (p.rows > 0 && (mask[0] || mask[1] || mask[2])) {
    const int64_t step = p.chunk_rows();
    const Tensor z = p.mixed_rows(), mixing = p.mixing(), unmixing = p.unmixing(),
                 all = dy.view({p.rows * p.n, p.to_part});
    for (int64_t begin = 0; begin < p.rows; begin += step) {
      const int64_t count = std::min(step, p.rows - begin);
      const Tensor mixed = z.narrow(0, 0, count * p.n);
      const Tensor g = all.narrow(0, begin * p.n, count * p.n);
      if (mask[2]) {
        p.mix(mixing, begin, count, mixed);
        multiply(device, transpose(g), mixed, ds, {}, begin > 0 ? Sum::next : Sum::first);
      }
      if (!mask[0] && !mask[1]) continue;
      multiply(device, g, p.s, mixed);
      if (mask[0])
        unmix_parts(p.dtype,
                    {view_of(mixed.view({count, p.n * p.inputs})), p.n * p.n, p.n, p.from_part,
                     unmixing.const_data_ptr(), (char*)dx.mutable_data_ptr() + begin * p.inputs * size_of(p.dtype)},
                    count);
      if (mask[1])
        add_part_products(p.dtype, {mixed.const_data_ptr(), p.x_rows(begin), p.n * p.n, p.n, p.from_part, nullptr},
                          count, da.data());
    }
  }
  if (mask[2]) ds = ds.to(grad.scalar_type()).view({p.to_part, p.n, p.from_part}).permute({1, 0, 2});
  Tensor da_sums = none();
  if (mask[1])
    da_sums = at::from_blob(da.data(), {p.n, p.n, p.n}, at::TensorOptions(at::kDouble))  // u, m, p
                  .permute({1, 0, 2})
                  .to(grad.scalar_type(), false, /*copy=*/true, at::MemoryFormat::Contiguous);
  return {dx, da_sums, ds, of.column_sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) {
  register_kernels<phm_linear_forward>(m, "phm_linear_forward", isa_in_use);
  register_kernels<phm_linear_backward>(m, "phm_linear_backward", isa_in_use);
}

}  // namespace rf
