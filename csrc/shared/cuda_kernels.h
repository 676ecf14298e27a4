// Which ops' CUDA kernels are in use on a device. Python answers, from the GPU's proof or from REGFAST_CUDA_KERNELS
// (regfast/proof/decide.py), when the first tensor of a device asks; a build without csrc/cuda knows the question too.
#pragma once
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace rf {

// The ops that are proven, and turned on, one by one: as takes_composite is told their names.
constexpr const char* kCudaOps[] = {"linear",     "softmax",       "log_softmax",
                                    "logsumexp",  "cross_entropy", "linear_cross_entropy",
                                    "linear_nll", "phm_linear",    "mse_loss"};

// Of the softmax family a proof leaves to PyTorch those rows for which PyTorch's kernels are faster: by their length in
// bytes, which is what our kernels differ by (a warp's registers, a block's shared memory, more than that), or because
// their elements lie apart; and whether they are so few that not every SM has one.
constexpr const char* kRowOps[] = {"softmax", "log_softmax", "logsumexp", "cross_entropy"};
constexpr const char* kRowLengths[] = {"short", "medium", "long", "columns"};
constexpr int kRowClasses = 2 * (int)std::size(kRowLengths);
constexpr int64_t kShortRowBytes = 2 << 10, kMediumRowBytes = 64 << 10, kFewRows = 128;
constexpr int row_class(int64_t rows, int64_t bytes, bool apart) {
  const int length = apart ? 3 : bytes <= kShortRowBytes ? 0 : bytes <= kMediumRowBytes ? 1 : 2;
  return 2 * length + (rows <= kFewRows ? 1 : 0);
}
inline std::string row_class_name(int row_class) {  // "long", "long few"
  return std::string(kRowLengths[row_class / 2]) + (row_class % 2 ? " few" : "");
}

// Names and what was chosen: {"softmax long few", "aten"}, and what csrc/cuda/ops/choices.cpp has of products:
// {"bfloat16 large", "sm80"}, {"bfloat16 relu", "fused"}.
using CudaChoices = std::vector<std::pair<std::string, std::string>>;

// Set by module.cpp: asks Python, which calls use_cuda_kernels before it returns.
inline void (*ask_about_cuda_kernels)(int device) = nullptr;
// Set by csrc/cuda, where that is built; of products. Throws std::invalid_argument where it does not know a name.
inline void (*take_cuda_choices)(int device, const CudaChoices& choices) = nullptr;

// Devices beyond are told to have no kernels.
constexpr int kMostCudaDevices = 64;

// From now on the kernels of these ops are in use on the device, and of no others.
void use_cuda_kernels(int device, const std::vector<std::string>& ops, const CudaChoices& choices);
bool cuda_kernels_in_use(const char* op, int device);
// Whether PyTorch's kernels are faster there for rows of this class; to be asked where ours are in use.
bool cuda_rows_by_aten(const char* op, int device, int row_class);

}  // namespace rf
