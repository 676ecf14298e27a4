// The first entry to a stack is ucontext's, all further switches are setjmp's, which make no system call. longjmp to
// another stack is what glibc's fortified longjmp would refuse, so this file is compiled without it.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

namespace cuda_on_host {
namespace {

std::vector<char*> stacks;
jmp_buf* starting;
void (*starting_body)();
ucontext_t creator;

void enter() {
  void (*const body)() = starting_body;
  ucontext_t* const back = &creator;
  if (!_setjmp(*starting)) setcontext(back);
  body();
  std::abort();
}

}  // namespace

void make_fibers(int count) {
  const long page = sysconf(_SC_PAGESIZE);
  while ((int)stacks.size() < count) {
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) std::abort();
    stacks.push_back((char*)memory + page);
  }
}

void* stack_of(int fiber) { return stacks[fiber]; }

void reset_fiber(int fiber, jmp_buf context, void (*body)()) {
  ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = stacks[fiber];
  entry.uc_stack.ss_size = kStackBytes;
  entry.uc_link = nullptr;
  makecontext(&entry, enter, 0);
  starting = (jmp_buf*)context;
  starting_body = body;
  swapcontext(&creator, &entry);
}

}  // namespace cuda_on_host
