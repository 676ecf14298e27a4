// Every op's schema, one line each, and the Python module: what was built and what runs here. Ops named composite_* are
// implemented in Python by reference.py and serve the derivatives that have no kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "cpu/drivers/drivers.h"
#include "cpu/drivers/linear_cross_entropy.h"
#include "shared/chunks.h"
#include "shared/torch_api.h"
#include "shared/trace_module.h"

#define RF_CROSS_ENTROPY_OPTIONS \
  "int ignore_index, int reduction, float label_smoothing, float z_loss, float? softcap, float? logit_scale"
#define RF_CROSS_ENTROPY_GRADS "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_logprob"
#define RF_CROSS_ENTROPY_SAVED "Tensor target, Tensor? weight, Tensor stats, Tensor weight_sum"
#define RF_LINEAR_CROSS_ENTROPY \
  "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
#define RF_BUDGET "int? memory_budget"
#define RF_LINEAR_NLL                                                                                \
  "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? scale, Tensor? sample_weight, " \
  "int family, float variance, bool full, int reduction"
#define RF_PHM_LINEAR "Tensor input, Tensor a, Tensor s, Tensor? bias"

TORCH_LIBRARY(regfast, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor "
      "output, Tensor preactivation)");
  m.def(
      "linear_backward(Tensor grad, Tensor? input, Tensor? weight, Tensor? saved, str activation, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("composite_linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");

  m.def("phm_linear(" RF_PHM_LINEAR ", str activation) -> Tensor");
  m.def("phm_linear_forward(" RF_PHM_LINEAR
        ", str activation, bool save_preactivation) -> (Tensor output, Tensor preactivation)");
  m.def(
      "phm_linear_backward(Tensor grad, Tensor? input, Tensor a, Tensor s, Tensor? saved, str activation, bool[4] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_phm_linear(" RF_PHM_LINEAR ", str activation) -> Tensor");

  m.def("softmax(Tensor input, int dim, bool log) -> Tensor");
  m.def("softmax_forward(Tensor input, int dim, bool log) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor output, int dim, bool log) -> Tensor");
  m.def("composite_softmax(Tensor input, int dim, bool log) -> Tensor");

  m.def("logsumexp(Tensor input, int dim, bool keepdim) -> Tensor");
  m.def("logsumexp_forward(Tensor input, int dim, bool keepdim) -> Tensor");
  m.def("logsumexp_backward(Tensor grad, Tensor input, Tensor lse, int dim) -> Tensor");
  m.def("composite_logsumexp(Tensor input, int dim, bool keepdim) -> Tensor");

  m.def("cross_entropy(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, bool inplace_backward, ScalarType? loss_dtype) -> Tensor[]");
  m.def("cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, ScalarType? loss_dtype) -> Tensor[]");
  m.def("cross_entropy_backward(" RF_CROSS_ENTROPY_GRADS ", Tensor input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", bool[2] output_mask) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward_(" RF_CROSS_ENTROPY_GRADS ", Tensor(a!) input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", bool grad_target) -> Tensor");
  // Loss and gradient from one read of the logits, on devices where that saves time; the gradient is that for an
  // upstream gradient of 1, and unless_one_ writes it again if that turns out to be another.
  m.def("cross_entropy_forward_backward(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", ScalarType? loss_dtype) -> (Tensor loss, Tensor stats, Tensor weight_sum, Tensor grad)");
  m.def("cross_entropy_backward_unless_one_(Tensor grad_loss, Tensor input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", Tensor(a!) grad) -> ()");
  m.def("composite_cross_entropy(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, ScalarType? loss_dtype) -> Tensor[]");

  m.def("linear_cross_entropy(" RF_LINEAR_CROSS_ENTROPY ", int outputs, " RF_BUDGET
        ", float filter_eps, ScalarType? loss_dtype) -> Tensor[]");
  m.def("linear_cross_entropy_forward(" RF_LINEAR_CROSS_ENTROPY ", int outputs, " RF_BUDGET
        ", ScalarType? loss_dtype) -> Tensor[]");
  // A reduced loss, and its gradients for an upstream gradient of 1, in the accumulator's type.
  m.def("linear_cross_entropy_forward_backward(" RF_LINEAR_CROSS_ENTROPY ", bool argmax, " RF_BUDGET
        ", float filter_eps, ScalarType? loss_dtype, bool[3] output_mask) -> (Tensor loss, Tensor argmax, Tensor, "
        "Tensor, Tensor)");
  m.def("linear_cross_entropy_backward(" RF_CROSS_ENTROPY_GRADS ", " RF_LINEAR_CROSS_ENTROPY ", " RF_BUDGET
        ", float filter_eps, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_linear_cross_entropy(" RF_LINEAR_CROSS_ENTROPY ", int outputs, ScalarType? loss_dtype) -> Tensor[]");

  // scale: a gaussian's variance, or bernoulli's pos_weight; variance: a gaussian's without scale.
  m.def("linear_nll(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");
  m.def("linear_nll_forward(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");
  // A reduced loss, and its gradients for an upstream gradient of 1, in the accumulator's type.
  m.def("linear_nll_forward_backward(" RF_LINEAR_NLL
        ", ScalarType? loss_dtype, bool[4] output_mask) -> (Tensor loss, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_nll_backward(Tensor grad, " RF_LINEAR_NLL ", bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_linear_nll(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");

  m.def("mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def("mse_loss_forward(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor grad, Tensor input, Tensor target, int reduction, bool[2] output_mask) -> (Tensor, "
      "Tensor)");
  m.def("composite_mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");
}

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto table = rf::available_kernels(); *table; ++table) names.push_back((*table)->isa);
  return names;
}

constexpr struct {
  const char* name;
  rf::DType dtype;
} kTypes[] = {{"float32", rf::DType::f32},
              {"float64", rf::DType::f64},
              {"bfloat16", rf::DType::bf16},
              {"float16", rf::DType::f16}};
rf::DType dtype_named(const std::string& name) {
  for (const auto& t : kTypes)
    if (name == t.name) return t.dtype;
  throw std::invalid_argument("a dtype with kernels: " + name);
}

// Who multiplies in linear, by dtype; gemm_by_aten has the rule.
pybind11::dict linear_products() {
  pybind11::dict who;
  for (const auto& t : kTypes) {
    const bool large = rf::gemm_by_aten(t.dtype, 4096, 4096, 4096), skinny = rf::gemm_by_aten(t.dtype, 4096, 8, 4096);
    who[t.name] = skinny ? "aten" : large ? "aten for large products, regfast for the others" : "regfast";
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

// The plan for a reduced loss of class indices with all gradients: rows of a chunk, the bytes that it takes, the
// budget. Without one it is the default of the CPU, or of a CUDA device of so much memory.
std::tuple<int64_t, int64_t, int64_t> linear_cross_entropy_plan(int64_t rows, int64_t features, int64_t classes,
                                                                const std::string& type, bool cuda,
                                                                std::optional<int64_t> budget, int64_t memory) {
  if (!budget) budget = cuda ? rf::cuda_default_memory_budget(memory) : rf::default_memory_budget();
  const rf::LinearCrossEntropySize size = {dtype_named(type), rows, features, classes, 1, 1, *budget};
  return cuda ? std::tuple{rf::cuda_chunk_rows(size), rf::cuda_peak_bytes(size), *budget}
              : std::tuple{rf::chunk_rows(size), rf::peak_bytes(size), *budget};
}

// The budget that makes chunks of so many rows.
int64_t linear_cross_entropy_budget(int64_t chunk, int64_t features, int64_t classes, const std::string& type,
                                    bool cuda) {
  const rf::LinearCrossEntropySize size = {dtype_named(type), chunk, features, classes, 1, 1, 0};
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("ask_about_subclasses", ask_about_subclasses);
  m.def("isa", [] { return std::string(rf::kernels().isa); }, "The instruction set whose kernels are in use.");
  m.def("isas", isas, "The instruction sets whose kernels were built and run on this CPU, best first.");
  m.def("linear_cross_entropy_plan", linear_cross_entropy_plan);
  m.def("linear_cross_entropy_budget", linear_cross_entropy_budget, pybind11::arg("chunk"), pybind11::arg("features"),
        pybind11::arg("classes"), pybind11::arg("dtype"), pybind11::arg("cuda") = false);
  rf::add_trace_functions(m);
  m.def("build_info", build_info, "What was built, against which torch, and what runs here.");
  m.def(
      "fma_gflops", [](double seconds) { return rf::kernels().fma_gflops(seconds); }, pybind11::arg("seconds"),
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Measured float32 fma rate of the calling thread with the ISA in use, GFLOP/s.");
}
