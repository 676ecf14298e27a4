#include "shared/cuda_kernels.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace rf {
namespace {

constexpr int kOps = (int)std::size(kCudaOps);
static_assert(kOps < 31, "a bit for each op, and one that tells that there was an answer");
constexpr uint32_t kAnswered = 1u << 31;

std::atomic<uint32_t> in_use[kMostCudaDevices];

uint32_t bit_of(const char* op) {
  for (int i = 0; i < kOps; ++i)
    if (!std::strcmp(op, kCudaOps[i])) return 1u << i;
  throw std::invalid_argument(std::string("regfast: no op with CUDA kernels is called ") + op);
}

}  // namespace

void use_cuda_kernels(int device, const std::vector<std::string>& ops, const CudaChoices& choices) {
  if (device < 0 || device >= kMostCudaDevices)
    throw std::invalid_argument("regfast: expected a CUDA device from 0 to " + std::to_string(kMostCudaDevices - 1) +
                                ", got " + std::to_string(device));
  uint32_t bits = kAnswered;
  for (const auto& op : ops) bits |= bit_of(op.c_str());
  if (take_cuda_choices) take_cuda_choices(device, choices);
  in_use[device].store(bits, std::memory_order_release);
}

bool cuda_kernels_in_use(const char* op, int device) {
  if (device < 0 || device >= kMostCudaDevices) return false;
  uint32_t bits = in_use[device].load(std::memory_order_acquire);
  // Threads that ask at once get the same answer; no lock is held meanwhile, which Python could be waiting for.
  if (!(bits & kAnswered) && ask_about_cuda_kernels) {
    ask_about_cuda_kernels(device);
    bits = in_use[device].load(std::memory_order_acquire);
  }
  return bits & bit_of(op);
}

}  // namespace rf
