// What was found on a GPU to be right and faster there, by name (regfast/proof/): whose product, and whose epilogue.
#include "shared/torch_api.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

#include "cuda/ops/ops.h"

namespace rf::cuda {
namespace {

constexpr int kArithmetics = kDTypes + 1;
constexpr Activation kEpilogues[] = {Activation::relu, Activation::gelu_tanh};  // at::_addmm_activation has these

std::atomic<bool> fused[kMostCudaDevices][kArithmetics][std::size(kEpilogues)];

std::string name_of_arithmetic(int i) { return i < kDTypes ? kDTypeNames[i] : "tf32"; }

// Every name that there is is tried: there are 25, and they are read once.
void take(int device, const CudaChoices& choices) {
  GemmTable table = {};
  bool by_aten[kArithmetics][std::size(kEpilogues)] = {};
  const auto take_one = [&](const std::string& what, const std::string& chosen) {
    for (int a = 0; a < kArithmetics; ++a) {
      for (int s = 0; s < tuning::kGemmSizes; ++s)
        for (int k = 0; k < (int)std::size(tuning::kGemmKernelNames); ++k)
          if (what == name_of_arithmetic(a) + " " + tuning::kGemmSizeNames[s] &&
              chosen == tuning::kGemmKernelNames[k]) {
            table.kernel[a][s] = (tuning::GemmKernel)k;
            return true;
          }
      for (int e = 0; e < (int)std::size(kEpilogues); ++e)
        if (what == name_of_arithmetic(a) + " " + name_of(kEpilogues[e]) && chosen == "fused")
          return by_aten[a][e] = true;
    }
    return false;
  };
  for (const auto& [what, chosen] : choices)
    if (!take_one(what, chosen))
      throw std::invalid_argument("regfast: no choice of CUDA kernels is called " + what + ": " + chosen);
  set_gemm_table(device, table);
  for (int a = 0; a < kArithmetics; ++a)
    for (int e = 0; e < (int)std::size(kEpilogues); ++e) fused[device][a][e] = by_aten[a][e];
}
[[maybe_unused]] const bool announced = (take_cuda_choices = take, true);

}  // namespace

bool Cuda::fused_by_aten(DType dtype, Activation activation) const {
  const auto e = std::find(std::begin(kEpilogues), std::end(kEpilogues), activation) - std::begin(kEpilogues);
  const int a = tf32_allowed(dtype) ? kDTypes : (int)dtype;
  const int index = std::max(0, (int)like.device().index());  // the emulator's tensors have none
  return e < (int)std::size(kEpilogues) && fused[index][a][e];
}

}  // namespace rf::cuda
