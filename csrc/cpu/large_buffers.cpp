// Memory of large results. What is given back is kept, with its pages, for the next result of about its size: a fresh
// mapping has every page zeroed by the system at first touch, which takes longer than most of our kernels. Meanwhile
// the system may take the pages (MADV_FREE) whenever it runs short; until it does, they are as good as new.
#include <chrono>
#include <map>
#include <mutex>
#include <unordered_map>

#include "cpu/platform.h"
#include "cpu/tuning.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rf {

#if defined(__linux__) && defined(MADV_FREE)

namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kPage = 2 << 20;  // a huge page, to which buffers are aligned

struct Kept {
  char* p;
  Clock::time_point since;
};

struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, Kept> kept;          // by size
  std::unordered_map<void*, int64_t> in_use;  // sizes
  LargeBuffers stats = {};
  int64_t limit = default_limit();

  static int64_t default_limit() {
    return (int64_t)sysconf(_SC_PHYS_PAGES) / tuning::kKeptShareOfMemory * (int64_t)sysconf(_SC_PAGESIZE);
  }

  // All below hold the mutex.
  void unmap(std::multimap<int64_t, Kept>::iterator which) {
    munmap(which->second.p, (size_t)which->first);
    stats.kept_bytes -= which->first;
    kept.erase(which);
  }

  // Those that have waited longest, until at most `most` bytes are kept; and any that has waited too long.
  void trim(int64_t most) {
    const auto too_long_ago = Clock::now() - std::chrono::seconds(tuning::kKeptSeconds);
    while (!kept.empty()) {
      const auto oldest = std::min_element(
          kept.begin(), kept.end(), [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
      if (stats.kept_bytes <= most && oldest->second.since >= too_long_ago) break;
      unmap(oldest);
    }
  }

  char* map(int64_t bytes) {
    const int64_t with_margin = bytes + kPage;
    void* const at = mmap(nullptr, (size_t)with_margin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    char *const begin = (char*)at, *const p = (char*)round_up((int64_t)(uintptr_t)at, kPage);
    if (p > begin) munmap(begin, (size_t)(p - begin));
    munmap(p + bytes, (size_t)(begin + with_margin - (p + bytes)));
    madvise(p, (size_t)bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
    return p;
  }
};

// Never destroyed: results may live longer than any static object. Held over a fork, so that the child finds it whole.
Pool& pool() {
  static Pool& all = *[] {
    static Pool* const made = new Pool;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return all;
}

}  // namespace

void* take_large_buffer(int64_t bytes) {
  Pool& all = pool();
  const int64_t size = round_up(bytes, kPage);
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.limit == 0) return nullptr;
  all.trim(all.limit);
  char* p;
  int64_t got = size;
  const auto fits = all.kept.lower_bound(size);
  if (fits != all.kept.end() && fits->first <= size + size / tuning::kBufferSlack) {
    got = fits->first;
    p = fits->second.p;
    all.kept.erase(fits);
    all.stats.kept_bytes -= got;
    ++all.stats.reused;
  } else {
    p = all.map(size);
    if (!p) {
      all.trim(0);
      p = all.map(size);
    }
    if (!p) return nullptr;
    ++all.stats.mapped;
  }
  all.in_use.emplace(p, got);
  all.stats.used_bytes += got;
  return p;
}

void give_back_large_buffer(void* p) {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto given = all.in_use.find(p);
  const int64_t size = given->second;
  all.in_use.erase(given);
  all.stats.used_bytes -= size;
  if (size > all.limit) {
    munmap(p, (size_t)size);
    return;
  }
  madvise(p, (size_t)size, MADV_FREE);
  all.kept.insert({size, {(char*)p, Clock::now()}});
  all.stats.kept_bytes += size;
  all.trim(all.limit);
}

LargeBuffers large_buffers() {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  LargeBuffers now = all.stats;
  now.limit = all.limit;
  return now;
}

void release_large_buffers() {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.trim(0);
}

void limit_large_buffers(int64_t bytes) {
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.limit = bytes;
  all.trim(bytes);
}

#else

void* take_large_buffer(int64_t) { return nullptr; }
void give_back_large_buffer(void*) {}
LargeBuffers large_buffers() { return {}; }
void release_large_buffers() {}
void limit_large_buffers(int64_t) {}

#endif

}  // namespace rf
