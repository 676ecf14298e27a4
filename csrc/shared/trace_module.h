// The records of calls for Python: what regfast._paths is made of.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "shared/trace.h"

namespace rf {

inline void add_trace_functions(pybind11::module_& m) {
  m.def("print_calls", trace::print_calls, "Prints each call from now on to standard error.");
  m.def("calls_recorded", trace::on, "Whether anybody listens.");
  m.def("begin_calls", trace::begin, "A mark from which on calls are recorded.");
  m.def(
      "end_calls",
      [](int64_t mark) {
        std::vector<std::array<std::string, 5>> all;
        for (auto& r : trace::end(mark)) all.push_back({r.op, r.tensors, r.path, r.by, r.why});
        return all;
      },
      pybind11::arg("mark"), "The calls since a mark.");
  m.def(
      "add_call",
      [](std::string op, std::string tensors, std::string why) {
        trace::add({std::move(op), std::move(tensors), "composite", "", std::move(why)});
      },
      pybind11::arg("op"), pybind11::arg("tensors"), pybind11::arg("why"), "A composite that Python called.");
}

}  // namespace rf
