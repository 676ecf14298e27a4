// What the algorithms (*.inl.h) use besides each other and a SIMD vocabulary. They are included inside the namespace
// and the target region of an ISA, where a function of the standard library would be compiled for CPUs that not
// everybody has, and its copy might be the one that the linker keeps: so an ISA's file includes this before its region
// opens, and the algorithms' own lines then open no file.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kernels/arguments.h"
#include "cpu/tuning.h"
#include "shared/compensated_sum.h"
