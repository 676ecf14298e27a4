// Which ops' CUDA kernels are in use on a device. Python answers, from the GPU's proof or from REGFAST_CUDA_KERNELS
// (regfast/proof/decide.py), when the first tensor of a device asks; a build without csrc/cuda knows the question too.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace rf {

// The ops that are proven, and turned on, one by one: as takes_composite is told their names.
constexpr const char* kCudaOps[] = {"linear",     "softmax",       "log_softmax",
                                    "logsumexp",  "cross_entropy", "linear_cross_entropy",
                                    "linear_nll", "phm_linear",    "mse_loss"};

// Names and what was chosen: {"bfloat16 large", "sm80"}, {"bfloat16 relu", "fused"}; csrc/cuda/ops/choices.cpp has
// them.
using CudaChoices = std::vector<std::pair<std::string, std::string>>;

// Set by module.cpp: asks Python, which calls use_cuda_kernels before it returns.
inline void (*ask_about_cuda_kernels)(int device) = nullptr;
// Set by csrc/cuda, where that is built. Throws std::invalid_argument where it does not know a name.
inline void (*take_cuda_choices)(int device, const CudaChoices& choices) = nullptr;

// Devices beyond are told to have no kernels.
constexpr int kMostCudaDevices = 64;

// From now on the kernels of these ops are in use on the device, and of no others.
void use_cuda_kernels(int device, const std::vector<std::string>& ops, const CudaChoices& choices);
bool cuda_kernels_in_use(const char* op, int device);

}  // namespace rf
