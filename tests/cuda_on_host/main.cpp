// Runs every test on every kind of device that launchers tell apart, under every schedule; what kernels leave in memory
// must not depend on the schedule.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "device_memory.h"

namespace test {

struct Digest {
  uint64_t digest;
  std::string of;
};
static std::vector<Digest> results;

void note_result(const void* p, size_t bytes) {
  uint64_t digest = 14695981039346656037u;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) digest = (digest ^ ((const unsigned char*)p)[i]) * 1099511628211u;
  results.push_back({digest, description()});
}

}  // namespace test

namespace {

void run_test(const test::Test& t) {
  try {
    t.run();
  } catch (const std::exception& e) {
    test::check(false, "%s", e.what());
  }
}

// What the kernels of one test left in memory, under one schedule against the first.
void compare(const std::vector<test::Digest>& first, const std::vector<test::Digest>& now, const char* schedule) {
  test::check(first.size() == now.size(), "%zu results, %zu in order %s", first.size(), now.size(), schedule);
  for (size_t i = 0; i < first.size() && i < now.size(); ++i) {
    test::describe("%s", first[i].of.c_str());
    if (!test::check(first[i].digest == now[i].digest, "other results when threads run in order %s", schedule)) return;
  }
}

}  // namespace

int main() {
  for (const int arch : {80, 90}) {
    cuda_on_host::set_device(arch);
    for (const test::Test& t : test::chosen_tests()) {
      const auto start = std::chrono::steady_clock::now();
      const int64_t before = test::passed + test::failed;
      std::vector<test::Digest> first;
      for (const auto schedule : cuda_on_host::kSchedules) {
        cuda_on_host::set_schedule(schedule);
        test::results.clear();
        test::describe("%s", t.name);
        run_test(t);
        if (schedule == cuda_on_host::kSchedules[0])
          first = test::results;
        else
          compare(first, test::results, cuda_on_host::name(schedule));
      }
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      std::printf("  sm_%d %-20s %8lld checks %6.2f s\n", arch, t.name,
                  (long long)(test::passed + test::failed - before), seconds);
      std::fflush(stdout);
    }
  }
  std::printf("%lld passed, %lld failed\n", (long long)test::passed, (long long)test::failed);
  return test::failed == 0 && test::passed > 0 ? 0 : 1;
}
