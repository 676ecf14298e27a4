// What csrc/cuda/ops calls: launchers of the kernels in the .cu files, each queued on `stream` of the current device.
// No torch. A launch that fails throws std::runtime_error; nothing here waits for the device.
#pragma once
#include <cuda_runtime.h>

#include "cuda/device/arguments.h"
#include "cuda/tuning.h"

namespace rf::cuda {

// ---- activation ----------------------------------------------------------------------------------------------------

// y = activation(z), n elements; y may be z.
void launch_activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation,
                               cudaStream_t stream);
int64_t activation_backward_workspace(DType dtype, int64_t rows, int64_t columns);
void launch_activation_backward(DType dtype, const ActivationRows& args, cudaStream_t stream);

// ---- mse_loss ------------------------------------------------------------------------------------------------------

// each = (x - y)^2, n elements; or, with `total`, their sum times scale, one element of `dtype`. One of the two is
// null.
int64_t mse_loss_workspace(int64_t n);
void launch_mse_loss(DType dtype, const void* x, const void* y, void* each, void* total, double scale, void* workspace,
                     int64_t n, cudaStream_t stream);
// dx = scale * g * (x - y), dy = -dx, either may be null; g is one number or, with each_grad, n of them.
void launch_mse_loss_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad, double scale,
                              void* dx, void* dy, int64_t n, cudaStream_t stream);

// ---- likelihoods ---------------------------------------------------------------------------------------------------

int64_t likelihood_blocks(DType dtype, int64_t rows, int64_t outputs);
int64_t likelihood_parts(DType dtype, int64_t rows, int64_t outputs);
void launch_likelihood(DType dtype, const Likelihood& args, cudaStream_t stream);

// ---- softmax family, cross-entropy ---------------------------------------------------------------------------------

void launch_softmax_forward(DType dtype, const SoftmaxRows& args, cudaStream_t stream);
void launch_softmax_backward(DType dtype, const SoftmaxRows& args, cudaStream_t stream);
void launch_logsumexp_forward(DType dtype, const SoftmaxRows& args, cudaStream_t stream);
void launch_logsumexp_backward(DType dtype, const SoftmaxRows& args, cudaStream_t stream);

int64_t cross_entropy_workspace(int64_t rows);
void launch_cross_entropy_forward(DType dtype, const CrossEntropyRows& args, const CrossEntropyResults& results,
                                  cudaStream_t stream);
void launch_cross_entropy_backward(DType dtype, const CrossEntropyRows& args, const CrossEntropyUpstream& upstream,
                                   cudaStream_t stream);
// Both from one read of the logits: results, and grad_logits for an upstream gradient of the total.
void launch_cross_entropy_forward_backward(DType dtype, const CrossEntropyRows& args,
                                           const CrossEntropyResults& results, void* grad_logits,
                                           const RowLayout& grad_layout, cudaStream_t stream, double upstream = 1);

// ---- parts of rows -------------------------------------------------------------------------------------------------

void launch_combine_parts(DType dtype, const CombineParts& args, cudaStream_t stream);

int64_t part_products_blocks(DType dtype, int64_t rows, int64_t length);
void launch_part_products(DType dtype, const PartProducts& args, cudaStream_t stream);

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// tf32: whether float32 may be multiplied in tf32; no meaning for other types.
int64_t gemm_workspace(DType dtype, bool tf32, const Gemm& gemm);
void launch_gemm(DType dtype, bool tf32, const Gemm& gemm, cudaStream_t stream);
// Who takes the products of a device from now on, by arithmetic (a dtype, or last tf32) and size.
struct GemmTable {
  tuning::GemmKernel kernel[kDTypes + 1][tuning::kGemmSizes];
};
void set_gemm_table(int device, const GemmTable& table);
// Why a product is left to ATen's GEMM on the current device, by its table, or null; REGFAST_CUDA_GEMM=aten|sm80|sm90
// overrides the table.
const char* gemm_by_aten(DType dtype, bool tf32, int64_t m, int64_t n, int64_t k);

}  // namespace rf::cuda
