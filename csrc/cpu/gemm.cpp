// The GEMM engine's loops (five around the micro-kernel, as in BLIS), the division of C among threads, and the choice
// of path.
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

// Rows [i0, i1) and columns [j0, j1) of C by one thread.
void packed_part(DType dtype, const Gemm& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Kernels& kern = kernels();
  const int t = (int)dtype;
  const int64_t acc = dtype == DType::f64 ? 8 : 4, mr = kern.mr[t], nr = kern.nr[t];
  const tuning::GemmBlocks blocks = tuning::kGemmBlocks;
  // K in equal parts, so that the last is not a sliver.
  const int64_t k_parts = std::max<int64_t>(1, ceil_div(g.k, blocks.kc));
  const int64_t kc = std::max<int64_t>(1, ceil_div(g.k, k_parts));
  // Between K blocks sums wait in C itself where it has their precision, else in scratch for NC columns at a time.
  const bool in_c = dtype == DType::f32 || dtype == DType::f64;
  const int64_t mc = round_up(blocks.mc, mr), nc = in_c || k_parts == 1 ? j1 - j0 : blocks.nc;
  Epilogue e = g.epilogue;
  char* a = (char*)scratch(Slot::packed_a, std::min(mc, round_up(i1 - i0, mr)) * kc * acc);
  char* b = (char*)scratch(Slot::packed_b, round_up(std::min(blocks.group, j1 - j0), nr) * kc * acc);

  for (int64_t jc = j0; jc < j1; jc += nc) {
    const int64_t jc_end = std::min(jc + nc, j1);
    if (in_c) {
      e.partial = e.c;
      e.partial_stride = e.c_stride;
    } else if (k_parts > 1) {
      e.partial_stride = jc_end - jc;
      e.partial =
          (char*)scratch(Slot::partial, (i1 - i0) * e.partial_stride * acc) - (i0 * e.partial_stride + jc) * acc;
    }
    for (int64_t part = 0; part < k_parts; ++part) {
      const int64_t pc = part * kc, k = std::min(kc, g.k - pc);
      for (int64_t ic = i0; ic < i1; ic += mc) {
        const int64_t m = std::min(mc, i1 - ic);
        kern.pack_a[t]({g.a, g.a_transposed, ic, m, pc, k, a});
        for (int64_t jg = jc; jg < jc_end; jg += blocks.group) {
          const int64_t n = std::min(blocks.group, jc_end - jg);
          kern.pack_b[t]({g.b, !g.b_transposed, jg, n, pc, k, b});
          kern.gemm_block[t]({m, n, k, a, b, ic, jg, part == 0, part == k_parts - 1, e});
        }
      }
    }
  }
}

// C as a grid of one rectangle for each thread, chosen so that the least is packed twice. No thread waits for another
// before the end: on a busy machine each barrier costs a time slice.
void packed(DType dtype, const Gemm& g) {
  const int64_t mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  const int64_t tiles = ceil_div(g.m, mr), panels = ceil_div(g.n, nr);
  const double products = (double)g.m * (double)g.n * (double)std::max<int64_t>(g.k, 1);
  const int64_t threads = std::min<int64_t>(thread_count(), 1 + (int64_t)(products / tuning::kProductsPerThread));
  int64_t down = 1, across = 1;
  double least = -1;
  for (int64_t d = 1; d <= threads; ++d) {
    const int64_t rows = std::min(d, tiles), columns = std::min(threads / d, panels);
    // The longest thread's products, and what all pack between them, in products' worth of time.
    const double largest = (double)ceil_div(tiles, rows) * (double)mr * (double)ceil_div(panels, columns) * (double)nr;
    const double cost =
        largest + tuning::kPackCost * ((double)g.m * (double)columns + (double)g.n * (double)rows) / (double)threads;
    if (least < 0 || cost < least) {
      least = cost;
      down = rows;
      across = columns;
    }
  }
  parallel_for(down * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t y = r / across, x = r % across;
      const auto row = [&](int64_t i) { return std::min(g.m, i * tiles / down * mr); };
      const auto column = [&](int64_t i) { return std::min(g.n, i * panels / across * nr); };
      packed_part(dtype, g, row(y), row(y + 1), column(x), column(x + 1));
    }
  });
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
  if (n <= tuning::kSkinny || m <= tuning::kFewRows || k <= tuning::kSkinny) return false;
  return m * n * k >= tuning::kLibraryProducts && library_gemm_wins(dtype);
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
