// Memory that kernels under test may touch: exactly the elements of the buffers that are lent to them.
#pragma once
#include <deque>
#include <tuple>

#include "emulator.h"
#include "memory.h"

namespace test {

// Notes what a kernel has left in memory, in order, to compare it between schedules (main.cpp).
void note_result(const void* p, size_t bytes);

// Lends a buffer to the kernels that are launched during its life; a const one to be read only.
class Lent {
 public:
  template <class T>
  explicit Lent(Buffer<T>& b) : p_(b.data()), bytes_(sizeof(T) * b.count()), writable_(true) {
    cuda_on_host::add_buffer(p_, bytes_, true);
  }
  template <class T>
  explicit Lent(const Buffer<T>& b) : p_(b.data()), bytes_(sizeof(T) * b.count()), writable_(false) {
    cuda_on_host::add_buffer(p_, bytes_, false);
  }
  ~Lent() {
    cuda_on_host::remove_buffer(p_);
    if (writable_) note_result(p_, bytes_);
  }
  Lent(const Lent&) = delete;

 private:
  const void* p_;
  size_t bytes_;
  bool writable_;
};

// Several of them at once.
template <class T>
using LentAs = Lent;
template <class... Buffers>
using LentAll = std::tuple<LentAs<Buffers>...>;

// The same one after another; see AnyMemory.
class LentMemory {
 public:
  template <class... Buffers>
  void read(const Buffers&... b) {
    (lent_.emplace_back(b), ...);
  }
  template <class... Buffers>
  void write(Buffers&... b) {
    (lent_.emplace_back(b), ...);
  }

 private:
  std::deque<Lent> lent_;
};

}  // namespace test
