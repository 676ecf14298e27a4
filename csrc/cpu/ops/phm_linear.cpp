// phm_linear on the CPU: rows that are few (up to q') are mixed. For many rows, whose Z would be the larger, W is made
// an n-th at a time, as large as S: the rows of outputs u for products with x, the columns of inputs p for those with
// the output's gradient. W's own gradient, an n-th at a time too, is contracted with a and s. A small W is made at
// once.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "cpu/tuning.h"
#include "shared/phm_linear_ops.h"

namespace rf {
namespace {

struct CpuPhm : Cpu {
  using Cpu::Cpu;

  struct PartSums {
    PartSums(const PhmTensors& p, bool wanted) : n(p.n), sums(wanted ? n * n * n : 0) {}
    Tensor tensor() { return at::from_blob(sums.data(), {n, n, n}, at::TensorOptions(at::kDouble)); }
    int64_t n;
    std::vector<double> sums;
  };

  void forward(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
               const Tensor& preactivation) const {
    if (many_rows(p))
      by_weights(p, bias, activation, y, preactivation);
    else
      by_mixed_rows(p, bias, activation, y, preactivation);
  }
  bool backward(const PhmTensors& p, const Tensor& dy, const Tensor& dx, const Tensor& ds, PartSums* da) const {
    if (many_rows(p)) backward_by_weights(p, dy, dx, ds, da);
    return many_rows(p);
  }

  // Equal chunks of rows whose mixed rows stay in the L2 of a few cores.
  int64_t chunk_rows(const PhmTensors& p) const {
    const int64_t mixed = tuning::kMixedBytes / std::max<int64_t>(1, p.inputs * acc_size(p.dtype));
    const int64_t most = ceil_div(std::max(mixed, tuning::kLeastMixedRows), p.n);
    return std::max<int64_t>(1, ceil_div(p.rows, ceil_div(std::max<int64_t>(1, p.rows), most)));
  }
  at::ScalarType mixed_type(const PhmTensors& p) const { return p.acc; }
  void mix(const PhmTensors& p, const Tensor& coefficients, int64_t begin, const Tensor& z) const {
    mix_parts(p.dtype,
              {.parts = p.n,
               .to_parts = p.n * p.n,
               .length = p.from_part,
               .from = x_rows(p, begin),
               .from_stride = p.x.stride(0),
               .coefficients = coefficients.const_data_ptr(),
               .to = z.mutable_data_ptr()},
              z.size(0) / p.n);
  }
  void unmix(const PhmTensors& p, const Tensor& coefficients, int64_t begin, const Tensor& dz, const Tensor& dx) const {
    const int64_t rows = dz.size(0) / p.n;
    unmix_parts(p.dtype,
                {.parts = p.n * p.n,
                 .to_parts = p.n,
                 .length = p.from_part,
                 .from = dz.const_data_ptr(),
                 .from_stride = p.n * p.inputs,
                 .coefficients = coefficients.const_data_ptr(),
                 .to = (char*)dx.mutable_data_ptr() + begin * p.inputs * size_of(p.dtype)},
                rows);
  }
  void add_part_products(const PhmTensors& p, int64_t begin, const Tensor& dz, PartSums& da) const {
    rf::add_part_products(p.dtype,
                          {.of_parts = p.n * p.n,
                           .parts = p.n,
                           .length = p.from_part,
                           .of = dz.const_data_ptr(),
                           .with = x_rows(p, begin),
                           .with_stride = p.x.stride(0)},
                          dz.size(0) / p.n, da.sums.data());
  }

 private:
  static bool many_rows(const PhmTensors& p) { return p.rows > p.to_part; }
  static const void* x_rows(const PhmTensors& p, int64_t begin) {
    return (const char*)p.x.const_data_ptr() + begin * p.x.stride(0) * size_of(p.dtype);
  }
  // How many n-ths of W are made at a time, and memory for these.
  static int64_t parts_at_once(const PhmTensors& p) {
    return p.outputs * p.inputs * acc_size(p.dtype) <= tuning::kPhmWeightBytes ? p.n : 1;
  }
  static Tensor parts_of_weight(const PhmTensors& p, int64_t parts) {
    return empty_result({parts * p.to_part, p.inputs}, p.s.options().dtype(p.acc));
  }
  // Parts of S's rows combined into those of an n-th of W, (v, (p, r)) for one u or (v, (u, r)) for one p.
  static void combine(const PhmTensors& p, const Tensor& coefficients, int64_t which, void* w) {
    mix_square(p, p.dtype, p.s, coefficients, which, w);
  }
  // Rows of W, those of outputs from part `first` on.
  static void combine_rows(const PhmTensors& p, const Tensor& coefficients, int64_t first, const Tensor& w) {
    for (int64_t row = 0; row < w.size(0); row += p.to_part)
      combine(p, coefficients, first + row / p.to_part, rows_from(w, row, p.to_part).mutable_data_ptr());
  }
  // Each row's n parts combined into as many.
  static void mix_square(const PhmTensors& p, DType dtype, const Tensor& from, const Tensor& coefficients,
                         int64_t which, void* to) {
    mix_parts(dtype,
              {.parts = p.n,
               .to_parts = p.n,
               .length = p.from_part,
               .from = from.const_data_ptr(),
               .from_stride = from.stride(0),
               .coefficients = (char*)coefficients.const_data_ptr() + which * p.n * p.n * acc_size(p.dtype),
               .to = to},
              p.to_part);
  }
  static Tensor row_coefficients(const PhmTensors& p) { return p.a.permute({1, 2, 0}).contiguous(); }  // u, p, m

  void by_weights(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
                  const Tensor& preactivation) const;
  void by_mixed_rows(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
                     const Tensor& preactivation) const;
  void backward_by_weights(const PhmTensors& p, const Tensor& dy, const Tensor& dx, const Tensor& ds,
                           PartSums* da) const;
};

// Y of many rows, and what was before the activation where that is kept.
void CpuPhm::by_weights(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
                        const Tensor& preactivation) const {
  const int64_t parts = parts_at_once(p), columns = parts * p.to_part;
  const Tensor coefficients = row_coefficients(p), w = parts_of_weight(p, parts);
  const auto type = p.x.scalar_type();
  const bool left_to_aten = why_aten({type, p.rows, columns, p.inputs});
  const Tensor sums = left_to_aten && preactivation.defined() ? preactivation : y;
  for (int64_t u = 0; u < p.n; u += parts) {
    combine_rows(p, coefficients, u, w);
    const auto part = [&](const Tensor& t) { return t.narrow(-1, u * p.to_part, columns); };
    const Tensor c = part(sums), b = bias.defined() ? part(bias) : bias;
    if (left_to_aten) {
      multiply(*this, p.x, transpose(as_type(w, type)), c, b);
      continue;
    }
    GemmProblem g = gemm_problem(p.x, transpose(w), c);
    g.bias = data_or_null(b);
    g.activation = activation;
    g.preactivation = preactivation.defined() ? part(preactivation).mutable_data_ptr() : nullptr;
    gemm(p.dtype, g);
  }
  if (left_to_aten && activation != Activation::none) activate(sums, y, activation);
}

// Undefined or null where not wanted.
void CpuPhm::backward_by_weights(const PhmTensors& p, const Tensor& dy, const Tensor& dx, const Tensor& ds,
                                 PartSums* da) const {
  const int64_t parts = parts_at_once(p);
  if (dx.defined() && parts == p.n) {
    const Tensor w = parts_of_weight(p, parts);
    combine_rows(p, row_coefficients(p), 0, w);
    const bool left_to_aten = why_aten({dy.scalar_type(), p.rows, p.inputs, p.outputs});
    multiply(*this, dy, left_to_aten ? as_type(w, dy.scalar_type()) : w, dx);
  } else if (dx.defined()) {
    const Tensor coefficients = p.unmixing(), w = parts_of_weight(p, 1);  // p, u, m
    const bool left_to_aten = why_aten({dy.scalar_type(), p.rows, p.from_part, p.outputs});
    for (int64_t i = 0; i < p.n; ++i) {
      combine(p, coefficients, i, w.mutable_data_ptr());
      const Tensor typed = left_to_aten ? as_type(w, dy.scalar_type()) : w;
      const Tensor columns =
          typed.view({p.to_part, p.n, p.from_part}).permute({1, 0, 2}).reshape({p.outputs, p.from_part});
      multiply(*this, dy, columns, dx.narrow(1, i * p.from_part, p.from_part));
    }
  }
  if (!ds.defined() && !da) return;
  const Tensor coefficients = p.a.permute({1, 0, 2}).contiguous();  // u, m, p
  const Tensor all = parts_of_weight(p, parts), term = ds.defined() ? empty_result_like(ds) : Tensor();
  std::vector<double> products(p.n * p.n);
  for (int64_t u = 0; u < p.n; ++u) {
    if (u % parts == 0) multiply(*this, transpose(dy.narrow(1, u * p.to_part, parts * p.to_part)), p.x, all);
    const Tensor dw = rows_from(all, u % parts * p.to_part, p.to_part);
    if (ds.defined()) {
      const Tensor& to = u == 0 ? ds : term;
      mix_square(p, acc_dtype(p.dtype), dw, coefficients, u, to.mutable_data_ptr());
      if (u > 0) Tensor(ds).add_(term);
    }
    if (da) {  // of part p of dW's rows with part m of S's
      std::fill(products.begin(), products.end(), 0.0);
      rf::add_part_products(p.dtype,
                            {.of_parts = p.n,
                             .parts = p.n,
                             .length = p.from_part,
                             .of = dw.const_data_ptr(),
                             .with = p.s.const_data_ptr(),
                             .with_stride = p.s.stride(0)},
                            p.to_part, products.data());
      for (int64_t i = 0; i < p.n; ++i)
        for (int64_t m = 0; m < p.n; ++m) da->sums[(u * p.n + m) * p.n + i] = products[i * p.n + m];
    }
  }
}

// Of few rows.
void CpuPhm::by_mixed_rows(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
                           const Tensor& preactivation) const {
  const int64_t step = chunk_rows(p);
  const Tensor coefficients = p.mixing(),
               z = empty_result({std::min(p.rows, step) * p.n, p.inputs}, p.s.options().dtype(p.acc));
  const bool wide = p.dtype != acc_dtype(p.dtype);
  for (int64_t begin = 0; begin < p.rows; begin += step) {
    const int64_t count = std::min(step, p.rows - begin), mixed = count * p.n;
    const Tensor mixed_rows = rows_from(z, 0, mixed), to = rows_from(y, begin, count);
    const Tensor kept = preactivation.defined() ? rows_from(preactivation, begin, count) : Tensor();
    mix(p, coefficients, begin, mixed_rows);
    if (why_aten({p.x.scalar_type(), mixed, p.to_part, p.inputs, wide})) {
      const Tensor& sums = kept.defined() ? kept : to;
      multiply(*this, mixed_rows, transpose(p.s), sums.view({mixed, p.to_part}));
      if (bias.defined()) sums.add_(bias);
      if (activation != Activation::none) activate(sums, to, activation);
      continue;
    }
    const GemmProblem g = {.m = mixed,
                           .n = p.to_part,
                           .k = p.inputs,
                           .a = view_of(z),
                           .b = view_of(p.s),
                           .b_transposed = true,
                           .c = to.mutable_data_ptr(),
                           .c_stride = p.to_part,
                           .bias = data_or_null(bias),
                           .activation = activation,
                           .preactivation = data_or_null(kept),
                           .wide_a = wide,
                           .bias_rows = p.n,
                           .bias_stride = p.to_part};
    phm_product(p.dtype, g, p.n);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_phm_linear<CpuPhm>(m, isa_in_use); }

}  // namespace rf
