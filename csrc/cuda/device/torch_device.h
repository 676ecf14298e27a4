// torch's side of a CUDA device, for ops*.cpp alone. tests/cuda_on_host/device/ has the emulator's.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../../torch_api.h"

// Followed by a function body that registers the ops with the torch::Library `m`.
#define RF_CUDA_OPS(m) TORCH_LIBRARY_IMPL(regfast, CUDA, m)

namespace rf::cuda {

// Makes the device of a tensor the current one for as long as it lives; `stream` is what its kernels are queued on.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream(t.device().index())) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

// 80 for compute capability 8.0.
inline int architecture(const Tensor& t) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.device().index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.device().index()));
  return 10 * major + minor;
}

}  // namespace rf::cuda
