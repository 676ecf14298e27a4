// softmax, log_softmax and logsumexp on a CUDA device.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/softmax_ops.h"

namespace rf::cuda {
namespace {

struct CudaSoftmax : Cuda {
  using Cuda::Cuda;
  static constexpr auto forward = launch_softmax_forward, backward = launch_softmax_backward;
  static constexpr auto logsumexp_forward = launch_logsumexp_forward, logsumexp_backward = launch_logsumexp_backward;

  void run(decltype(forward) launch, DType dtype, const SoftmaxProblem& p, int64_t rows) const {
    launch(dtype, {p, rows}, stream);
  }
};

}  // namespace

void register_softmax(torch::Library& m) { rf::register_softmax<CudaSoftmax>(m, architecture_in_use); }

}  // namespace rf::cuda
