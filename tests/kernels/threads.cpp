// What csrc/cpu/parallel.h expects from its surroundings: std::thread, and scratch memory that notices misuse.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
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

// Ends at an unreadable page, to the byte: each size has a place of its own. It holds NaN at first, and again whenever
// another size is asked for, when its owner may no longer expect what it held.
void* scratch(Slot slot, int64_t bytes) {
  struct Buffer {
    char* p = nullptr;
    int64_t size = 0, mapped = 0;
    ~Buffer() {
      if (p) munmap(p, mapped);
    }
  };
  static thread_local Buffer buffers[kSlots];
  Buffer& b = buffers[(int)slot];
  const int64_t page = sysconf(_SC_PAGESIZE), inside = round_up(std::max<int64_t>(bytes, 1), page);
  if (!b.p || inside + page > b.mapped) {
    if (b.p) munmap(b.p, b.mapped);
    b.mapped = inside + page;
    b.p = (char*)mmap(nullptr, b.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.p == MAP_FAILED || mprotect(b.p + inside, page, PROT_NONE)) std::abort();
    b.size = -1;
  }
  char* at = b.p + b.mapped - page - bytes;
  if (b.size != bytes) std::memset(at, 0xff, bytes);
  b.size = bytes;
  return at;
}

}  // namespace rf
