// What csrc/cpu/platform.h expects from its surroundings: std::thread, whose every step the thread sanitizer sees, and
// scratch memory that notices misuse.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/platform.h"

int64_t test::threads = 2;

namespace rf {

int64_t thread_count() { return test::threads; }

void run_parallel(int64_t n, int64_t grain, void (*fn)(int64_t begin, int64_t end, void* ctx), void* ctx) {
  // Divided as torch's pool does it: a part may be smaller than the grain.
  const int64_t parts = std::min(test::threads, ceil_div(n, grain)), part = ceil_div(n, std::max<int64_t>(1, parts));
  std::vector<std::thread> others;
  for (int64_t begin = part; begin < n; begin += part) others.emplace_back(fn, begin, std::min(n, begin + part), ctx);
  fn(0, std::min(n, part), ctx);
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
