// What csrc/cpu/parallel.h expects from its surroundings, on std::thread.
#include <algorithm>
#include <thread>
#include <vector>

#include "check.h"
#include "parallel.h"

int64_t test::threads = 2;

namespace rf {

int64_t thread_count() { return test::threads; }

void run_parallel(int64_t n, int64_t grain, void (*fn)(int64_t begin, int64_t end, void* ctx), void* ctx) {
  const int64_t parts = std::max<int64_t>(1, std::min(test::threads, n / grain));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < parts; ++i) others.emplace_back(fn, n * i / parts, n * (i + 1) / parts, ctx);
  fn(0, n / parts, ctx);
  for (std::thread& t : others) t.join();
}

}  // namespace rf
