// torch, as the ops of each device and the autograd files see it. trace.h, which it brings along, has the rest. It is
// the first include of each .cpp that sees torch, since g++ takes a header that is compiled before (setup.py) only
// there.
#pragma once
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/autograd.h>
#include <torch/library.h>

#include <string_view>

#include "shared/cuda_kernels.h"
#include "shared/flat.h"
#include "shared/trace.h"
#include "shared/types.h"

namespace rf {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using std::string_view;

inline bool has_kernel(at::ScalarType t) {
#define RF_IS(name, type, python, torch, with) t == at::ScalarType::torch ||
  return RF_EACH_DTYPE(RF_IS, ) false;
#undef RF_IS
}
inline DType dtype_of(at::ScalarType t) {
#define RF_IF(name, type, python, torch, with) t == at::ScalarType::torch ? DType::name:
  return RF_EACH_DTYPE(RF_IF, ) DType::f32;
#undef RF_IF
}
inline at::ScalarType acc_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// A tensor in another type; itself, without a dispatch, in its own.
inline Tensor as_type(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// Rows of a tensor; itself, without a dispatch, where they are all.
inline Tensor rows_from(const Tensor& t, int64_t begin, int64_t rows) {
  return rows == t.size(0) ? t : t.narrow(0, begin, rows);
}

// Of a linear model's loss: what is asked for, or what input promotes to with a floating target.
inline at::ScalarType loss_type(const Tensor& input, const Tensor& target, OptionalType asked) {
  if (asked) return *asked;
  const bool floating = at::isFloatingType(target.scalar_type());
  return floating ? c10::promoteTypes(input.scalar_type(), target.scalar_type()) : input.scalar_type();
}

// Whether a torch.func transform is active: it keeps this key on its thread from the first layer to the last.
inline bool inside_transform() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether an op has kernels, in use, where a tensor lies.
inline bool device_has_kernels(const char* op, const Tensor& t) {
  return t.is_cpu() || t.is_meta() || (t.is_cuda() && cuda_kernels_in_use(op, t.device().index()));
}

// Whether a Python subclass with a dispatch of its own knows torch's operators alone (MaskedTensor, quantized weights):
// set by module.cpp, which can ask Python.
inline bool (*subclass_takes_composite)(const Tensor&) = nullptr;

// Sparse, nested and mkldnn tensors, and subclasses that stand for something else than their elements: what they mean
// to an op, if anything, is what torch's own operators make of them. Some of them have no sizes that could be checked.
// A caller follows the answer, which is on record where it is yes.
inline bool any_unusual(const char* op, std::initializer_list<const Tensor*> tensors) {
  const auto yes = [&](const char* why) {
    if (trace::on()) trace::composite(op, tensors, why);
    return true;
  };
  for (const Tensor* t : tensors) {
    if (!t->defined()) continue;
    if (t->layout() != at::kStrided || t->is_nested()) return yes("a tensor without strides");
    if (t->unsafeGetTensorImpl()->is_python_dispatch() && subclass_takes_composite && subclass_takes_composite(*t))
      return yes("a subclass that knows torch's operators alone");
  }
  return false;
}

// Whether a call has to take the plain composite: for a reason of the op's own, inside a torch.func transform, with a
// forward-mode tangent, for a dtype without kernels, on a device that has none, or for tensors that are no plain
// memory.
inline bool takes_composite(const char* op, std::initializer_list<const Tensor*> tensors,
                            const char* special = nullptr) {
  const auto yes = [&](const auto&... why) {
    if (trace::on()) trace::composite(op, tensors, c10::str(why...));
    return true;
  };
  if (special) return yes(special);
  if (inside_transform()) return yes("torch.func transform");
  if (any_unusual(op, tensors)) return true;
  for (const Tensor* t : tensors) {
    if (!t->defined()) continue;
    if (t->_fw_grad(0).defined()) return yes("forward-mode tangent");
    if (!device_has_kernels(op, *t)) return yes("no kernels in use on ", t->device());
  }
  const auto type = (*tensors.begin())->scalar_type();
  return !has_kernel(type) && yes(c10::getDtypeNames(type).first, " has no kernel");
}

// Whether rows along `dim` are PyTorch's on the CUDA device where they lie, on which the op's kernels are in use: the
// proof has found PyTorch's own to be faster for their class. On record where it is so; of sizes that only a run will
// tell, the kernels are ours.
inline bool rows_by_aten(const char* op, const Tensor& x, int64_t dim) {
  if (!x.is_cuda() || x.dim() == 0 || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  const int64_t classes = x.size(dim), between = std::abs(x.stride(dim)), device = x.device().index();
  if (x.numel() == 0) return false;
  bool apart = false;  // other rows' elements lie nearer than those of the same row
  for (int64_t d = 0; d < x.dim(); ++d)
    apart = apart || (classes > 1 && x.size(d) > 1 && x.stride(d) != 0 && std::abs(x.stride(d)) < between);
  const int which = row_class(x.numel() / classes, classes * x.element_size(), apart);
  if (!cuda_rows_by_aten(op, (int)device, which)) return false;
  if (trace::on())
    trace::composite(op, {&x}, "PyTorch's kernels are faster here for rows of class " + row_class_name(which));
  return true;
}

inline bool any_requires_grad(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* t : tensors)
    if (t->defined() && t->requires_grad()) return true;
  return false;
}

inline const Tensor& value_or_undefined(const OptionalTensor& t) {
  static const Tensor undefined;
  return t.has_value() ? *t : undefined;
}
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// A backward that others differentiate (create_graph = true) or map over (torch.func, is_grads_batched) goes through
// the composite, whose own derivatives and batching rules are torch's.
inline bool backward_takes_composite(const char* op, std::initializer_list<const Tensor*> tensors) {
  const bool create_graph = at::GradMode::is_enabled();
  if (!create_graph && !inside_transform()) return false;
  if (trace::on()) trace::composite(op, tensors, create_graph ? "create_graph" : "torch.func transform");
  return true;
}

// Gradients of composite(inputs), with their own graph under create_graph. Each input takes part under an alias, so
// that one tensor passed twice gets the gradient of each of its places.
template <class F>
inline std::vector<Tensor> composite_gradients(std::vector<Tensor> inputs, const std::vector<Tensor>& grads,
                                               F&& composite) {
  const bool create_graph = at::GradMode::is_enabled();
  at::AutoGradMode record(true);
  std::vector<Tensor> sources;
  std::vector<size_t> places;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].defined() || !inputs[i].requires_grad()) continue;
    inputs[i] = inputs[i].view_as(inputs[i]);
    sources.push_back(inputs[i]);
    places.push_back(i);
  }
  std::vector<Tensor> outputs = composite(inputs), roots, root_grads, result(inputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
    roots.push_back(outputs[i]);
    root_grads.push_back(grads[i]);
  }
  if (roots.empty()) return result;
  auto computed = torch::autograd::grad(roots, sources, root_grads, /*retain_graph=*/true, create_graph,
                                        /*allow_unused=*/true);
  for (size_t i = 0; i < places.size(); ++i) result[places[i]] = computed[i];
  return result;
}

}  // namespace rf
