// Runs every test with every table of kernels that this machine runs, or with those named as arguments. Each ISA has a
// process of its own, because the choice is made once per process and because a crash must not hide the others.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/isa/kernels.h"

namespace {

[[maybe_unused]] void on_crash(int signal) {
  const char* parts[] = {"CRASHED [", test::description(), "] ", strsignal(signal), "\n"};
  for (const char* s : parts)
    if (write(STDOUT_FILENO, s, std::strlen(s)) < 0) break;
  _exit(3);
}

struct Counts {
  int64_t passed, failed;
};

// Tables of one file have the same kernels but for products of bf16: what those do not come into is tested with one.
bool is_of_products(const std::string& test) {
  for (const char* name : {"gemm", "packing", "conversions", "phm_linear"})
    if (test.starts_with(name)) return true;
  return false;
}
bool shares_a_file(const rf::Kernels& a, const rf::Kernels& b) { return a.softmax_forward[0] == b.softmax_forward[0]; }

Counts run_tests(bool products_alone) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // a sanitizer reports crashes itself
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) ::signal(signal, on_crash);
#endif
  test::quick = std::getenv("QUICK") != nullptr;
  for (const test::Test& t : test::chosen_tests()) {
    if (products_alone && !is_of_products(t.name)) continue;
    const auto start = std::chrono::steady_clock::now();
    const int64_t before = test::passed + test::failed;
    test::describe("%s", t.name);
    t.run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("  %-20s %8lld checks %6.2f s\n", t.name, (long long)(test::passed + test::failed - before), seconds);
    std::fflush(stdout);
  }
  return {test::passed, test::failed};
}

// One failure for a process that did not live to count.
Counts run_isa(const char* isa, bool products_alone) {
  std::printf("%s:\n", isa);
  std::fflush(stdout);
  int channel[2];
  if (pipe(channel)) return {0, 1};
  const pid_t child = fork();
  if (child < 0) return {0, 1};
  if (child == 0) {
    setenv("REGFAST_ISA", isa, 1);
    test::check(!std::strcmp(rf::kernels().isa, isa), "REGFAST_ISA=%s chose %s", isa, rf::kernels().isa);
    const Counts counts = run_tests(products_alone);
    std::fflush(stdout);
    const bool sent = write(channel[1], &counts, sizeof counts) == sizeof counts;
    std::exit(sent && counts.failed == 0 ? 0 : 1);  // not _exit: a sanitizer looks for leaks on the way out
  }
  close(channel[1]);
  Counts counts = {0, 0};
  const bool whole = read(channel[0], &counts, sizeof counts) == sizeof counts;
  close(channel[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!whole || (counts.failed == 0 && status != 0)) ++counts.failed;
  std::printf("%s: %lld passed, %lld failed\n", isa, (long long)counts.passed, (long long)counts.failed);
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  const bool all = isas.empty();
  const rf::Kernels* before = nullptr;
  Counts total = {0, 0};
  const auto run = [&](const char* isa, bool products_alone) {
    const Counts counts = run_isa(isa, products_alone);
    total.passed += counts.passed;
    total.failed += counts.failed;
  };
  for (const std::string& isa : isas) run(isa.c_str(), false);
  for (const rf::Kernels* const* k = rf::available_kernels(); all && *k; before = *k++)
    run((*k)->isa, before && shares_a_file(*before, **k));
  std::printf("%lld passed, %lld failed\n", (long long)total.passed, (long long)total.failed);
  return total.failed == 0 && total.passed > 0 ? 0 : 1;
}
