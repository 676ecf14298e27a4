// phm_linear on CUDA: rows are mixed in their own type, for the tensor cores, and multiplied by ATen, with the bias
// laid out before. Gradients of mixed rows have the accumulator's type. Nothing here waits for the device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "cuda/tuning.h"
#include "shared/phm_linear_ops.h"

namespace rf::cuda {
namespace {

struct CudaPhm : Cuda {
  using Cuda::Cuda;

  struct PartSums {
    PartSums(const PhmTensors& p, bool) : p(p) {}
    Tensor tensor() const {
      const auto options = p.s.options().dtype(p.acc);
      return blocks.empty() ? at::zeros({p.n, p.n, p.n}, options) : at::cat(blocks).sum(0).view({p.n, p.n, p.n});
    }
    const PhmTensors& p;
    std::vector<Tensor> blocks;
  };

  void forward(const PhmTensors& p, const Tensor& bias, Activation activation, const Tensor& y,
               const Tensor& preactivation) const {
    const int64_t step = chunk_rows(p);
    const Tensor coefficients = p.mixing(), mixed = at::empty({step * p.n, p.inputs}, p.x.options());
    const Tensor& kept = preactivation.defined() ? preactivation : y;
    const Tensor sums = kept.view({p.rows * p.n, p.to_part});
    if (bias.defined()) kept.copy_(bias);
    for (int64_t begin = 0; begin < p.rows; begin += step) {
      const int64_t count = std::min(step, p.rows - begin) * p.n;
      const Tensor z = mixed.narrow(0, 0, count);
      mix(p, coefficients, begin, z);
      Tensor to = sums.narrow(0, begin * p.n, count);
      bias.defined() ? at::addmm_out(to, to, z, p.s.t()) : at::mm_out(to, z, p.s.t());
    }
    if (activation != Activation::none) activate(kept, y, activation);
  }
  bool backward(const PhmTensors&, const Tensor&, const Tensor&, const Tensor&, PartSums*) const { return false; }

  // Equal chunks.
  int64_t chunk_rows(const PhmTensors& p) const {
    const int64_t row = std::max<int64_t>(1, p.n * p.inputs * size_of(p.dtype));
    const int64_t most = std::max(tuning::kMixedBytes / row, ceil_div(tuning::kLeastMixedRows, p.n));
    return std::max<int64_t>(1, ceil_div(p.rows, ceil_div(std::max<int64_t>(1, p.rows), most)));
  }
  at::ScalarType mixed_type(const PhmTensors& p) const { return p.x.scalar_type(); }
  void mix(const PhmTensors& p, const Tensor& coefficients, int64_t begin, const Tensor& z) const {
    const int64_t rows = z.size(0) / p.n;
    launch_combine_parts(p.dtype,
                         {{.parts = p.n,
                           .to_parts = p.n * p.n,
                           .length = p.from_part,
                           .from = p.x.narrow(0, begin, rows).const_data_ptr(),
                           .from_stride = p.x.stride(0),
                           .coefficients = coefficients.const_data_ptr(),
                           .to = z.mutable_data_ptr()},
                          rows,
                          /*from_is_acc=*/false},
                         stream);
  }
  void unmix(const PhmTensors& p, const Tensor& coefficients, int64_t begin, const Tensor& dz, const Tensor& dx) const {
    const int64_t rows = dz.size(0) / p.n;
    launch_combine_parts(p.dtype,
                         {{.parts = p.n * p.n,
                           .to_parts = p.n,
                           .length = p.from_part,
                           .from = dz.const_data_ptr(),
                           .from_stride = p.n * p.inputs,
                           .coefficients = coefficients.const_data_ptr(),
                           .to = dx.narrow(0, begin, rows).data_ptr()},
                          rows,
                          /*from_is_acc=*/true},
                         stream);
  }
  void add_part_products(const PhmTensors& p, int64_t begin, const Tensor& dz, PartSums& da) const {
    const int64_t rows = dz.size(0) / p.n, parts = p.n * p.n;
    const Tensor sums = at::empty({part_products_blocks(p.dtype, rows, p.from_part), parts, p.n}, dz.options());
    launch_part_products(p.dtype,
                         {{.of_parts = parts,
                           .parts = p.n,
                           .length = p.from_part,
                           .of = dz.const_data_ptr(),
                           .with = p.x.narrow(0, begin, rows).const_data_ptr(),
                           .with_stride = p.x.stride(0),
                           .sums = sums.mutable_data_ptr()},
                          rows},
                         stream);
    da.blocks.push_back(sums);
  }
};

}  // namespace

void register_phm_linear(torch::Library& m) { rf::register_phm_linear<CudaPhm>(m, architecture_in_use); }

}  // namespace rf::cuda
