// torch.ops matches arguments with a schema, boxes them and unboxes them: more than a small loss takes. A function here
// has its op's arguments as C++ has them. It answers None where anything is not plain (a subclass or another kind of
// number among the arguments, a __torch_function__ mode, a trace of torch.jit), and torch.ops is asked then, which
// knows what to do, or what to say. Modes and transforms that the dispatcher has are met there.
#include "shared/torch_api.h"

#include "direct_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

#include "shared/op_arguments.h"

namespace rf {
namespace {

bool take(PyObject* given, Tensor& to) {
  if (!THPVariable_CheckExact(given)) return false;
  to = THPVariable_Unpack(given);
  return true;
}
bool take(PyObject* given, bool& to) {
  to = given == Py_True;
  return PyBool_Check(given);
}
bool take(PyObject* given, int64_t& to) {
  if (!PyLong_CheckExact(given)) return false;
  int overflow;
  to = PyLong_AsLongLongAndOverflow(given, &overflow);
  return !overflow;
}
bool take(PyObject* given, double& to) {
  if (!PyFloat_CheckExact(given)) return false;
  to = PyFloat_AS_DOUBLE(given);
  return true;
}
bool take(PyObject* given, at::ScalarType& to) {
  if (!THPDtype_Check(given)) return false;
  to = reinterpret_cast<THPDtype*>(given)->scalar_type;
  return true;
}
bool take(PyObject* given, string_view& to) {  // the string lives as long as the caller's reference to it
  if (!PyUnicode_CheckExact(given)) return false;
  Py_ssize_t size;
  const char* const data = PyUnicode_AsUTF8AndSize(given, &size);
  if (!data) PyErr_Clear();
  to = string_view(data, data ? size : 0);
  return data;
}
template <class T>
bool take(PyObject* given, std::optional<T>& to) {
  return given == Py_None || take(given, to.emplace());
}

PyObject* wrapped(Tensor&& t) { return THPVariable_Wrap(std::move(t)); }
PyObject* wrapped(std::vector<Tensor>&& tensors) {
  auto all = THPObjectPtr(PyTuple_New((Py_ssize_t)tensors.size()));
  if (!all) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i) PyTuple_SET_ITEM(all.get(), i, wrapped(std::move(tensors[i])));
  return all.release();
}

template <class Result, class... Arguments, size_t... i>
PyObject* call(const c10::TypedOperatorHandle<Result(Arguments...)>& op, PyObject* const* given, Py_ssize_t count,
               std::index_sequence<i...>) {
  HANDLE_TH_ERRORS
  std::tuple<std::decay_t<Arguments>...> arguments;
  const bool plain = count == (Py_ssize_t)sizeof...(i) && !at::impl::torch_function_mode_enabled() &&
                     !torch::jit::tracer::isTracing() && (take(given[i], std::get<i>(arguments)) && ...);
  if (!plain) Py_RETURN_NONE;
  auto result = [&] {
    const pybind11::gil_scoped_release others_run;
    return op.call(std::get<i>(arguments)...);
  }();
  return wrapped(std::move(result));
  END_HANDLE_TH_ERRORS
}

template <class Result, class... Arguments>
PyObject* call(const c10::TypedOperatorHandle<Result(Arguments...)>& op, PyObject* const* given, Py_ssize_t count) {
  return call(op, given, count, std::index_sequence_for<Arguments...>());
}
template <class Signature, class Inner>
PyObject* call(const Op<Signature, Inner>& op, PyObject* const* given, Py_ssize_t count) {
  return call(op.inner, given, count);
}

#define RF_DIRECT(name, ...)                                            \
  PyObject* name(PyObject*, PyObject* const* given, Py_ssize_t count) { \
    static const auto op = find_op<__VA_ARGS__>("regfast::" #name);     \
    return call(op, given, count);                                      \
  }
RF_DIRECT(linear, Tensor(const Tensor&, const Tensor&, const OptionalTensor&, string_view))
RF_DIRECT(phm_linear, Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, string_view))
RF_DIRECT(softmax, Tensor(const Tensor&, int64_t, bool))
RF_DIRECT(logsumexp, Tensor(const Tensor&, int64_t, bool))
RF_DIRECT(cross_entropy,
          std::vector<Tensor>(const CrossEntropyOperands&, const CrossEntropyOptions&, int64_t, bool, OptionalType))
RF_DIRECT(linear_cross_entropy, std::vector<Tensor>(const LinearCrossEntropyOperands&, const CrossEntropyOptions&,
                                                    int64_t, std::optional<int64_t>, double, OptionalType))
RF_DIRECT(linear_nll, Tensor(const LinearNllOperands&, const LinearNllOptions&, OptionalType))
RF_DIRECT(mse_loss, Tensor(const Tensor&, const Tensor&, int64_t))
#undef RF_DIRECT

// For the dispatchers of accelerate(), is_left(table, input, *others): whether a call is left to torch by its size
// alone, so that nothing else has to be asked in Python. The table has for a dtype how many elements input has at
// least where ours wins, or, as the first of a tuple, how many multiplications its product with the rows of the first
// other tensor takes. False where anything is not plain, or autocast may change its type.
PyObject* is_left(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 2 || !PyDict_CheckExact(given[0]) || at::impl::torch_function_mode_enabled() ||
      torch::jit::tracer::isTracing() || at::autocast::is_autocast_enabled(at::kCPU))
    Py_RETURN_FALSE;
  for (Py_ssize_t i = 1; i < count; ++i)
    if (!THPVariable_CheckExact(given[i]) && (i == 1 || given[i] != Py_None)) Py_RETURN_FALSE;
  const Tensor& input = THPVariable_Unpack(given[1]);
  PyObject* const dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(input.scalar_type()));
  PyObject* least = PyDict_GetItemWithError(given[0], dtype);
  int64_t elements = input.numel();
  if (count > 2 && least && PyTuple_Check(least)) {
    least = PyTuple_GetItem(least, 0);
    const Tensor& weight = THPVariable_Unpack(given[2]);
    elements *= weight.dim() == 2 ? weight.size(0) : weight.numel();
  }
  if (PyErr_Occurred()) throw python_error();
  return PyBool_FromLong(!least || elements < PyLong_AsLongLong(least));
  END_HANDLE_TH_ERRORS
}

#define RF_METHOD(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    RF_METHOD(linear),        RF_METHOD(phm_linear),           RF_METHOD(softmax),    RF_METHOD(logsumexp),
    RF_METHOD(cross_entropy), RF_METHOD(linear_cross_entropy), RF_METHOD(linear_nll), RF_METHOD(mse_loss),
    RF_METHOD(is_left),       {nullptr, nullptr, 0, nullptr}};
#undef RF_METHOD

}  // namespace

void add_direct_calls(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace rf
