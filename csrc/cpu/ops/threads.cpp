// The threads that platform.h asks for are torch's.
#include "shared/torch_api.h"

#include <torch/csrc/stable/c/shim.h>

#include "cpu/platform.h"

namespace rf {

// torch's own pool through its C interface: the header-only at::parallel_for would need a second OpenMP runtime here.
void run_parallel(int64_t n, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
  TORCH_CHECK(torch_parallel_for(0, n, grain, fn, ctx) == 0, "regfast: torch's thread pool failed");
}
int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

}  // namespace rf
