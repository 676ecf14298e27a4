// Every access of a kernel's thread is checked: which memory it is to, and whose.
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "machine.h"

namespace cuda_on_host {
namespace {

constexpr int kPoison = 0xff;  // a NaN in every floating-point type, -1 in every integer
constexpr int64_t kDynamicAlignment = 1024;

// ---- buffers on the device -----------------------------------------------------------------------------------------

struct Buffer {
  uintptr_t begin, end;
  bool writable;
};
std::vector<Buffer> buffers;  // by address, apart from one another
std::mutex buffers_mutex;
size_t last_found = 0;

size_t first_buffer_after(uintptr_t p) {
  return std::upper_bound(buffers.begin(), buffers.end(), p, [](uintptr_t x, const Buffer& b) { return x < b.begin; }) -
         buffers.begin();
}

const Buffer* buffer_with(uintptr_t p) {
  if (last_found < buffers.size() &&
      p - buffers[last_found].begin < buffers[last_found].end - buffers[last_found].begin)
    return &buffers[last_found];
  const size_t after = first_buffer_after(p);
  if (after == 0 || p >= buffers[after - 1].end) return nullptr;
  last_found = after - 1;
  return &buffers[last_found];
}

// "8 bytes at 4 past the end of a buffer of 400"
std::string where_outside(uintptr_t p, int64_t bytes) {
  const size_t after = first_buffer_after(p);
  char text[160];
  const uintptr_t past = after > 0 ? p - buffers[after - 1].end : ~uintptr_t(0);
  const uintptr_t before = after < buffers.size() ? buffers[after].begin - p : ~uintptr_t(0);
  if (after > 0 && p < buffers[after - 1].end)
    std::snprintf(text, sizeof text, "%lld bytes at %lld of a buffer of %lld", (long long)bytes,
                  (long long)(p - buffers[after - 1].begin),
                  (long long)(buffers[after - 1].end - buffers[after - 1].begin));
  else if (past == ~uintptr_t(0) && before == ~uintptr_t(0))
    std::snprintf(text, sizeof text, "%lld bytes at %p, and there are no buffers", (long long)bytes, (void*)p);
  else if (past <= before)
    std::snprintf(text, sizeof text, "%lld bytes at %lld past the end of a buffer of %lld", (long long)bytes,
                  (long long)past, (long long)(buffers[after - 1].end - buffers[after - 1].begin));
  else
    std::snprintf(text, sizeof text, "%lld bytes at %lld before a buffer of %lld", (long long)bytes, (long long)before,
                  (long long)(buffers[after].end - buffers[after].begin));
  return text;
}

// ---- this module's own data ----------------------------------------------------------------------------------------

// Its thread-local memory is the kernels' static shared memory: nothing in the emulator but this lives there.
thread_local char fixed_anchor;

struct Module {
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  char* fixed = nullptr;
  int64_t fixed_bytes = 0;
} module_data;

int look_at_module(dl_phdr_info* info, size_t, void*) {
  const uintptr_t self = (uintptr_t)&look_at_module;
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  bool mine = false;
  char* fixed = nullptr;
  int64_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type == PT_LOAD) {
      const uintptr_t begin = info->dlpi_addr + h.p_vaddr;
      segments.push_back({begin, begin + h.p_memsz});
      mine = mine || (begin <= self && self < begin + h.p_memsz);
    } else if (h.p_type == PT_TLS) {
      fixed = (char*)info->dlpi_tls_data;
      bytes = (int64_t)h.p_memsz;
    }
  }
  if (!mine) return 0;
  module_data = {segments, fixed, bytes};
  return 1;
}

bool inside_stack(const Thread& t, const void* p) {
  return (uintptr_t)p - (uintptr_t)t.fiber->stack < (uintptr_t)kStackBytes;
}

}  // namespace

void check_access(const void* p, int64_t bytes, Access access, const void* address) {
  Thread& t = *machine.current;
  if (inside_stack(t, p)) return note_stack_access(t, (const char*)p, bytes, address);
  step(t);
  Block& b = *t.block;
  const auto check = [&](Block& owner, SharedRange& range) {
    SharedAccess shared = {view_of(t), now(t), access, address};
    check_shared(shared, owner, range, (const char*)p, bytes);
  };
  if (b.dynamic.contains(p)) return check(b, b.dynamic);
  if (b.fixed.contains(p)) return check(b, b.fixed);
  for (Block& other : machine.blocks)
    if (other.dynamic.contains(p)) {
      if (other.live == 0) fault(Kind::out_of_bounds, "shared memory of a block that has ended", address);
      return check(other, other.dynamic);
    }
  check_global(p, bytes, access, address);
}

void check_global(const void* p, int64_t bytes, Access access, const void* address) {
  const uintptr_t at = (uintptr_t)p;
  Buffer found = {0, 0, false};
  {
    // A fault leaves this function without unwinding it, so none is found while the lock is held.
    const std::lock_guard<std::mutex> lock(buffers_mutex);
    if (const Buffer* b = buffer_with(at)) found = *b;
  }
  if (at + (uintptr_t)bytes <= found.end) {
    if (access == Access::read || found.writable) return;
    fault(Kind::read_only, "a write to an input, at byte " + std::to_string(at - found.begin), address);
  }
  const Launch& l = *machine.launch;
  if (access == Access::read) {
    if (at - (uintptr_t)l.parameters < l.parameter_bytes) return;
    for (const auto& s : module_data.segments)
      if (s.first <= at && at < s.second) return;
  }
  std::string text = std::string(access == Access::read ? "read" : "write") + " out of bounds: ";
  for (const Thread& other : machine.threads)
    if (inside_stack(other, p)) fault(Kind::out_of_bounds, text + "a local variable of another thread", address);
  fault(Kind::out_of_bounds, text + where_outside(at, bytes), address);
}

void add_buffer(const void* p, size_t bytes, bool writable) {
  if (bytes == 0) return;
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  const Buffer added = {(uintptr_t)p, (uintptr_t)p + bytes, writable};
  buffers.insert(buffers.begin() + (long)first_buffer_after(added.begin), added);
}

void remove_buffer(const void* p) {
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  const size_t after = first_buffer_after((uintptr_t)p);
  if (after > 0 && buffers[after - 1].begin == (uintptr_t)p) buffers.erase(buffers.begin() + (long)after - 1);
}

void prepare_memory(int64_t shared_bytes, int cluster) {
  fixed_anchor = 0;  // so that this thread has its copy
  dl_iterate_phdr(look_at_module, nullptr);
  static std::vector<std::vector<char>> memory;
  memory.resize(std::max<size_t>(memory.size(), (size_t)cluster));
  for (int rank = 0; rank < cluster; ++rank) {
    Block& b = machine.blocks[rank];
    // Unused space all around, so that an index just out of range does not meet another block's memory.
    const int64_t wanted = shared_bytes + 4 * kDynamicAlignment;
    if ((int64_t)memory[rank].size() < wanted) memory[rank].resize(wanted);
    const uintptr_t base = (uintptr_t)memory[rank].data() + kDynamicAlignment;
    b.dynamic.begin = (char*)((base + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment);
    b.dynamic.bytes = shared_bytes;
    b.dynamic.cells.resize(shared_bytes);
    b.fixed.begin = module_data.fixed;
    b.fixed.bytes = module_data.fixed_bytes;
    b.fixed.cells.resize(module_data.fixed_bytes);
    b.fixed_data.assign(cluster > 1 ? module_data.fixed_bytes : 0, 0);
  }
}

void start_block_memory(Block& b) { std::memset(b.dynamic.begin, kPoison, b.dynamic.bytes); }

void load_fixed(Block& b) {
  if (machine.loaded == &b) return;
  if (machine.loaded && !machine.loaded->fixed_data.empty())
    std::memcpy(machine.loaded->fixed_data.data(), b.fixed.begin, b.fixed.bytes);
  if (!b.fixed_data.empty()) std::memcpy(b.fixed.begin, b.fixed_data.data(), b.fixed.bytes);
  machine.loaded = &b;
}

void* dynamic_shared() { return machine.current->block->dynamic.begin; }

char* same_place(const Block& other, const void* p) {
  return other.dynamic.begin + ((const char*)p - machine.current->block->dynamic.begin);
}

Block& block_of_cluster(unsigned rank, const char* what, Site site) {
  if (rank >= machine.blocks.size())
    fault(Kind::out_of_bounds, std::string(what) + ": a rank beyond the cluster", site);
  Block& b = machine.blocks[rank];
  if (b.live == 0) fault(Kind::out_of_bounds, std::string(what) + ": shared memory of a block that has ended", site);
  return b;
}

void* cluster_map(void* shared, unsigned rank, Site site) {
  if (rank >= machine.blocks.size()) fault(Kind::out_of_bounds, "cluster_map: a rank beyond the cluster", site);
  if (!machine.current->block->dynamic.contains(shared))
    fault(Kind::out_of_bounds, "cluster_map: a pointer that is not to dynamic shared memory", site);
  return same_place(machine.blocks[rank], shared);
}

AtomicAccess::AtomicAccess(void* p, size_t size) : memory(p), size(size) {
  if (!running()) return;
  if ((uintptr_t)p % size) fault(Kind::misaligned, "an atomic operation", __builtin_return_address(0));
  check_access(p, (int64_t)size, Access::atomic, __builtin_return_address(0));
}
void AtomicAccess::load(void* value) { std::memcpy(value, memory, size); }
void AtomicAccess::store(const void* value) { std::memcpy(memory, value, size); }

}  // namespace cuda_on_host
