// Stacks of their own for the threads of a block, and switches between them without system calls.
#pragma once
#include <csetjmp>

namespace cuda_on_host {

constexpr long kStackBytes = 256 << 10;

// Makes sure that fibers [0, count) exist.
void make_fibers(int count);
// Lets `context` continue at body(), on the stack of the given fiber, when jumped to. body never returns.
void reset_fiber(int fiber, jmp_buf context, void (*body)());
void* stack_of(int fiber);

// Saves where the caller is and goes on elsewhere; returns when someone switches back.
inline void switch_fibers(jmp_buf from, jmp_buf to) {
  if (!_setjmp(from)) _longjmp(to, 1);
}

}  // namespace cuda_on_host
