// Which way each call took: for REGFAST_VERBOSE=1, which prints it, and for the tests, which demand it. A record is
// made by what decides or computes, never beside it. While nobody listens, a call costs one load of a global.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "shared/flat.h"

namespace rf {

struct CallRecord {
  std::string op;       // of the schema: the public one where the composite stands in for it
  std::string tensors;  // "float32[200, 96], float32[700, 96]"
  std::string path;     // "kernels"; "aten": kernels, but products by ATen; "composite"
  std::string by;       // the kernels' instruction set or architecture
  std::string why;      // it is not ours alone
};

namespace trace {

extern std::atomic<int> listeners;
inline bool on() { return listeners.load(std::memory_order_relaxed) != 0; }

using Tensors = std::vector<const at::Tensor*>;
std::string described(const Tensors& tensors);
void add(CallRecord record);
void composite(const char* op, const Tensors& tensors, std::string why);

// Lives as long as an op's kernels run; the products that ATen takes over meanwhile, on this thread, belong to it.
class Kernels {
 public:
  Kernels(const char* op, const Tensors& tensors, std::string by);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

 private:
  friend void product_by_aten(at::ScalarType, int64_t, int64_t, int64_t, const char*);
  CallRecord record;
  int64_t products = 0;
  Kernels* outer;
};
void product_by_aten(at::ScalarType type, int64_t m, int64_t n, int64_t k, const char* why);

// For listeners: every call between two marks, on all threads.
int64_t begin();
std::vector<CallRecord> end(int64_t mark);
void print_calls();

inline void collect(Tensors& all, const at::Tensor& t) {
  if (t.defined()) all.push_back(&t);
}
inline void collect(Tensors& all, const std::optional<at::Tensor>& t) {
  if (t.has_value()) collect(all, *t);
}
template <class T>
void collect(Tensors&, const T&) {}

// An op's implementation, with a record of each call.
template <auto fn, class = decltype(fn)>
struct Traced;
template <auto fn, class Result, class... Arguments>
struct Traced<fn, Result (*)(Arguments...)> {
  static inline const char* op;
  static inline std::string (*by)(const at::Tensor&);  // null: the composite, under vmap

  static Result call(Arguments... arguments) {
    if (!on()) return fn(std::forward<Arguments>(arguments)...);
    Tensors tensors;
    (collect(tensors, arguments), ...);
    if (!by) {
      composite(op, tensors, "vmap");
      return fn(std::forward<Arguments>(arguments)...);
    }
    const Kernels record(op, tensors, by(*tensors.front()));
    return fn(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace trace

// An op's function as it is registered, with a record of each call; `by` names what runs, and is null where the
// composite does.
template <auto fn>
auto traced(const char* op, std::string (*by)(const at::Tensor&)) {
  using Traced = trace::Traced<flat<fn>()>;
  Traced::op = op;
  Traced::by = by;
  return &Traced::call;
}
template <auto fn>
void register_kernels(torch::Library& m, const char* op, std::string (*by)(const at::Tensor&)) {
  m.impl(op, traced<fn>(op, by));
}

}  // namespace rf
