// Checks, counted. A failure prints what was being tested and the test goes on; a crash prints it too (main.cpp).
#pragma once
#include <cstdint>
#include <iosfwd>
#include <vector>

#include "shared/print_problems.h"

namespace test {

extern int64_t passed, failed;

// What is being tested, as printf.
__attribute__((format(printf, 1, 2))) void describe(const char* format, ...);
const char* description();

// What a kernel is called with, printed too where a check fails while this lives.
class With {
 public:
  template <class Problem>
  explicit With(const Problem& problem)
      : problem(&problem), print([](std::ostream& to, const void* p) { to << *(const Problem*)p; }), outer(innermost) {
    innermost = this;
  }
  ~With() { innermost = outer; }
  With(const With&) = delete;
  static void print_all(std::ostream& to);

 private:
  const void* problem;
  void (*print)(std::ostream&, const void*);
  const With* outer;
  static inline const With* innermost = nullptr;
};

__attribute__((format(printf, 2, 3))) bool check(bool ok, const char* format, ...);
#define CHECK(condition) test::check((condition), "%s:%d: %s", __FILE__, __LINE__, #condition)

// Tests, which make themselves known to the program that they are linked into: TEST(name) { ... }
struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();
struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                                                         \
  static void test_##name();                                               \
  static const test::Registration registration_##name(#name, test_##name); \
  static void test_##name()
// Those whose names begin with what the environment's ONLY says, or all, by their names.
std::vector<Test> chosen_tests();

// Set by QUICK=1: fewer random cases, for emulated machines.
extern bool quick;
inline int fewer(int cases) { return quick ? (cases + 4) / 5 : cases; }

// How many threads run_parallel (threads.cpp) uses; 2 unless a test changes it.
extern int64_t threads;

}  // namespace test
