// phm_linear for every device: x W^T with W[u q' + v, p d' + r] = sum over m of a[m, u, p] s[m, v, r], n x n blocks of
// q' x d', without W. A chunk of rows at a time is mixed, Z[(row, u), (m, r)] = sum over p of a[m, u, p] x[row, (p,
// r)], and multiplied by S = s seen as q' x d. Backward makes the same two products that the dense layer does, of Z's
// gradient with S and of Z with the output's. Device is what one has of its own:
//   forward(p, bias, activation, y, preactivation)   of matrices; undefined where there is none
//   backward(p, dy, dx, ds, da)                      whether it has made the gradients in another way than here
//   chunk_rows(p), mixed_type(p)                     rows that are mixed at a time, and the type of Z
//   mix(p, coefficients, begin, z), unmix(p, coefficients, begin, dz, dx), add_part_products(p, begin, dz, da)
//   PartSums                                         a's gradient in the making; tensor() is it, by u, m and p
#pragma once
#include "shared/linear_ops.h"
#include "shared/phm_linear_tensors.h"

namespace rf {

template <class Device>
std::tuple<Tensor, Tensor> phm_linear_forward(const Tensor& input, const Tensor& a, const Tensor& s,
                                              const OptionalTensor& bias, string_view activation,
                                              bool save_preactivation) {
  const Activation act = check_phm_linear_forward(input, a, s, bias, activation);
  const Device device(input);
  PhmTensors p(input, a, s);
  auto sizes = input.sizes().vec();
  sizes.back() = p.outputs;
  Tensor y = device.empty(sizes, input.options());
  Tensor pre = save_preactivation ? device.empty(sizes, input.options()) : device.empty({0}, input.options());
  if (y.numel() == 0) return {y, pre};
  p.set_input(input);
  device.forward(p, bias.has_value() ? bias->contiguous() : Tensor(), act, as_rows(y, p.rows, p.outputs),
                 save_preactivation ? as_rows(pre, p.rows, p.outputs) : Tensor());
  return {y, pre};
}

// Gradients by chunks of mixed rows, of x, of S (acc) and of a; undefined or null where not wanted.
template <class Device>
void phm_backward_by_chunks(const Device& device, const PhmTensors& p, const Tensor& dy, const Tensor& dx,
                            const Tensor& ds, typename Device::PartSums* da) {
  const int64_t step = device.chunk_rows(p), most = std::min(p.rows, step) * p.n;
  const auto new_mixed = [&](at::ScalarType type) { return device.empty({most, p.inputs}, p.s.options().dtype(type)); };
  const bool unmixes = dx.defined() || da;
  const Tensor all = dy.view({p.rows * p.n, p.to_part});
  // One memory for both where they have the same type.
  const Tensor z = ds.defined() ? new_mixed(device.mixed_type(p)) : Tensor();
  const Tensor dz = !unmixes ? Tensor() : z.defined() && z.scalar_type() == p.acc ? z : new_mixed(p.acc);
  const Tensor mixing = ds.defined() ? p.mixing() : Tensor(), unmixing = dx.defined() ? p.unmixing() : Tensor();
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t count = std::min(step, p.rows - begin) * p.n;
    const Tensor g = rows_from(all, begin * p.n, count);
    if (ds.defined()) {
      const Tensor mixed = rows_from(z, 0, count);
      device.mix(p, mixing, begin, mixed);
      multiply(device, transpose(g), mixed, ds, {}, begin > 0 ? Sum::next : Sum::first);
    }
    if (!unmixes) continue;
    const Tensor of_mixed = rows_from(dz, 0, count);
    multiply(device, g, p.s, of_mixed, {}, Sum::first);
    if (dx.defined()) device.unmix(p, unmixing, begin, of_mixed, dx);
    if (da) device.add_part_products(p, begin, of_mixed, *da);
  }
}

// input is needed for the gradients of a and s.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> phm_linear_backward(const Tensor& grad, const OptionalTensor& input,
                                                               const Tensor& a, const Tensor& s,
                                                               const OptionalTensor& saved, string_view activation_name,
                                                               std::array<bool, 4> mask) {
  const Activation activation = check_phm_linear_backward(grad, input, a, s, saved, activation_name, mask);
  const Device device(grad);
  PhmTensors p(grad, a, s);
  if (mask[1] || mask[2]) p.set_input(*input);
  const auto [dz, db] = activation_gradient(device, grad, saved, activation, mask[3]);
  const Tensor dy = as_rows(dz.contiguous(), p.rows, p.outputs);
  auto sizes = grad.sizes().vec();
  sizes.back() = p.inputs;
  const auto none = [&] { return device.empty({0}, grad.options()); };
  Tensor dx = mask[0] ? device.empty(sizes, grad.options()) : none();
  Tensor ds = mask[2] ? device.empty({p.to_part, p.inputs}, grad.options().dtype(p.acc)) : none();
  typename Device::PartSums da(p, mask[1]);
  if (p.rows > 0 && (mask[0] || mask[1] || mask[2])) {
    const Tensor x_rows = mask[0] ? as_rows(dx, p.rows, p.inputs) : Tensor(), ds_sums = mask[2] ? ds : Tensor();
    const auto da_sums = mask[1] ? &da : nullptr;
    if (!device.backward(p, dy, x_rows, ds_sums, da_sums))
      phm_backward_by_chunks(device, p, dy, x_rows, ds_sums, da_sums);
  } else if (mask[2]) {
    ds.zero_();
  }
  if (mask[2]) ds = ds.to(grad.scalar_type()).view({p.to_part, p.n, p.from_part}).permute({1, 0, 2});
  Tensor da_sums = none();
  if (mask[1])
    da_sums = da.tensor()
                  .permute({1, 0, 2})  // was u, m, p
                  .to(grad.scalar_type(), false, /*copy=*/true, at::MemoryFormat::Contiguous);
  return {dx, da_sums, ds, db};
}

template <class Device>
void register_phm_linear(torch::Library& m, std::string (*by)(const Tensor&)) {
  register_kernels<phm_linear_forward<Device>>(m, "phm_linear_forward", by);
  register_kernels<phm_linear_backward<Device>>(m, "phm_linear_backward", by);
}

}  // namespace rf
