// Memory of large results, behind the interface that storages of torch have: they may be resized and moved.
#include "shared/torch_api.h"

#include "cpu/ops/outputs.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

struct LargeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const p = (int64_t)bytes < tuning::kLargeBytes ? nullptr : take_large_buffer((int64_t)bytes);
    if (!p) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(p, bytes);
    return {p, p, give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void give_back(void* p) {
    c10::profiledCPUMemoryReporter().Delete(p);
    give_back_large_buffer(p);
  }
};

LargeAllocator large;
constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

c10::Allocator* allocator_for(at::IntArrayRef sizes, at::ScalarType type) {
  const int64_t bytes = c10::multiply_integers(sizes) * (int64_t)c10::elementSize(type);
  return bytes >= tuning::kLargeBytes ? &large : c10::GetCPUAllocator();
}

}  // namespace

// Not by at::empty, whose way through torch's dispatcher takes a quarter of a small op's time.
Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  return at::detail::empty_generic(sizes, allocator_for(sizes, type), kCpu, type, std::nullopt);
}

Tensor empty_result_like(const Tensor& t) {
  if (t.is_contiguous()) return empty_result(t.sizes(), t.options());
  const auto strides = at::infer_dense_strides(t.sizes(), t.strides());
  const auto type = t.scalar_type();
  return at::detail::empty_strided_generic(t.sizes(), strides, allocator_for(t.sizes(), type), kCpu, type);
}

}  // namespace rf
