// Every op of a CUDA device, and whether its kernels are used.
#include "shared/torch_api.h"

#include <cstdlib>
#include <cstring>

#include "cuda/ops/ops.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

// Whether the kernels are used for a CUDA tensor: REGFAST_CUDA_KERNELS=1 (or 0) says so, else tuning.h's list of the
// architectures that they have been proven on.
bool enabled(const Tensor& t) {
  static const char* const said = std::getenv("REGFAST_CUDA_KERNELS");
  if (said && *said) return std::strcmp(said, "0") != 0;
  return tuning::proven(architecture(t));
}
[[maybe_unused]] const bool announced = (cuda_kernels_enabled = enabled, true);

}  // namespace

RF_CUDA_OPS(m) {
  register_linear(m);
  register_softmax(m);
  register_cross_entropy(m);
  register_linear_cross_entropy(m);
  register_linear_nll(m);
  register_phm_linear(m);
  register_mse_loss(m);
}

}  // namespace rf::cuda
