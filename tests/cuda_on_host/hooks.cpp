// The functions that the compiler calls at each load and store, in place of the sanitizers' own.
#include "machine.h"

using cuda_on_host::Access;
using cuda_on_host::Kind;

namespace {

void on_access(const void* p, int64_t bytes, Access access, const void* address) {
  if (cuda_on_host::running() && bytes > 0) cuda_on_host::check_access(p, bytes, access, address);
}

// As libubsan passes them.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct OutOfBoundsData {
  SourceLocation location;
  const void *array_type, *index_type;
};
struct TypeMismatchData {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

struct OverflowData {
  SourceLocation location;
  const void* type;
};

}  // namespace

extern "C" {

#define RF_HOOK(name, bytes, access) \
  void name(void* p) { on_access(p, bytes, access, __builtin_return_address(0)); }
#define RF_HOOKS(bytes)                                     \
  RF_HOOK(__tsan_read##bytes, bytes, Access::read)          \
  RF_HOOK(__tsan_write##bytes, bytes, Access::write)        \
  RF_HOOK(__tsan_volatile_read##bytes, bytes, Access::read) \
  RF_HOOK(__tsan_volatile_write##bytes, bytes, Access::write)
RF_HOOKS(1)
RF_HOOKS(2)
RF_HOOKS(4)
RF_HOOKS(8)
RF_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { on_access(p, (int64_t)n, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { on_access(p, (int64_t)n, Access::write, __builtin_return_address(0)); }
// The guard of a launcher's function-local static, and the table of products.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void __tsan_atomic8_store(volatile unsigned char* p, unsigned char v, int) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}

void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  const auto* d = (const OutOfBoundsData*)data;
  if (!cuda_on_host::running()) std::abort();
  cuda_on_host::fault(Kind::out_of_bounds, "index " + std::to_string((intptr_t)index) + " of an array",
                      cuda_on_host::Site{d->location.file, (int)d->location.line});
}

void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t p) {
  const auto* d = (const TypeMismatchData*)data;
  if (!cuda_on_host::running()) std::abort();
  cuda_on_host::fault(Kind::misaligned,
                      "an access that needs alignment to " + std::to_string(1 << d->log_alignment) + " bytes, at " +
                          std::to_string(p % (uintptr_t(1) << d->log_alignment)) + " beyond one",
                      cuda_on_host::Site{d->location.file, (int)d->location.line});
}

void __ubsan_handle_divrem_overflow(void* data, uintptr_t, uintptr_t) {
  const auto* d = (const OverflowData*)data;
  if (!cuda_on_host::running()) std::abort();
  cuda_on_host::fault(Kind::division, "an integer divided by zero",
                      cuda_on_host::Site{d->location.file, (int)d->location.line});
}

}  // extern "C"
