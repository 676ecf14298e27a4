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

constexpr int kFamily = (int)std::size(kRowOps);
static_assert(kRowClasses <= 8, "a bit for each class of rows");
std::atomic<uint8_t> rows_by_aten[kMostCudaDevices][kFamily];

// The choices that are about rows, as bits; the others.
CudaChoices take_rows(const CudaChoices& choices, uint8_t (&bits)[kFamily]) {
  CudaChoices others;
  for (const auto& choice : choices) {
    bool found = false;
    for (int op = 0; op < kFamily; ++op)
      for (int c = 0; c < kRowClasses; ++c)
        if (choice.first == kRowOps[op] + (" " + row_class_name(c)) && choice.second == "aten") {
          bits[op] |= 1 << c;
          found = true;
        }
    if (!found) others.push_back(choice);
  }
  return others;
}

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
  uint8_t rows[kFamily] = {};
  const CudaChoices others = take_rows(choices, rows);
  if (take_cuda_choices) take_cuda_choices(device, others);
  for (int op = 0; op < kFamily; ++op) rows_by_aten[device][op].store(rows[op], std::memory_order_relaxed);
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

bool cuda_rows_by_aten(const char* op, int device, int row_class) {
  if (device < 0 || device >= kMostCudaDevices) return false;
  for (int i = 0; i < kFamily; ++i)
    if (!std::strcmp(op, kRowOps[i])) return rows_by_aten[device][i].load(std::memory_order_relaxed) >> row_class & 1;
  return false;
}

}  // namespace rf
