// The first entry to a stack is ucontext's, all further switches are setjmp's, which make no system call. longjmp to
// another stack is what glibc's fortified longjmp would refuse, so this file is compiled without it.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <vector>

namespace cuda_on_host {
namespace {

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* starting;
void (*starting_body)();
ucontext_t creator;

void enter() {
  void (*const body)() = starting_body;
  if (!_setjmp(starting->context)) setcontext(&creator);
  body();
  std::abort();
}

}  // namespace

void make_fibers(int count) {
  const long page = sysconf(_SC_PAGESIZE);
  while ((int)fibers.size() < count) {
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) std::abort();
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = (char*)memory + page;
  }
}

Fiber& fiber(int number) { return *fibers[number]; }

void start_fiber(Fiber& f, void (*body)()) {
  f.parked = false;
  ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = f.stack;
  entry.uc_stack.ss_size = kStackBytes;
  entry.uc_link = nullptr;
  makecontext(&entry, enter, 0);
  starting = &f;
  starting_body = body;
  swapcontext(&creator, &entry);
}

}  // namespace cuda_on_host
