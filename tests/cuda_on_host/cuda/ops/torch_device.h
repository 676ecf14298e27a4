// torch's side of the emulated device; see csrc/cuda/ops/torch_device.h. CPU tensors are the device's.
#pragma once
#include <cuda_runtime.h>

#include "shared/torch_api.h"

// The extension registers them when a test asks for them.
#define RF_CUDA_OPS(m) void register_ops(torch::Library& m)

namespace rf::cuda {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline int architecture(const Tensor&) { return 0; }
inline std::string architecture_in_use(const Tensor&) { return "emulated CUDA"; }

inline int64_t memory_of_all = int64_t(2) << 30;  // a test may want a small device
inline int64_t memory_of_device(const Tensor&) { return memory_of_all; }

// CPUs have no product of half types with a float32 result.
inline void wide_product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Tensor left = a.to(out.scalar_type()), right = b.to(out.scalar_type());
  accumulate ? at::addmm_out(out, out, left, right) : at::mm_out(out, left, right);
}

}  // namespace rf::cuda
