// Kernels with one mistake each: what a mistake is called, and which kinds of fault are to be found where it is made.
#pragma once
#include <algorithm>
#include <cstdio>
#include <vector>

#include "check.h"
#include "emulator.h"

namespace test {

template <class Mistake>
struct PlantedFault {
  const char* name;
  Mistake mistake;
  std::vector<cuda_on_host::Kind> kinds;  // what is seen first may depend on the schedule
};

// Without a mistake (the first of them, none) nothing is found; with it, one of these kinds of fault.
template <class Mistake, class F>
void launch_planted(const PlantedFault<Mistake>& c, F&& launch) {
  bool thrown = false;
  try {
    launch();
  } catch (const cuda_on_host::Fault& fault) {
    thrown = true;
    if (!CHECK(std::count(c.kinds.begin(), c.kinds.end(), fault.kind))) std::printf("%s\n", fault.what());
  }
  CHECK(thrown == (c.mistake != Mistake{}));
}

}  // namespace test
