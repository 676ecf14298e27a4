// A Python module that lets the tests of the ops run the CUDA kernels: while it is enabled, calls with CPU tensors
// reach csrc/cuda/ops in place of csrc/cpu/ops, and torch's CPU memory is the device's: each tensor a buffer of
// its own, filled with NaNs.
#include "shared/torch_api.h"

#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "cuda/ops/torch_device.h"
#include "emulator.h"
#include "shared/trace_module.h"

namespace rf::cuda {
void register_ops(torch::Library& m);
}

namespace {

struct DeviceAllocator : c10::Allocator {
  static constexpr size_t kAlignment = 256;  // as of CUDA's own allocations

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, release, c10::Device(c10::kCPU)};
    void* p = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK(p, "cuda_on_host: no memory for ", bytes, " bytes");
    std::memset(p, 0xff, bytes);
    cuda_on_host::add_buffer(p, bytes);
    return {p, p, release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static void release(void* p) {
    cuda_on_host::remove_buffer(p);
    std::free(p);
  }
};

DeviceAllocator allocator;  // tensors may outlive the enabling
c10::Allocator* usual = nullptr;
std::unique_ptr<torch::Library> ops;

void disable() {
  if (!ops) return;
  ops.reset();
  c10::SetCPUAllocator(usual, 255);
}

void enable(const std::string& schedule, int arch) {
  disable();
  bool known = false;
  for (const auto s : cuda_on_host::kSchedules)
    if (schedule == cuda_on_host::name(s)) {
      cuda_on_host::set_schedule(s);
      known = true;
    }
  if (!known) throw std::invalid_argument("cuda_on_host: no schedule is called " + schedule);
  cuda_on_host::set_device(arch);
  usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator, 255);
  ops = std::make_unique<torch::Library>(torch::Library::IMPL, "regfast", c10::DispatchKey::CPU, __FILE__, __LINE__);
  rf::cuda::register_ops(*ops);
}

}  // namespace

PYBIND11_MODULE(cuda_on_host, m) {
  m.def("enable", enable, pybind11::arg("schedule"), pybind11::arg("arch"));
  m.def("disable", disable);
  rf::add_trace_functions(m);
  m.def("take_cuda_choices", [](const rf::CudaChoices& choices) { rf::take_cuda_choices(0, choices); });
  m.def("set_memory", [](int64_t bytes) { return std::exchange(rf::cuda::memory_of_all, bytes); });
}
