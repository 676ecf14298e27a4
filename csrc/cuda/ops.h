// What ops.cpp and ops_cross_entropy.cpp share: with device/torch_device.h they are all of this folder that knows
// torch.
#pragma once
#include <device/torch_device.h>

namespace rf::cuda {

// Memory that only kernels see, null if there is nothing to hold.
struct Workspace {
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes > 0) memory = at::empty({bytes}, like.options().dtype(at::kByte));
  }
  void* data() { return memory.defined() ? memory.mutable_data_ptr() : nullptr; }
  Tensor memory;
};

void register_cross_entropy(torch::Library& m);

}  // namespace rf::cuda
