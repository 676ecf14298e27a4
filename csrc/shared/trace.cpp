#include "shared/torch_api.h"

#include "shared/trace.h"

#include <cstdio>
#include <mutex>

namespace rf::trace {

std::atomic<int> listeners{0};

namespace {

// The records of the listeners that there are; forgotten when the last one ends.
struct State {
  std::mutex mutex;
  std::vector<CallRecord> records;
  int recording = 0;
  bool printing = false;
} state;

thread_local Kernels* innermost = nullptr;

std::string name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

}  // namespace

std::string described(const Tensors& tensors) {
  std::string all;
  for (const at::Tensor* t : tensors) {
    if (!t->defined()) continue;
    if (!all.empty()) all += ", ";
    all += name(t->scalar_type()) + (t->is_nested() ? "[nested]" : c10::str(t->sym_sizes()));
  }
  return all;
}

void add(CallRecord record) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.printing) {
    const std::string by = record.by.empty() ? "" : " of " + record.by;
    const std::string way = record.path == "composite" ? "composite" : "kernels" + by;
    const std::string line = "regfast." + record.op + "(" + record.tensors + "): " + way +
                             (record.why.empty() ? "" : ": " + record.why) + "\n";
    std::fputs(line.c_str(), stderr);
  }
  if (state.recording) state.records.push_back(std::move(record));
}

void composite(const char* op, const Tensors& tensors, std::string why) {
  if (on()) add({op, described(tensors), "composite", "", std::move(why)});
}

Kernels::Kernels(const char* op, const Tensors& tensors, std::string by)
    : record{op, described(tensors), "kernels", std::move(by), ""}, outer(innermost) {
  innermost = this;
}
Kernels::~Kernels() {
  innermost = outer;
  if (products > 1) record.why += c10::str(" and ", products - 1, " more");
  add(std::move(record));
}

void product_by_aten(at::ScalarType type, int64_t m, int64_t n, int64_t k, const char* why) {
  if (!innermost) return;
  if (innermost->products++) return;
  innermost->record.path = "aten";
  innermost->record.why = c10::str("product by ATen: ", m, " x ", n, " x ", k, " ", name(type), ", ", why);
}

int64_t begin() {
  const std::lock_guard<std::mutex> lock(state.mutex);
  ++state.recording;
  listeners.fetch_add(1);
  return (int64_t)state.records.size();
}

std::vector<CallRecord> end(int64_t mark) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  std::vector<CallRecord> since(state.records.begin() + mark, state.records.end());
  listeners.fetch_sub(1);
  if (--state.recording == 0) state.records.clear();
  return since;
}

void print_calls() {
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.printing) return;
  state.printing = true;
  listeners.fetch_add(1);
}

}  // namespace rf::trace
