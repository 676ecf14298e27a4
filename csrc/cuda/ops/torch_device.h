// torch's side of a CUDA device. tests/cuda_on_host/cuda/ops has the emulator's.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/version.h>

#include "shared/torch_api.h"

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

inline std::string architecture_in_use(const Tensor& t) { return c10::str("CUDA sm_", architecture(t)); }

// Bytes of the device's memory, whether free or not. Asked of all devices once, since the question takes long.
inline int64_t memory_of_device(const Tensor& t) {
  static const std::vector<int64_t> known = [] {
    int devices = 0;
    C10_CUDA_CHECK(cudaGetDeviceCount(&devices));
    std::vector<int64_t> bytes;
    for (int i = 0; i < devices; ++i) {
      cudaDeviceProp properties;
      C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
      bytes.push_back((int64_t)properties.totalGlobalMem);
    }
    return bytes;
  }();
  return known.at(t.device().index());
}

// out = a b, or out += a b, of half types into float32. By ATen.
inline void wide_product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (!accumulate)
    at::mm_out(out, a, b, at::kFloat);
  else
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
    at::addmm_out(out, out, a, b, at::kFloat);
#else  // older ones want a summand of the half type
    out.add_(at::mm(a, b, at::kFloat));
#endif
}

}  // namespace rf::cuda
