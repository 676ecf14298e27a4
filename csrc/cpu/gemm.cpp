// The GEMM engine's loops (five around the micro-kernel, as in BLIS) and the choice of path. Each panel of B is packed
// by all threads together, then blocks of C are computed in parallel, each thread packing its own block of A.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "drivers.h"
#include "parallel.h"
#include "tuning.h"

namespace rf {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

void packed(DType dtype, const Gemm& g) {
  const Kernels& kern = kernels();
  const int t = (int)dtype;
  const int64_t acc = dtype == DType::f64 ? 8 : 4, mr = kern.mr[t], nr = kern.nr[t];
  const tuning::GemmBlocks blocks = tuning::kGemmBlocks;
  // K in equal parts, so that the last is not a sliver.
  const int64_t k_parts = std::max<int64_t>(1, ceil_div(g.k, blocks.kc)),
                kc = std::max<int64_t>(1, ceil_div(g.k, k_parts));
  const int64_t threads = thread_count();

  for (int64_t jc = 0; jc < g.n; jc += blocks.nc) {
    const int64_t n = std::min(blocks.nc, g.n - jc), n_panels = ceil_div(n, nr);
    // Blocks of C: rows first, in multiples of the tile, then columns where rows are too few for all threads.
    const int64_t mc = std::min(blocks.mc / mr * mr, round_up(ceil_div(g.m, threads), mr));
    const int64_t m_blocks = ceil_div(g.m, mc);
    const int64_t wanted_groups = std::max<int64_t>(ceil_div(n, blocks.group), ceil_div(2 * threads, m_blocks));
    const int64_t group_panels = ceil_div(n_panels, std::min(n_panels, wanted_groups));
    const int64_t n_groups = ceil_div(n_panels, group_panels);

    Epilogue e = g.epilogue;
    if (k_parts > 1) {
      // Between K blocks sums wait in C itself where it has their precision, else in scratch.
      if (dtype == DType::f32 || dtype == DType::f64) {
        e.partial = e.c;
        e.partial_stride = e.c_stride;
      } else {
        e.partial = (char*)scratch(Slot::partial, g.m * n * acc) - jc * acc;
        e.partial_stride = n;
      }
    }
    for (int64_t part = 0; part < k_parts; ++part) {
      const int64_t pc = part * kc, k = std::max<int64_t>(0, std::min(kc, g.k - pc));
      char* b = (char*)scratch(Slot::packed_b, n_panels * nr * kc * acc);
      parallel_for(n_panels, std::max<int64_t>(1, tuning::kParallelElements / (nr * std::max<int64_t>(k, 1))),
                   [&](int64_t first, int64_t last) {
                     kern.pack_b[t]({g.b, !g.b_transposed, jc + first * nr, std::min(last * nr, n) - first * nr, pc, k,
                                     b + first * nr * k * acc});
                   });
      parallel_for(m_blocks * n_groups, 1, [&](int64_t first, int64_t last) {
        char* a = (char*)scratch(Slot::packed_a, mc * kc * acc);
        int64_t in_a = -1;
        for (int64_t task = first; task < last; ++task) {
          const int64_t block = task / n_groups, group = task % n_groups;
          const int64_t ic = block * mc, m = std::min(mc, g.m - ic);
          const int64_t panel = group * group_panels, end = std::min(n_panels, panel + group_panels);
          if (in_a != block) kern.pack_a[t]({g.a, g.a_transposed, ic, m, pc, k, a});
          in_a = block;
          kern.gemm_block[t]({m, std::min(end * nr, n) - panel * nr, k, a, b + panel * nr * k * acc, ic,
                              jc + panel * nr, part == 0, part == k_parts - 1, e});
        }
      });
    }
  }
}

void dot(DType dtype, const Gemm& g, bool few_rows) {
  const int64_t many = few_rows ? g.n : g.m, few = few_rows ? g.m : g.n;
  const int64_t grain = tuning::kParallelElements / std::max<int64_t>(1, few * g.k / 8) + 1;
  parallel_for(many, grain, [&](int64_t begin, int64_t end) {
    kernels().gemm_dot[(int)dtype](
        {few_rows ? g.b : g.a, few_rows ? g.a : g.b, begin, end, few, g.k, few_rows, g.epilogue});
  });
}

// Threads share whichever of C's sides has more register tiles.
void direct(DType dtype, const Gemm& g) {
  const int64_t mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  const bool by_rows = g.m / mr > g.n / nr;
  const int64_t step = by_rows ? mr : nr, side = by_rows ? g.m : g.n, other = by_rows ? g.n : g.m;
  const int64_t grain = tuning::kParallelElements / std::max<int64_t>(1, step * other * g.k / 8) + 1;
  parallel_for(ceil_div(side, step), grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * step, end = std::min(last * step, side);
    kernels().gemm_direct[(int)dtype]({g.a, g.a_transposed, g.b, g.k, by_rows ? begin : 0, by_rows ? end : g.m,
                                       by_rows ? 0 : begin, by_rows ? g.n : end, g.epilogue});
  });
}

}  // namespace

GemmPath gemm_path(DType, const Gemm& g) {
  const bool along_k = !g.a_transposed && g.b_transposed && g.a.col_stride == 1 && g.b.col_stride == 1;
  if (along_k && g.n <= tuning::kSkinny) return GemmPath::dot_few_columns;
  if (along_k && g.m <= tuning::kFewRows) return GemmPath::dot_few_rows;
  if (!g.b_transposed && g.b.col_stride == 1 && (g.m <= tuning::kSkinny || g.k <= tuning::kSkinny))
    return GemmPath::direct;
  return GemmPath::packed;
}

bool gemm_by_aten(DType dtype, int64_t m, int64_t n, int64_t k) {
  enum class Force { neither, own, aten };
  static const Force force = [] {
    const char* v = std::getenv("REGFAST_GEMM");
    if (!v || !*v || !std::strcmp(v, "auto")) return Force::neither;
    if (!std::strcmp(v, "own")) return Force::own;
    if (!std::strcmp(v, "aten")) return Force::aten;
    throw std::runtime_error(std::string("REGFAST_GEMM: expected auto, own or aten, got ") + v);
  }();
  if (force != Force::neither) return force == Force::aten;
  if (n <= tuning::kSkinny || m <= tuning::kFewRows) return false;
  return has_native_gemm(dtype) && m * n * k >= tuning::kNativeGemmProducts;
}

void gemm(DType dtype, Gemm g) {
  if (g.m == 0 || g.n == 0) return;
  switch (gemm_path(dtype, g)) {
    case GemmPath::dot_few_columns:
      return dot(dtype, g, false);
    case GemmPath::dot_few_rows:
      return dot(dtype, g, true);
    case GemmPath::direct:
      return direct(dtype, g);
    case GemmPath::packed:
      return packed(dtype, g);
  }
}

}  // namespace rf
