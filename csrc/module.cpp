// The Python module regfast._C: what was built, what runs here, and how linear_cross_entropy is divided.
#include "shared/torch_api.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "cpu/drivers/drivers.h"
#include "cpu/drivers/linear_cross_entropy.h"
#include "cpu/isa/kernels.h"
#include "cpu/platform.h"
#include "direct_calls.h"
#include "shared/chunks.h"
#include "shared/trace_module.h"

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto table = rf::available_kernels(); *table; ++table) names.push_back((*table)->isa);
  return names;
}

rf::DType dtype_named(const std::string& name) {
  for (int i = 0; i < rf::kDTypes; ++i)
    if (name == rf::kDTypeNames[i]) return (rf::DType)i;
  throw std::invalid_argument("a dtype with kernels: " + name);
}

// Who multiplies in linear, by dtype; gemm_by_aten has the rule.
pybind11::dict linear_products() {
  pybind11::dict who;
  for (int i = 0; i < rf::kDTypes; ++i) {
    const auto t = (rf::DType)i;
    const bool large = rf::large_gemm_by_aten(t), all = rf::gemm_by_aten(t, 4, 4, 4);
    who[rf::kDTypeNames[i]] = all ? "aten" : large ? "aten for large products, regfast for the others" : "regfast";
  }
  return who;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
  info["cxx_standard"] = (long)__cplusplus;
  info["isas"] = isas();
  info["isa"] = rf::kernels().isa;
  info["linear"] = linear_products();
  info["cuda"] = c10::Dispatcher::singleton()
                     .findSchemaOrThrow("regfast::linear_forward", "")
                     .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return info;
}

// Of a reduced loss of class indices with all gradients.
rf::LinearCrossEntropySize plain_size(const std::string& type, int64_t rows, int64_t features, int64_t classes,
                                      std::optional<int64_t> budget) {
  return {.dtype = dtype_named(type),
          .rows = rows,
          .features = features,
          .classes = classes,
          .positions = 1,
          .memory_budget = budget};
}

// The plan for it: rows of a chunk, the bytes that it takes, the budget. Without one it is the default of the CPU, or
// of a CUDA device of so much memory.
std::tuple<int64_t, int64_t, int64_t> linear_cross_entropy_plan(int64_t rows, int64_t features, int64_t classes,
                                                                const std::string& type, bool cuda,
                                                                std::optional<int64_t> budget, int64_t memory) {
  if (cuda && !budget) budget = rf::cuda_default_memory_budget(memory);
  const auto size = plain_size(type, rows, features, classes, budget);
  return cuda ? std::tuple{rf::cuda_chunk_rows(size), rf::cuda_peak_bytes(size), *budget}
              : std::tuple{rf::chunk_rows(size), rf::peak_bytes(size), budget.value_or(rf::default_memory_budget())};
}

// The budget that makes chunks of so many rows.
int64_t linear_cross_entropy_budget(int64_t chunk, int64_t features, int64_t classes, const std::string& type,
                                    bool cuda) {
  const auto size = plain_size(type, chunk, features, classes, std::nullopt);
  return cuda ? rf::cuda_budget_for_chunk(size, chunk) : rf::budget_for_chunk(size, chunk);
}

// Keeps the function that answers torch_api.h's question about the class of a Python subclass.
void ask_about_subclasses(pybind11::function answer) {
  static pybind11::function& kept = *new pybind11::function;  // no destructor that would run after the interpreter's
  kept = std::move(answer);
  rf::subclass_takes_composite = [](const rf::Tensor& t) {
    pybind11::gil_scoped_acquire gil;
    const auto object = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t));
    return kept(pybind11::type::of(object)).cast<bool>();
  };
}

// Keeps the function that is asked about a CUDA device when its first tensor comes, and then calls use_cuda_kernels.
void ask_about_cuda_kernels(pybind11::function answer) {
  static pybind11::function& kept = *new pybind11::function;
  kept = std::move(answer);
  rf::ask_about_cuda_kernels = [](int device) {
    pybind11::gil_scoped_acquire gil;
    kept(device);
  };
}

pybind11::dict memory_stats() {
  const rf::LargeBuffers now = rf::large_buffers();
  pybind11::dict stats;
  stats["used_bytes"] = now.used_bytes;
  stats["kept_bytes"] = now.kept_bytes;
  stats["limit"] = now.limit;
  stats["reused"] = now.reused;
  stats["mapped"] = now.mapped;
  return stats;
}

// A list of types.h as a tuple.
template <size_t n>
pybind11::tuple names(const char* const (&list)[n]) {
  return pybind11::tuple(pybind11::cast(std::vector<const char*>(list, list + n)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TORCH") = TORCH_VERSION;
  m.attr("DTYPES") = names(rf::kDTypeNames);
  m.attr("ACTIVATIONS") = names(rf::kActivationNames);
  m.attr("FAMILIES") = names(rf::kFamilyNames);
  m.def("ask_about_subclasses", ask_about_subclasses);
  m.attr("CUDA_OPS") = names(rf::kCudaOps);
  std::vector<std::string> classes;
  for (int c = 0; c < rf::kRowClasses; ++c) classes.push_back(rf::row_class_name(c));
  m.attr("CUDA_ROW_OPS") = names(rf::kRowOps);
  m.attr("CUDA_ROW_CLASSES") = pybind11::tuple(pybind11::cast(classes));
  m.def("ask_about_cuda_kernels", ask_about_cuda_kernels);
  m.def("use_cuda_kernels", rf::use_cuda_kernels, pybind11::arg("device"), pybind11::arg("ops"),
        pybind11::arg("choices"), "From now on these ops' kernels are in use on a CUDA device, and no others.");
  m.def("cuda_kernels_in_use", rf::cuda_kernels_in_use, pybind11::arg("op"), pybind11::arg("device"));
  m.def(
      "multiplies_pairs", [] { return rf::kernels().pairs != nullptr; },
      "Whether products of bfloat16 are those of pairs, whose factors are all rounded to it.");
  m.def("isa", [] { return std::string(rf::kernels().isa); }, "The instruction set whose kernels are in use.");
  m.def("isas", isas, "The instruction sets whose kernels were built and run on this CPU, best first.");
  m.def("memory_stats", memory_stats);
  m.def("release_memory", rf::release_large_buffers);
  m.def("limit_memory", rf::limit_large_buffers);
  m.def("linear_cross_entropy_plan", linear_cross_entropy_plan);
  m.def("linear_cross_entropy_budget", linear_cross_entropy_budget, pybind11::arg("chunk"), pybind11::arg("features"),
        pybind11::arg("classes"), pybind11::arg("dtype"), pybind11::arg("cuda") = false);
  rf::add_direct_calls(m);
  rf::add_trace_functions(m);
  m.def("build_info", build_info, "What was built, against which torch, and what runs here.");
  m.def(
      "fma_gflops", [](double seconds) { return rf::kernels().fma_gflops(seconds); }, pybind11::arg("seconds"),
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Measured float32 fma rate of the calling thread with the ISA in use, GFLOP/s.");
}
