// How kernels are launched: checked, with as much shared memory as they ask for. tests/cuda_on_host/cuda/device
// has the same functions over threads of its own making, so that kernels and launchers compile for both without a
// change.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace rf::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("regfast: ") + what + ": " + cudaGetErrorString(error));
}

// What launchers ask about the current device.
struct Device {
  int arch;  // what the code in use was compiled for: 80 for compute capability 8.0
  int sms;
  int64_t shared_per_block;  // bytes, the most that a kernel can opt in to
  int index;                 // among the devices, below kMostDevices
};
constexpr int kMostDevices = 64;

template <class>
__global__ void nothing() {}

// Read once per device; attributes of a device never need its queue to be empty.
inline const Device& device() {
  static Device known[kMostDevices] = {};
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMostDevices) throw std::runtime_error("regfast: more CUDA devices than it counts on");
  Device& d = known[index];
  if (d.sms == 0) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
      return value;
    };
    // Two threads here at once write the same values; sms, which tells that the others are there, comes last.
    const int capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    // A build for older devices runs here as PTX, without what newer ones have: there are no clusters in it.
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, (const void*)nothing<void>), "cudaFuncGetAttributes");
    d.arch = capability < code.ptxVersion ? capability : code.ptxVersion;
    d.index = index;
    d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    __atomic_store_n(&d.sms, attribute(cudaDevAttrMultiProcessorCount), __ATOMIC_RELEASE);
  }
  return d;
}

// `cluster` blocks along x share one another's shared memory (sm_90 and later); 1 elsewhere.
template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, int64_t shared_bytes,
                    cudaStream_t stream, Arguments&&... arguments) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes),
          "shared memory of a kernel");
  constexpr int kPortableCluster = 8;
  if (cluster > kPortableCluster)
    check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster of a kernel");
  cudaLaunchAttribute shape = {};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = (unsigned)cluster;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...),
        "launch of a kernel");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  launch_cluster(kernel, 1, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace rf::cuda
