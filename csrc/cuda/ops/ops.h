// A CUDA device as the ops of csrc/shared see one, and what the files of csrc/cuda/ops share. They are all of csrc/cuda
// that knows torch.
#pragma once
#include "cuda/launch.h"
#include "cuda/ops/torch_device.h"
#include "shared/product.h"

namespace rf::cuda {

// Memory that only kernels see, null if there is nothing to hold.
struct Workspace {
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes > 0) memory = at::empty({bytes}, like.options().dtype(at::kByte));
  }
  void* data() { return data_or_null(memory); }
  Tensor memory;
};

// Whether elements of a type may be multiplied in tf32.
bool tf32_allowed(DType dtype);

// Results, products and activations on the device of a tensor, on whose current stream they are queued. Nothing here
// waits for it.
struct Cuda : OnDevice {
  explicit Cuda(const Tensor& t) : OnDevice(t), like(t) {}

  Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const { return at::empty(sizes, options); }
  Tensor empty_like(const Tensor& t) const { return at::empty_like(t); }

  const char* why_aten(const ProductSize& size) const;
  // Whether torch's product applies the activation in its epilogue, as well as our kernel: where that was proven.
  bool fused_by_aten(DType dtype, Activation activation) const;
  void gemm(DType dtype, const GemmProblem& problem) const;
  void wide_product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) const {
    rf::cuda::wide_product(out, a, b, accumulate);
  }

  void activate(const Tensor& z, const Tensor& y, Activation activation) const {
    launch_activation_forward(dtype_of(z.scalar_type()), z.const_data_ptr(), y.mutable_data_ptr(), z.numel(),
                              activation, stream);
  }
  Tensor readable_rows(const Tensor& grad) const { return as_strided_rows(grad, grad.dim() - 1); }
  Tensor activation_backward(const Tensor& like, const ActivationBackward& p, int64_t rows, bool column_sums) const;

  const Tensor& like;
};

void register_linear(torch::Library& m);
void register_softmax(torch::Library& m);
void register_cross_entropy(torch::Library& m);
void register_linear_cross_entropy(torch::Library& m);
void register_linear_nll(torch::Library& m);
void register_phm_linear(torch::Library& m);
void register_mse_loss(torch::Library& m);

}  // namespace rf::cuda
