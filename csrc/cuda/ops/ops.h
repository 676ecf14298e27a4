// What the files of csrc/cuda/ops share. They are all of csrc/cuda that knows torch.
#pragma once
#include "cuda/launch.h"
#include "cuda/ops/torch_device.h"

namespace rf::cuda {

// Memory that only kernels see, null if there is nothing to hold.
struct Workspace {
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes > 0) memory = at::empty({bytes}, like.options().dtype(at::kByte));
  }
  void* data() { return memory.defined() ? memory.mutable_data_ptr() : nullptr; }
  Tensor memory;
};

// Whether float32 may be multiplied in tf32.
bool tf32_allowed(const Tensor& t);

// Whether torch's product applies the activation in its epilogue, with results as good as ours: where that was proven.
bool fused_by_aten(const Tensor& like, Activation activation);

// A product by launch_gemm of elements of like's type; its workspace is filled in.
void product(const OnDevice& device, const Tensor& like, Gemm g);

// out = x w^T + bias of matrices, bias undefined where there is none, by the GEMM that linear takes.
void linear_into(const OnDevice& device, const Tensor& x, const Tensor& w, const Tensor& bias, Tensor& out);

// What went into an activation has this gradient, the activation's result having `grad`, whose column sums are made on
// the way where they are wanted. The gradient is grad itself where there is no activation.
struct ActivationGradient {
  Tensor dz, column_sums;
};
ActivationGradient activation_gradient(const OnDevice& device, const Tensor& grad, const OptionalTensor& saved,
                                       Activation activation, bool column_sums);

void register_linear(torch::Library& m);
void register_softmax(torch::Library& m);
void register_cross_entropy(torch::Library& m);
void register_linear_cross_entropy(torch::Library& m);
void register_linear_nll(torch::Library& m);
void register_phm_linear(torch::Library& m);
void register_mse_loss(torch::Library& m);

}  // namespace rf::cuda
