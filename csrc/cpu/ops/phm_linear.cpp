// phm_linear on the CPU: x W^T with W[u q' + v, p d' + r] = sum over m of a[m, u, p] s[m, v, r], n x n blocks of q' x
// d', without W. A chunk of rows is mixed, Z[(row, u), (m, r)] = sum over p of a[m, u, p] x[row, (p, r)], and
// multiplied by S = s seen as q' x d: the arithmetic of the dense layer on n times the rows and an n-th of the weights.
// Backward makes the same two products that the dense layer does, of Z's gradient with S and of Z with the output's.
#include "shared/torch_api.h"

#include "cpu/drivers/gemm_packed.h"
#include "cpu/ops/activation_gradient.h"
#include "cpu/ops/outputs.h"
#include "cpu/ops/products.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"
#include "shared/layouts.h"
#include "shared/op_checks.h"
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
};

std::tuple<Tensor, Tensor> phm_linear_forward(const Tensor& input, const Tensor& a, const Tensor& s,
                                              const OptionalTensor& bias, string_view activation,
                                              bool save_preactivation) {
  const Activation act = check_phm_linear_forward(input, a, s, bias, activation);
  PhmProblem p(input, a, s);
  auto sizes = input.sizes().vec();
  sizes.back() = p.outputs;
  Tensor y = empty_result(sizes, input.options());
  Tensor pre = save_preactivation ? empty_result(sizes, input.options()) : at::empty({0}, input.options());
  if (y.numel() == 0) return {y, pre};
  p.set_input(input);
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor coefficients = p.mixing(), z = p.mixed_rows();
  const bool wide = p.dtype != acc_dtype(p.dtype);
  const int64_t step = p.chunk_rows(), size = size_of(p.dtype);
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t count = std::min(step, p.rows - begin), mixed = count * p.n, at = begin * p.outputs * size;
    p.mix(coefficients, begin, count, z);
    char *to = (char*)y.mutable_data_ptr() + at, *kept = save_preactivation ? (char*)pre.data_ptr() + at : nullptr;
    if (!wide && gemm_by_aten(p.dtype, mixed, p.to_part, p.inputs)) {
      const Tensor sums = (save_preactivation ? pre : y).view({p.rows, p.outputs}).narrow(0, begin, count);
      multiply(z.narrow(0, 0, mixed), transpose(p.s), sums.view({mixed, p.to_part}), Tensor(), false);
      if (b.defined()) Tensor(sums).add_(b);
      if (act != Activation::none) activation_forward(p.dtype, sums.const_data_ptr(), to, sums.numel(), act);
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
  PhmProblem p(grad, a, s);
  if (mask[1] || mask[2]) p.set_input(*input);
  const ActivationGradient of = activation_gradient(grad, saved, activation, mask[3]);
  const Tensor dy = of.dz.contiguous();

  const auto acc_options = grad.options().dtype(p.acc);
  auto sizes = grad.sizes().vec();
  sizes.back() = p.inputs;
  Tensor dx = mask[0] ? empty_result(sizes, grad.options()) : none();
  Tensor ds = mask[2] ? empty_result({p.to_part, p.inputs}, acc_options) : none();
  if (mask[2] && p.rows == 0) ds.zero_();
  std::vector<double> da(mask[1] ? p.n * p.n * p.n : 0);
  if (p.rows > 0 && (mask[0] || mask[1] || mask[2])) {
    const int64_t step = p.chunk_rows();
    const Tensor z = p.mixed_rows(), mixing = p.mixing(), unmixing = p.unmixing(),
                 all = dy.view({p.rows * p.n, p.to_part});
    // Z and its gradient have the accumulator's type, which the other side of a product has to share.
    const Tensor wide = p.acc == grad.scalar_type() ? Tensor() : at::empty({z.size(0), p.to_part}, acc_options);
    for (int64_t begin = 0; begin < p.rows; begin += step) {
      const int64_t count = std::min(step, p.rows - begin);
      const Tensor mixed = z.narrow(0, 0, count * p.n);
      Tensor g = all.narrow(0, begin * p.n, count * p.n);
      if (wide.defined()) g = wide.narrow(0, 0, count * p.n).copy_(g);
      if (mask[2]) {
        p.mix(mixing, begin, count, mixed);
        multiply(transpose(g), mixed, ds, Tensor(), begin > 0);
      }
      if (!mask[0] && !mask[1]) continue;
      multiply(g, p.s, mixed, Tensor(), false);
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
