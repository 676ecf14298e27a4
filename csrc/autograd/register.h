// How an op's functions above the kernels reach the dispatcher: in a TORCH_LIBRARY_FRAGMENT at the end of its file.
#pragma once
#include "shared/torch_api.h"

namespace rf {

// Registers an op: `call`, which records what autograd needs or, under no key of autograd's, calls the kernels;
// `batched`, the composite, for torch.func.vmap; and `autocast`, where there is one.
template <auto call, auto batched, auto autocast = nullptr>
void register_op(torch::Library& m, const char* name) {
  using c10::DispatchKey;
  m.impl(name, torch::dispatch(DispatchKey::Autograd, flat<call>()));
  m.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, flat<call>()));
  m.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, traced<batched>(name, nullptr)));
  if constexpr (!std::is_null_pointer_v<decltype(autocast)>)
    for (const auto key : {DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA})
      m.impl(name, torch::dispatch(key, flat<autocast>()));
}

// Registers what gives an op's results their shapes and types alone.
template <auto fn>
void register_meta(torch::Library& m, const char* name) {
  m.impl(name, torch::dispatch(c10::DispatchKey::Meta, flat<fn>()));
}

// Autocast in a call with `input`: off for as long as this lives, which casts the tensors that it is called with.
class Autocast {
 public:
  Autocast(const Tensor& input, at::ScalarType to) : type(to), device(input.device().type()) {}
  explicit Autocast(const Tensor& input) : Autocast(input, at::autocast::get_autocast_dtype(input.device().type())) {}

  const at::ScalarType type;
  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(type, t, device); }
  OptionalTensor operator()(const OptionalTensor& t) const { return at::autocast::cached_cast(type, t, device); }

 private:
  const c10::DeviceType device;
  const c10::impl::ExcludeDispatchKeyGuard off{at::autocast::get_autocast_dispatch_key_from_device_type(device)};
};

}  // namespace rf
