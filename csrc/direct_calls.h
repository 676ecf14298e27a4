// The public ops as functions of Python that reach the dispatcher at once.
#pragma once
#include <pybind11/pybind11.h>

namespace rf {

void add_direct_calls(pybind11::module_& m);

}  // namespace rf
