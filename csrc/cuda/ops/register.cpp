// Every op of a CUDA device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"

namespace rf::cuda {

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
