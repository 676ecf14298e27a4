// Launches that run the kernel before they return; see csrc/cuda/device/launch_kernel.cuh.
#pragma once
#include <cuda_runtime.h>

#include <tuple>

namespace rf::cuda {

struct Device {
  int arch, sms;
  int64_t shared_per_block;
  int index;
};
constexpr int kMostDevices = 1;

inline const Device& device() {
  static Device d;
  cuda_on_host::get_device(&d.arch, &d.sms, &d.shared_per_block);
  return d;
}

template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, int64_t shared_bytes,
                    cudaStream_t, Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  const auto call = [](const void* kernel, const void* parameters) {
    std::apply((void (*)(Parameters...))kernel, *(const std::tuple<Parameters...>*)parameters);
  };
  cuda_on_host::run({call, (const void*)kernel, &parameters, sizeof parameters, grid, block, cluster, shared_bytes});
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  launch_cluster(kernel, 1, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace rf::cuda
