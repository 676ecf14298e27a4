// Scratch memory of a thread, which grows to the largest request.
#include <cstdlib>
#include <new>

#include "cpu/platform.h"

namespace rf {

void* scratch(Slot slot, int64_t bytes) {
  struct Buffer {
    void* p = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(p); }
  };
  static thread_local Buffer buffers[kSlots];
  Buffer& b = buffers[(int)slot];
#if defined(__SANITIZE_ADDRESS__)
  // Memory of exactly the size that was asked for, so that a write beyond it is noticed.
  constexpr int64_t step = 64;
  const bool fits = b.size == round_up(bytes, step);
#else
  constexpr int64_t step = 4096;
  const bool fits = b.size >= bytes;
#endif
  if (!fits || !b.p) {
    std::free(b.p);
    b.size = round_up(bytes, step);
    b.p = std::aligned_alloc(step, (size_t)b.size);
    if (!b.p) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return b.p;
}

}  // namespace rf
