// linear on a CUDA device, and the products and activations of all ops there.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/linear_ops.h"

namespace rf::cuda {

// As torch has been told: float32 products are exact unless it may take tf32. (allowTF32CuBLAS() throws where only the
// newer of torch's two settings was made.)
bool tf32_allowed(DType dtype) {
  return dtype == DType::f32 && at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                                    at::Float32Precision::TF32;
}

const char* Cuda::why_aten(const ProductSize& p) const {
  if (p.wide || p.sum != Sum::none) return "a sum that stays in its own type";
  const DType dtype = dtype_of(p.type);
  return gemm_by_aten(dtype, tf32_allowed(dtype), p.m, p.n, p.k);
}

void Cuda::gemm(DType dtype, const GemmProblem& problem) const {
  const bool tf32 = tf32_allowed(dtype);
  Gemm g = {problem, nullptr};
  Workspace workspace(gemm_workspace(dtype, tf32, g), like);
  g.workspace = workspace.data();
  launch_gemm(dtype, tf32, g, stream);
}

Tensor Cuda::activation_backward(const Tensor& like, const ActivationBackward& p, int64_t rows,
                                 bool column_sums) const {
  const DType dtype = dtype_of(like.scalar_type());
  const Tensor sums = at::empty({column_sums ? p.columns : 0}, like.options());
  Workspace workspace(column_sums ? activation_backward_workspace(dtype, rows, p.columns) : 0, like);
  launch_activation_backward(dtype, {p, rows, column_sums ? sums.mutable_data_ptr() : nullptr, workspace.data()},
                             stream);
  return sums;
}

namespace {

struct CudaLinear : Cuda {
  using Cuda::Cuda;

  const Tensor& gathered(const Tensor& t, int64_t) const { return t; }  // its kernels read any strides
};

}  // namespace

void register_linear(torch::Library& m) { rf::register_linear<CudaLinear>(m, architecture_in_use); }

}  // namespace rf::cuda
