// phm_linear on CUDA, as csrc/cpu/ops/phm_linear.cpp has it: a chunk of rows is mixed, in their own type for the tensor
// cores, and multiplied by S; backward multiplies the output's gradient by S, in the accumulator's type, and by the
// mixed rows. W is never stored. Products are ATen's; nothing here waits for the device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "cuda/tuning.h"
#include "shared/linear_ops.h"
#include "shared/phm_linear_tensors.h"

namespace rf::cuda {
namespace {

struct PhmProblem : PhmTensors {
  using PhmTensors::PhmTensors;

  // Equal chunks.
  int64_t chunk_rows() const {
    const int64_t row = std::max<int64_t>(1, n * inputs * size_of(dtype));
    const int64_t most = std::max(tuning::kMixedBytes / row, ceil_div(tuning::kLeastMixedRows, n));
    return std::max<int64_t>(1, ceil_div(rows, ceil_div(std::max<int64_t>(1, rows), most)));
  }
  // Rows from `begin` on, of which each makes n of z.
  void mix(const Cuda& device, const Tensor& coefficients, int64_t begin, const Tensor& z) const {
    launch_combine_parts(dtype,
                         {z.size(0) / n, n, n * n, from_part, x.narrow(0, begin, z.size(0) / n).const_data_ptr(),
                          x.stride(0), false, coefficients.const_data_ptr(), z.mutable_data_ptr()},
                         device.device.stream);
  }
};

std::tuple<Tensor, Tensor> phm_linear_forward(const Tensor& input, const Tensor& a, const Tensor& s,
                                              const OptionalTensor& bias, string_view activation,
                                              bool save_preactivation) {
  const Activation act = check_phm_linear_forward(input, a, s, bias, activation);
  const Cuda device(input);
  PhmProblem p(input, a, s);
  auto sizes = input.sizes().vec();
  sizes.back() = p.outputs;
  Tensor y = at::empty(sizes, input.options());
  Tensor z = at::empty(save_preactivation ? at::IntArrayRef(sizes) : at::IntArrayRef{0}, input.options());
  if (y.numel() == 0) return {y, z};
  p.set_input(input);
  const int64_t step = p.chunk_rows();
  const Tensor coefficients = p.mixing(), mixed = at::empty({step * p.n, p.inputs}, input.options());
  const Tensor& kept = save_preactivation ? z : y;
  const Tensor sums = kept.view({p.rows * p.n, p.to_part});
  if (bias.has_value()) kept.copy_(*bias);
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t count = std::min(step, p.rows - begin) * p.n;
    const Tensor of_chunk = mixed.narrow(0, 0, count);
    p.mix(device, coefficients, begin, of_chunk);
    Tensor to = sums.narrow(0, begin * p.n, count);
    bias.has_value() ? at::addmm_out(to, to, of_chunk, p.s.t()) : at::mm_out(to, of_chunk, p.s.t());
  }
  if (act != Activation::none) device.activate(kept, y, act);
  return {y, z};
}

// input is needed for the gradients of a and s.
std::tuple<Tensor, Tensor, Tensor, Tensor> phm_linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                               const Tensor& a, const Tensor& s,
                                                               const OptionalTensor& saved, string_view activation_name,
                                                               std::array<bool, 4> mask) {
  const Activation activation = check_phm_linear_backward(grad, input, a, s, saved, activation_name, mask);
  const Cuda device(grad);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  PhmProblem p(grad, a, s);
  if (mask[1] || mask[2]) p.set_input(*input);
  const ActivationGradient of = activation_gradient(device, grad, saved, activation, mask[3]);
  const Tensor dz = of.dz.contiguous().view({p.rows * p.n, p.to_part});

  const auto wide = grad.options().dtype(p.acc);
  auto sizes = grad.sizes().vec();
  sizes.back() = p.inputs;
  Tensor dx = mask[0] ? at::empty(sizes, grad.options()) : none();
  Tensor ds = mask[2] ? at::zeros({p.to_part, p.inputs}, wide) : none();
  const int64_t step = p.chunk_rows(), parts = p.n * p.n;
  const Tensor z = mask[2] ? at::empty({step * p.n, p.inputs}, grad.options()) : Tensor();
  const Tensor dmixed = mask[0] || mask[1] ? at::empty({step * p.n, p.inputs}, wide) : Tensor();
  const Tensor mixing = mask[2] ? p.mixing() : Tensor(), unmixing = mask[0] ? p.unmixing() : Tensor();
  std::vector<Tensor> da_sums;  // of blocks
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t rows = std::min(step, p.rows - begin), count = rows * p.n;
    const Tensor g = dz.narrow(0, begin * p.n, count);
    if (mask[2]) {
      const Tensor of_chunk = z.narrow(0, 0, count);
      p.mix(device, mixing, begin, of_chunk);
      multiply(device, transpose(g), of_chunk, ds, {}, begin > 0 ? Sum::next : Sum::first);
    }
    if (!mask[0] && !mask[1]) continue;
    Tensor of_chunk = dmixed.narrow(0, 0, count);
    multiply(device, g, p.s, of_chunk, {}, Sum::first);
    if (mask[0])
      launch_combine_parts(p.dtype,
                           {rows, parts, p.n, p.from_part, of_chunk.const_data_ptr(), p.n * p.inputs, true,
                            unmixing.const_data_ptr(), dx.view({p.rows, p.inputs}).narrow(0, begin, rows).data_ptr()},
                           device.device.stream);
    if (mask[1]) {
      const Tensor sums = at::empty({part_products_blocks(p.dtype, rows, p.from_part), parts, p.n}, wide);
      launch_part_products(p.dtype,
                           {rows, parts, p.n, p.from_part, of_chunk.const_data_ptr(),
                            p.x.narrow(0, begin, rows).const_data_ptr(), p.x.stride(0), sums.mutable_data_ptr()},
                           device.device.stream);
      da_sums.push_back(sums);
    }
  }
  if (mask[2]) ds = ds.to(grad.scalar_type()).view({p.to_part, p.n, p.from_part}).permute({1, 0, 2});
  Tensor da = none();
  if (mask[1]) {
    da = da_sums.empty() ? at::zeros({parts, p.n}, wide) : at::cat(da_sums).sum(0);
    da = da.view({p.n, p.n, p.n}).permute({1, 0, 2}).to(grad.scalar_type()).contiguous();  // was u, m, p
  }
  return {dx, da, ds, of.column_sums};
}

}  // namespace

void register_phm_linear(torch::Library& m) {
  register_kernels<phm_linear_forward>(m, "phm_linear_forward", architecture_in_use);
  register_kernels<phm_linear_backward>(m, "phm_linear_backward", architecture_in_use);
}

}  // namespace rf::cuda
