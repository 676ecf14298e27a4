// torch's own products on the CPU, aten::mm, addmm, bmm and baddbmm, by our GEMM: kernels that are put in the place of
// ATen's in torch's dispatcher, and taken out again, by accelerate(products=True). What is not ours, by its type, by
// its size or by tuning.h's table, goes on to ATen's kernels.
#include "shared/torch_api.h"

#include <ATen/ExpandUtils.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "cpu/ops/device.h"
#include "cpu/ops/products.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {

// Threads share the batches if there are enough, the matrices otherwise: a product within one of their tasks is
// computed by one thread. No tensor is touched there.
void multiply_batches(const Tensor& a, const Tensor& b, const Tensor& c, Sum sum) {
  const Tensor first_a = a.select(0, 0), first_b = b.select(0, 0);
  const DType dtype = dtype_of(product_type(a, b));
  GemmProblem g = gemm_problem(first_a, first_b, c.select(0, 0));
  g.accumulate = sum == Sum::next;
  const int64_t batches = a.size(0);
  const int64_t a_bytes = a.stride(0) * a.element_size(), b_bytes = b.stride(0) * b.element_size(),
                c_bytes = c.stride(0) * c.element_size();
  const auto product = [&](int64_t i) {
    GemmProblem mine = g;
    mine.a.data = (const char*)g.a.data + i * a_bytes;
    mine.b.data = (const char*)g.b.data + i * b_bytes;
    mine.c = (char*)g.c + i * c_bytes;
    gemm(dtype, mine);
  };
  const int64_t threads = thread_count();
  if (batches < threads || double(batches) * g.m * g.n * g.k < 2 * tuning::kProductsPerThread) {
    for (int64_t i = 0; i < batches; ++i) product(i);
    return;
  }
  take_tasks(batches, threads, product);
}

namespace {

// Multiplications of one product from which on it is ours, by dtype; negative: never.
std::array<std::atomic<int64_t>, 4> least;

bool is_ours(const Tensor& t) { return t.is_cpu() && t.layout() == at::kStrided && has_kernel(t.scalar_type()); }

// Matrices, or with `batches` batches of them, that fit one another and whose product is ours. Sizes that do not fit
// are left to ATen, which has words for them.
bool are_ours(const Tensor& a, const Tensor& b, int64_t batches = 0) {
  if (a.dim() != 2 + batches || b.dim() != 2 + batches || a.scalar_type() != b.scalar_type()) return false;
  if (!is_ours(a) || !is_ours(b) || a.size(-1) != b.size(-2) || (batches && a.size(0) != b.size(0))) return false;
  const int64_t m = a.size(-2), n = b.size(-1), k = a.size(-1);
  const DType dtype = dtype_of(a.scalar_type());
  const int64_t from = least[(int)dtype];
  if (a.numel() == 0 || b.numel() == 0 || from < 0 || m * n * k < from) return false;
  return !gemm_by_aten(dtype, m, n, k, is_by_columns(a.stride(-2), a.stride(-1)));
}

void multiply_any(const Tensor& a, const Tensor& b, const Tensor& c) {
  a.dim() == 2 ? multiply(Cpu(a), a, b, c) : multiply_batches(a, b, c);
}

std::vector<int64_t> sizes_of_product(const Tensor& a, const Tensor& b) {
  auto sizes = a.sizes().vec();
  sizes.back() = b.size(-1);
  return sizes;
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor c = empty_result(sizes_of_product(a, b), a.options());
  multiply_any(a, b, c);
  return c;
}

// beta * self + alpha * a b, rounded once.
Tensor sum(const Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  const bool plain = alpha.toDouble() == 1, ignored = beta.toDouble() == 0;
  if (plain && ignored) return product(a, b);
  if (plain && a.dim() == 2 && beta.toDouble() == 1 && self.numel() == b.size(1) && self.dim() > 0 &&
      self.size(-1) == b.size(1)) {
    Tensor c = empty_result(sizes_of_product(a, b), a.options());
    multiply(Cpu(a), a, b, c, self.reshape({b.size(1)}).contiguous());
    return c;
  }
  Tensor c = empty_result(sizes_of_product(a, b), a.options().dtype(acc_type(a.scalar_type())));
  multiply_any(a, b, c);
  if (!plain) c.mul_(alpha);
  if (!ignored) c.add_(self, beta);
  return c.to(a.scalar_type());
}

// Whether ATen's `out` is a place that ours can be copied to.
bool takes(const Tensor& out, const Tensor& a) { return is_ours(out) && out.scalar_type() == a.scalar_type(); }

bool takes_sum(const Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  return takes(self, a) && at::is_expandable_to(self.sizes(), sizes_of_product(a, b)) && !beta.isComplex() &&
         !alpha.isComplex();
}

Tensor& put(Tensor& out, const Tensor& result) {
  at::native::resize_output(out, result.sizes());
  return out.copy_(result);
}

// Straight into `out` where its rows are adjacent numbers and it shares no memory with the factors.
Tensor& product_out(const Tensor& a, const Tensor& b, Tensor& out) {
  const auto sizes = sizes_of_product(a, b);
  at::native::resize_output(out, sizes);
  const bool shares = out.storage().is_alias_of(a.storage()) || out.storage().is_alias_of(b.storage());
  if (shares || out.stride(-1) != 1 || !out.is_non_overlapping_and_dense()) return out.copy_(product(a, b));
  multiply_any(a, b, out);
  return out;
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (!are_ours(a, b)) return at::cpu::mm(a, b);
  const Record record("mm", {&a, &b});
  return product(a, b);
}
Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  if (!are_ours(a, b) || !takes(out, a)) return at::cpu::mm_out(out, a, b);
  const Record record("mm", {&a, &b});
  return product_out(a, b, out);
}
Tensor bmm(const Tensor& a, const Tensor& b) {
  if (!are_ours(a, b, 1)) return at::cpu::bmm(a, b);
  const Record record("bmm", {&a, &b});
  return product(a, b);
}
Tensor& bmm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  if (!are_ours(a, b, 1) || !takes(out, a)) return at::cpu::bmm_out(out, a, b);
  const Record record("bmm", {&a, &b});
  return product_out(a, b, out);
}

// addmm and baddbmm differ in their dimensions alone.
#define RF_SUM(name, batches)                                                                                          \
  Tensor name(const Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) { \
    if (!are_ours(a, b, batches) || !takes_sum(self, a, b, beta, alpha))                                               \
      return at::cpu::name(self, a, b, beta, alpha);                                                                   \
    const Record record(#name, {&a, &b});                                                                              \
    return sum(self, a, b, beta, alpha);                                                                               \
  }                                                                                                                    \
  Tensor& name##_out(const Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& beta,                     \
                     const at::Scalar& alpha, Tensor& out) {                                                           \
    if (!are_ours(a, b, batches) || !takes_sum(self, a, b, beta, alpha) || !takes(out, a))                             \
      return at::cpu::name##_out(out, self, a, b, beta, alpha);                                                        \
    const Record record(#name, {&a, &b});                                                                              \
    return put(out, sum(self, a, b, beta, alpha));                                                                     \
  }                                                                                                                    \
  Tensor& name##_(Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {   \
    if (!are_ours(a, b, batches) || !takes_sum(self, a, b, beta, alpha) || self.sizes() != sizes_of_product(a, b))     \
      return at::cpu::name##_(self, a, b, beta, alpha);                                                                \
    const Record record(#name, {&a, &b});                                                                              \
    return self.copy_(sum(self, a, b, beta, alpha));                                                                   \
  }
RF_SUM(addmm, 0)
RF_SUM(baddbmm, 1)
#undef RF_SUM

// torch warns of a kernel that takes another one's place, which is what is asked for here.
class Unheard : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::mutex mutex;
torch::Library* kernels_of_ours = nullptr;  // never freed as the process ends, when the dispatcher may be gone

void override_products(bool on, at::IntArrayRef from) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!on) {
    delete kernels_of_ours;  // ATen's are back
    kernels_of_ours = nullptr;
    return;
  }
  TORCH_CHECK_VALUE(from.size() == least.size(), "regfast._override_products: least: expected ", least.size(),
                    " numbers, one for each dtype, got ", from.size());
  for (size_t i = 0; i < least.size(); ++i) least[i] = from[i];
  if (kernels_of_ours) return;
  Unheard handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  kernels_of_ours = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  torch::Library& m = *kernels_of_ours;
  m.impl("mm", TORCH_FN(mm));
  m.impl("mm.out", TORCH_FN(mm_out));
  m.impl("bmm", TORCH_FN(bmm));
  m.impl("bmm.out", TORCH_FN(bmm_out));
  m.impl("addmm", TORCH_FN(addmm));
  m.impl("addmm.out", TORCH_FN(addmm_out));
  m.impl("addmm_", TORCH_FN(addmm_));
  m.impl("baddbmm", TORCH_FN(baddbmm));
  m.impl("baddbmm.out", TORCH_FN(baddbmm_out));
  m.impl("baddbmm_", TORCH_FN(baddbmm_));
  take_convolutions(m);
  take_attention(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regfast, m) { m.impl("_override_products", TORCH_FN(override_products)); }

}  // namespace rf
