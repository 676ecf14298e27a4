// torch's side of the emulated device; see csrc/cuda/device/torch_device.h. CPU tensors are the device's.
#pragma once
#include <cuda_runtime.h>

#include "../../../csrc/torch_api.h"

// The extension registers them when a test asks for them.
#define RF_CUDA_OPS(m) void register_ops(torch::Library& m)

namespace rf::cuda {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline int architecture(const Tensor&) { return 0; }

}  // namespace rf::cuda
