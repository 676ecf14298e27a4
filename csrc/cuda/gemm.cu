// Which kernel takes a product, in what tiles and in how many parts of K; and the kernel that adds up the parts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/gemm.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

using tuning::GemmKernel;

// ---- operands ------------------------------------------------------------------------------------------------------

// Rows of memory are what lies adjacent in it, where anything does, however the matrix is named.
GemmOperand operand(MatrixView view, bool across_k, int64_t mn, int64_t k) {
  if (view.inner == 1 && view.outer_stride == 1 && view.col_stride != 1) {
    view.outer_stride = view.col_stride;
    view.col_stride = 1;
    across_k = !across_k;
  }
  if (view.inner == 1 && (across_k ? k : mn) == 1) view.outer_stride = 0;  // never used, and it may be odd
  return {view, across_k};
}

// Whether all its rows can be copied 16 bytes at a time.
bool copyable(const GemmOperand& o, int64_t element_size) {
  return o.view.inner == 1 && o.view.col_stride == 1 && o.view.outer_stride * element_size % 16 == 0 &&
         reinterpret_cast<uintptr_t>(o.view.data) % 16 == 0;
}

GemmLoad load_of(const GemmOperand& a, const GemmOperand& b, int64_t element_size) {
  // A across K with B along it needs X to be stored by columns: not worth a kernel of its own.
  if (!copyable(a, element_size) || !copyable(b, element_size) || (a.across_k && !b.across_k))
    return GemmLoad::elements;
  return a.across_k ? GemmLoad::across_across : b.across_k ? GemmLoad::along_across : GemmLoad::along_along;
}

// ---- the plan ------------------------------------------------------------------------------------------------------

struct Tiles {
  int large_m, large_n, small_m, small_n, depth;
};
using tuning::GemmLarge, tuning::GemmSmall, tuning::SimtLarge, tuning::SimtSmall;
constexpr Tiles kSimtTiles = {SimtLarge::M, SimtLarge::N, SimtSmall::M, SimtSmall::N, SimtSmall::Depth};
static_assert(SimtLarge::Depth == SimtSmall::Depth, "K is divided before the tile is chosen");
constexpr Tiles tensor_core_tiles(DType dtype) {
  return {GemmLarge::M, GemmLarge::N, GemmSmall::M, GemmSmall::N, tuning::kGemmDepthBytes / (int)size_of(dtype)};
}

// What REGFAST_CUDA_GEMM asks for, if anything.
std::optional<GemmKernel> forced_kernel() {
  static const std::optional<GemmKernel> forced = []() -> std::optional<GemmKernel> {
    const char* v = std::getenv("REGFAST_CUDA_GEMM");
    if (!v || !*v || !std::strcmp(v, "auto")) return std::nullopt;
    for (int i = 0; i < (int)std::size(tuning::kGemmKernelNames); ++i)
      if (!std::strcmp(v, tuning::kGemmKernelNames[i])) return (GemmKernel)i;
    throw std::runtime_error(std::string("REGFAST_CUDA_GEMM: expected auto, aten, sm80 or sm90, got ") + v);
  }();
  return forced;
}

// A table for each device. Calls of other threads may read one while it is set.
std::atomic<GemmKernel> tables[kMostDevices][kDTypes + 1][tuning::kGemmSizes];

GemmKernel kernel_for(DType dtype, bool tf32, int64_t m, int64_t n, int64_t k) {
  if (const auto forced = forced_kernel()) return *forced;
  const int arithmetic = dtype == DType::f32 && tf32 ? kDTypes : (int)dtype;
  return tables[device().index][arithmetic][(int)tuning::gemm_size(m, n, k)].load(std::memory_order_relaxed);
}

// ---- split sums ----------------------------------------------------------------------------------------------------

using tuning::kFinishThreads;

// C from the parts' sums, added in the order of the parts; a vector of C for a thread.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_split(GemmTask task, int splits) {
  using A = acc_t<T>;
  const int64_t vectors = (task.n + kWidth<T> - 1) / kWidth<T>;
  const int64_t index = (int64_t)blockIdx.x * kFinishThreads + threadIdx.x;
  if (index >= task.m * vectors) return;
  const int64_t row = index / vectors, column = index % vectors * kWidth<T>;
  A x[kWidth<T>] = {}, bias[kWidth<T>];
  // Always in this order, whichever part was done first.
  for (int s = 0; s < splits; ++s) {
    const A* part = (const A*)task.partial + (s * task.m + row) * task.n;
#pragma unroll
    for (int i = 0; i < kWidth<T>; i += kWidth<A>) {
      A piece[kWidth<A>];
      widen(load_vec(part, 1, column + i, task.n, A(0)), piece);
#pragma unroll
      for (int j = 0; j < kWidth<A>; ++j) x[i + j] += piece[j];
    }
  }
  load_bias<T>(task.out, column, task.n, bias);
  finish<T>(task.out, row, column, task.n, bias, x);
}

}  // namespace

// Large tiles if they fill the SMs, with K split if need be; then K in as many parts as fill them once.
GemmPlan gemm_plan(DType dtype, bool tf32, const Gemm& g) {
  GemmPlan p = {};
  p.tensor_cores = dtype == DType::bf16 || dtype == DType::f16 || (dtype == DType::f32 && tf32);
  p.load = load_of(operand(g.a, g.a_transposed, g.m, g.k), operand(g.b, !g.b_transposed, g.n, g.k), size_of(dtype));
  const Tiles t = p.tensor_cores ? tensor_core_tiles(dtype) : kSimtTiles;
  const bool large_exists = p.tensor_cores ? p.load != GemmLoad::elements : dtype == DType::f32;

  const int64_t sms = device().sms, stages = std::max<int64_t>(1, ceil_div(g.k, t.depth));
  // Each part has to be worth its traffic: it writes and reads a C of its own.
  const int64_t most = std::clamp<int64_t>(stages / tuning::kGemmLeastStages, 1, tuning::kGemmMostSplits);
  const auto tiles = [&](int m, int n) { return ceil_div(g.m, m) * ceil_div(g.n, n); };
  // Large tiles read less for each product, but only if there are enough of them for every SM.
  const bool large = large_exists && g.m > t.small_m && g.n > t.small_n && tiles(t.large_m, t.large_n) * most >= sms;
  p.tile_m = large ? t.large_m : t.small_m;
  p.tile_n = large ? t.large_n : t.small_n;
  const int64_t full = sms * tuning::kGemmBlocksPerSm / std::max<int64_t>(1, tiles(p.tile_m, p.tile_n));
  // Whole stages in every part but the last: no other part has a rest of K.
  p.k_per_split = ceil_div(stages, std::clamp<int64_t>(full, 1, most)) * t.depth;
  p.splits = (int)std::max<int64_t>(1, ceil_div(g.k, p.k_per_split));
  return p;
}

void set_gemm_table(int device, const GemmTable& table) {
  if (device < 0 || device >= kMostDevices) throw std::runtime_error("regfast: more CUDA devices than it counts on");
  for (int arithmetic = 0; arithmetic <= kDTypes; ++arithmetic)
    for (int size = 0; size < tuning::kGemmSizes; ++size)
      tables[device][arithmetic][size].store(table.kernel[arithmetic][size], std::memory_order_relaxed);
}

const char* gemm_by_aten(DType dtype, bool tf32, int64_t m, int64_t n, int64_t k) {
  if (kernel_for(dtype, tf32, m, n, k) != GemmKernel::aten) return nullptr;
  return forced_kernel() ? "REGFAST_CUDA_GEMM=aten" : "as ours is not proven to be faster here";
}

int64_t gemm_workspace(DType dtype, bool tf32, const Gemm& g) {
  const GemmPlan plan = gemm_plan(dtype, tf32, g);
  return plan.splits > 1 ? plan.splits * g.m * g.n * acc_size(dtype) : 0;
}

GemmTask gemm_task(const Gemm& g) {
  GemmTask task = {};
  task.m = g.m;
  task.n = g.n;
  task.k = task.k_per_split = g.k;
  task.a = operand(g.a, g.a_transposed, g.m, g.k);
  task.b = operand(g.b, !g.b_transposed, g.n, g.k);
  task.out = {g.c, g.c_stride, g.bias, g.activation, g.preactivation};
  return task;
}

void launch_gemm(DType dtype, bool tf32, const Gemm& g, cudaStream_t stream) {
  if (g.m == 0 || g.n == 0) return;
  GemmTask task = gemm_task(g);
  // It refuses what a tensor map cannot describe (alignment, strides).
  if (kernel_for(dtype, tf32, g.m, g.n, g.k) == GemmKernel::sm90 && launch_gemm_sm90(dtype, task, stream)) return;

  const GemmPlan plan = gemm_plan(dtype, tf32, g);
  task.k_per_split = plan.k_per_split;
  task.partial = plan.splits > 1 ? g.workspace : nullptr;
  if (plan.tensor_cores)
    launch_gemm_sm80(dtype, task, plan, stream);
  else
    launch_gemm_simt(dtype, task, plan, stream);
  if (!task.partial) return;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t blocks = ceil_div(task.m * ceil_div(task.n, kWidth<T>), kFinishThreads);
    launch(finish_split<T>, dim3((unsigned)blocks), dim3(kFinishThreads), 0, stream, task, plan.splits);
  });
}

}  // namespace rf::cuda
