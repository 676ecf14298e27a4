// Memory that notices misuse. A buffer's elements lie against an unreadable page, at its end or at its start, so that a
// read or write beyond them faults; what surrounds them, and what a kernel should leave alone in them, keeps a pattern
// of NaN bits. An input is made read-only.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "numbers.h"

namespace test {

enum class Guard { behind, before };

template <class T>
class Buffer {
 public:
  // `shift` elements are left between the guard page and the data, to vary the data's alignment.
  explicit Buffer(int64_t count, Guard guard = Guard::behind, int64_t shift = 0) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = (count + shift) * (int64_t)sizeof(T);
    inside_ = std::max<int64_t>(1, (bytes + page - 1) / page) * page;
    total_ = inside_ + 2 * page;
    base_ = (char*)mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED || mprotect(base_ + page, inside_, PROT_READ | PROT_WRITE)) std::abort();
    start_ = base_ + page;
    std::memset(start_, kPattern, inside_);
    data_ = guard == Guard::behind ? (T*)(start_ + inside_) - count - shift : (T*)start_ + shift;
    written_.resize(count);
  }
  ~Buffer() {
    if (base_) munmap(base_, total_);
  }
  Buffer(Buffer&& b) noexcept
      : base_(std::exchange(b.base_, nullptr)),
        start_(b.start_),
        data_(b.data_),
        count_(b.count_),
        inside_(b.inside_),
        total_(b.total_),
        written_(std::move(b.written_)) {}
  Buffer(const Buffer&) = delete;
  void operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  double value(int64_t i) const { return to_double(data_[i]); }

  void read_only() { mprotect(start_, inside_, PROT_READ); }
  // Declares an element to be the kernel's to write.
  double result(int64_t i) {
    written_[i] = true;
    return to_double(data_[i]);
  }
  std::vector<T> copy() const { return std::vector<T>(data_, data_ + count_); }
  // Whether all elements but the kernel's are as in the copy, for memory that is written in place.
  bool rest_equals(const std::vector<T>& before) const {
    for (int64_t i = 0; i < count_; ++i)
      if (!written_[i] && std::memcmp(&before[i], data_ + i, sizeof(T))) return false;
    return true;
  }
  // Whether everything else still holds the pattern.
  bool rest_untouched() const {
    for (const char* p = start_; p < start_ + inside_; ++p) {
      const int64_t at = p - (const char*)data_;
      if (at >= 0 && at < count_ * (int64_t)sizeof(T) && written_[at / (int64_t)sizeof(T)]) continue;
      if ((unsigned char)*p != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kPattern = 0xff;  // a NaN in every floating-point type
  char *base_ = nullptr, *start_ = nullptr;
  T* data_ = nullptr;
  int64_t count_ = 0, inside_ = 0, total_ = 0;
  std::vector<bool> written_;
};

// `count` values of generate(), rounded to T.
template <class T, class F>
Buffer<T> filled(int64_t count, F&& generate, Guard guard = Guard::behind, int64_t shift = 0) {
  Buffer<T> b(count, guard, shift);
  for (int64_t i = 0; i < count; ++i) b[i] = from_double<T>(generate());
  return b;
}
template <class T, class F>
Buffer<T> input(int64_t count, F&& generate, Guard guard = Guard::behind, int64_t shift = 0) {
  Buffer<T> b = filled<T>(count, generate, guard, shift);
  b.read_only();
  return b;
}

// What a call may touch, for devices that ask: a CPU's kernels find out by the pages around.
struct AnyMemory {
  template <class... Buffers>
  void read(const Buffers&...) {}
  template <class... Buffers>
  void write(Buffers&...) {}
};

}  // namespace test
