// Stacks of their own for the threads of a block, and switches between them without system calls.
#pragma once
#include <csetjmp>

namespace cuda_on_host {

constexpr long kStackBytes = 256 << 10;

struct Fiber {
  char* stack;
  jmp_buf context;
  bool parked;  // between two runs of its body, so that it goes on with the next when switched to
};

// Makes sure that fibers [0, count) exist.
void make_fibers(int count);
Fiber& fiber(int number);
// Lets the fiber start its body when it is next switched to, whatever it was in the middle of. The body never returns.
void start_fiber(Fiber& f, void (*body)());

// Saves where the caller is and goes on elsewhere; returns when someone switches back.
inline void switch_fibers(jmp_buf from, jmp_buf to) {
  if (!_setjmp(from)) _longjmp(to, 1);
}

}  // namespace cuda_on_host
