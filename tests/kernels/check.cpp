// What check.h declares, for this folder's test program and that of tests/cuda_on_host.
#include "check.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

namespace test {

int64_t passed = 0, failed = 0;
bool quick = false;
static char current[256];

std::vector<Test>& tests() {
  static std::vector<Test> known;
  return known;
}

std::vector<Test> chosen_tests() {
  const char* only = std::getenv("ONLY");
  std::vector<Test> chosen;
  for (const Test& t : tests())
    if (!only || !std::strncmp(t.name, only, std::strlen(only))) chosen.push_back(t);
  std::sort(chosen.begin(), chosen.end(), [](const Test& a, const Test& b) { return std::strcmp(a.name, b.name) < 0; });
  return chosen;
}

void describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(current, sizeof current, format, args);
  va_end(args);
}

const char* description() { return current; }

void With::print_all(std::ostream& to) {
  for (const With* w = innermost; w; w = w->outer) {
    to << "  with ";
    w->print(to, w->problem);
    to << std::endl;
  }
}

bool check(bool ok, const char* format, ...) {
  if (ok) {
    ++passed;
    return true;
  }
  constexpr int64_t kPrinted = 12;
  if (++failed <= kPrinted) {
    std::printf("FAILED [%s] ", current);
    va_list args;
    va_start(args, format);
    std::vprintf(format, args);
    va_end(args);
    std::printf("\n");
    std::fflush(stdout);
    With::print_all(std::cout);
  } else if (failed == kPrinted + 1) {
    std::printf("... further failures are only counted\n");
  }
  return false;
}

}  // namespace test
