// The GEMM engine's loops around the micro-kernel, the division of C among threads, and the choice of path.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "drivers.h"
#include "parallel.h"
#include "tuning.h"
#if defined(__unix__)
#include <unistd.h>
#endif

namespace rf {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// As the system tells it, where it does.
int64_t last_level_cache() {
  static const int64_t found = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    return size > 0 ? size : tuning::kUsualLastLevelCache;
  }();
  return found;
}

constexpr int64_t acc_size(DType t) { return t == DType::f64 ? 8 : 4; }
DType c_type(DType operands, const Gemm& g) { return g.wide_c && operands != DType::f64 ? DType::f32 : operands; }

// An operand of a product as the engine sees it: count x K, its memory's rows along K or across it.
struct Side {
  MatrixView view;
  bool across;
  int64_t count;

  Side(const MatrixView& v, bool rows_are_k, int64_t n) : view(v), across(rows_are_k), count(n) {
    // Columns of memory that are adjacent down them are rows of the transposed matrix.
    if (v.inner == 1 && v.outer_stride == 1 && v.col_stride != 1) {
      view = {v.data, 1, v.col_stride, 0, 1};
      across = !across;
    }
  }
  bool along_k() const { return !across && view.col_stride == 1; }
  // Whether its elements can be broadcast from where they lie.
  bool in_place(DType t) const { return along_k() && view.inner == 1 && size_of(t) == acc_size(t); }
};

// A product, planned. The micro-kernel broadcasts elements of A and loads vectors of B's packed panels. A longer side
// that can be read in place is A, and the shorter one is packed by all threads together before they share A's rows.
// Otherwise the longer side is B, of which each thread packs what it needs, and the shorter one is laid out for all.
struct Plan {
  Side a, b;
  bool transposed;  // A's rows are C's columns
  bool a_is_longer;
  int64_t threads;
  int64_t kc, chain;         // K block, and the additions in a row within it
  int64_t k_count;           // of K, at a time, of the side that is laid out for all; whole K blocks
  int64_t b_count;           // rows of B at a time, where it is packed for all
  int64_t a_parts, b_parts;  // tasks
};

Plan make_plan(DType dtype, const Gemm& g, int64_t threads) {
  const int64_t acc = acc_size(dtype), mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  const Side x(g.a, g.a_transposed, g.m), w(g.b, !g.b_transposed, g.n);
  const bool w_is_longer = g.n >= g.m, a_is_longer = (w_is_longer ? w : x).in_place(dtype);
  const bool transposed = w_is_longer == a_is_longer;
  Plan p = {transposed ? w : x, transposed ? x : w, transposed, a_is_longer, 1, 0, 0, 0, 0, 0, 0};
  const double products = (double)g.m * (double)g.n * (double)std::max<int64_t>(g.k, 1);
  p.threads = std::min<int64_t>(threads, 1 + (int64_t)(products / tuning::kProductsPerThread));
  // K in equal parts, so that the last is not a sliver.
  const auto parts = [](int64_t whole, int64_t part) {
    return std::max<int64_t>(1, ceil_div(whole, std::max<int64_t>(1, ceil_div(whole, part))));
  };
  const bool deep = !a_is_longer && !p.b.across;
  p.kc = parts(g.k, a_is_longer ? tuning::kBlockKInPlace : deep ? tuning::kDeepBlockK : tuning::kBlockK);
  p.chain = parts(p.kc, tuning::kGemmChain);
  p.b_count = a_is_longer ? std::min(round_up(p.b.count, nr), round_up(tuning::kPackedColumns, nr)) : p.b.count;
  const int64_t for_all = (a_is_longer ? p.b_count : p.a.count) * acc,
                budget = last_level_cache() / tuning::kCacheShare;
  p.k_count = p.kc * std::max<int64_t>(1, std::min(ceil_div(g.k, p.kc), budget / (for_all * p.kc)));
  // Several tasks to a thread, for the balance; a side is cut up further where the other one gives too few.
  const int64_t tiles = ceil_div(p.a.count, mr), panels = ceil_div(p.b_count, nr);
  const int64_t wanted = p.threads == 1 ? 1 : p.threads * tuning::kTasksPerThread;
  if (a_is_longer) {
    const int64_t most = std::max<int64_t>(1, tiles / (tuning::kTaskTiles * p.threads)) * p.threads;
    p.a_parts =
        std::min({tiles, most, p.threads * ceil_div(std::max(wanted, p.a.count / tuning::kBlockRows), p.threads)});
    p.b_parts = std::min(panels, ceil_div(p.threads, p.a_parts));
  } else {
    // For few rows of A packing decides, and it wants long pieces of memory.
    const int64_t least = p.a.count < tuning::kPackingDecides && !deep ? p.threads : wanted;
    const int64_t columns = deep ? tuning::kDeepTaskColumns : tuning::kTaskColumns;
    p.b_parts = std::min(panels, p.threads * ceil_div(std::max(least, p.b_count / columns), p.threads));
    p.a_parts = std::min(tiles, ceil_div(p.threads, p.b_parts));
  }
  return p;
}

// Tasks are taken as threads come free, since on a busy machine one of them may be held up; what a task computes does
// not depend on who takes it.
template <class F>
void take_tasks(int64_t tasks, int64_t threads, F&& run) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(tasks, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
  });
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part i of n of `count` things that come in steps.
Range part_of(int64_t count, int64_t step, int64_t i, int64_t n) {
  const int64_t steps = ceil_div(count, step);
  return {std::min(count, steps * i / n * step), std::min(count, steps * (i + 1) / n * step)};
}

// Multiplies pieces of A and B that are ready for the micro-kernel.
class Multiplier {
 public:
  Multiplier(DType dtype, const Gemm& g, const Plan& plan) : dtype_(dtype), g_(g), p_(plan) {
    epilogue = g.epilogue;
    mr_ = kernels().mr[(int)dtype];
    nr_ = kernels().nr[(int)dtype];
  }

  // Elements of A from row i and column k0 on, where they lie; `block` gets their distances.
  void read_in_place(GemmBlockArgs& block, int64_t i, int64_t k0) const {
    const int64_t stride = p_.a.view.outer_stride;
    block.a = (const char*)p_.a.view.data + (i * stride + k0) * acc_size(dtype_);
    block.a_row = stride;
    block.a_k = 1;
    block.a_panel = mr_ * stride;
  }
  // The same where A was laid out for `rows` of it: widened rows, or panels.
  void read_laid_out(GemmBlockArgs& block, const char* a, int64_t i, int64_t k) const {
    const bool rows = p_.a.along_k();
    block.a = a + i * k * acc_size(dtype_);
    block.a_row = rows ? k : 1;
    block.a_k = rows ? 1 : mr_;
    block.a_panel = mr_ * k;
  }

  // Rows i of A, from where `block` reads them, times the packed rows j of B, in pieces that fit the caches.
  void multiply(GemmBlockArgs block, Range i, const char* b, Range j, int64_t k0, int64_t k) const {
    const int64_t acc = acc_size(dtype_), rows = round_up(tuning::kBlockRows, mr_),
                  group = round_up(tuning::kGroupColumns, nr_);
    block.k = k;
    block.chain = p_.chain;
    block.transposed = p_.transposed;
    block.first = k0 == 0;
    block.last = k0 + k == g_.k;
    block.epilogue = epilogue;
    block.tiles =
        scratch(Slot::tiles, std::min(rows, round_up(i.size(), mr_)) * std::min(group, round_up(j.size(), nr_)) * acc);
    const char* a = (const char*)block.a;
    for (int64_t s = i.begin; s < i.end; s += rows) {
      block.a = a + (s - i.begin) / mr_ * block.a_panel * acc;
      block.a_index = s;
      block.a_count = std::min(rows, i.end - s);
      for (int64_t t = j.begin; t < j.end; t += group) {
        block.b = b + (t - j.begin) * k * acc;
        block.b_index = t;
        block.b_count = std::min(group, j.end - t);
        block.b_is_far = group * k * acc > tuning::kNearBytes;
        kernels().gemm_block[(int)c_type(dtype_, g_)](block);
      }
    }
  }

  Epilogue epilogue;

 private:
  DType dtype_;
  const Gemm& g_;
  const Plan& p_;
  int64_t mr_, nr_;
};

// Lays out rows [0, count) and K from k0 to k1 of a side for all threads: K blocks one behind another.
void lay_out(DType dtype, const Plan& p, const Side& side, int64_t width, void (*pack)(const PackArgs&), Range rows,
             Range depth, char* to) {
  const int64_t acc = acc_size(dtype), padded = round_up(rows.size(), width), blocks = ceil_div(depth.size(), p.kc);
  const int64_t steps = std::max<int64_t>(1, tuning::kPackTask / (p.kc * width)),
                parts = ceil_div(padded, steps * width);
  take_tasks(parts * blocks, p.threads, [&](int64_t task) {
    const int64_t block = task / parts * p.kc, k = std::min(p.kc, depth.size() - block);
    const int64_t i = task % parts * steps * width;
    pack({side.view, side.across, rows.begin + i, std::min(steps * width, rows.size() - i), depth.begin + block, k,
          to + (block * padded + i * k) * acc});
  });
}

// The longer side in place.
void multiply_in_place(DType dtype, const Gemm& g, const Plan& p) {
  const int64_t acc = acc_size(dtype), mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  Multiplier multiplier(dtype, g, p);
  // Between K blocks sums wait in C itself: what is read in place has its precision.
  multiplier.epilogue.partial = g.epilogue.c;
  multiplier.epilogue.partial_stride = g.epilogue.c_stride;
  char* b = (char*)scratch(Slot::packed_b, p.b_count * std::min(p.k_count, round_up(g.k, p.kc)) * acc);
  for (int64_t j0 = 0; j0 < p.b.count; j0 += p.b_count) {
    const Range rows = {j0, std::min(j0 + p.b_count, p.b.count)};
    const int64_t padded = round_up(rows.size(), nr);
    for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += p.k_count) {
      const Range depth = {k0, std::min(k0 + p.k_count, g.k)};
      lay_out(dtype, p, p.b, nr, kernels().pack_b[(int)dtype], rows, depth, b);
      take_tasks(p.a_parts * p.b_parts, p.threads, [&](int64_t task) {
        const Range i = part_of(p.a.count, mr, task / p.b_parts, p.a_parts);
        const Range j = part_of(rows.size(), nr, task % p.b_parts, p.b_parts);
        GemmBlockArgs block = {};
        for (int64_t at = depth.begin; at == 0 || at < depth.end; at += p.kc) {
          const int64_t k = std::min(p.kc, depth.end - at);
          multiplier.read_in_place(block, i.begin, at);
          multiplier.multiply(block, i, b + ((at - k0) * padded + j.begin * k) * acc, {j0 + j.begin, j0 + j.end}, at,
                              k);
          if (g.k == 0) break;
        }
      });
      if (g.k == 0) break;
    }
  }
}

// The longer side packed, by whoever multiplies it.
void multiply_packed(DType dtype, const Gemm& g, const Plan& p) {
  const int64_t acc = acc_size(dtype), mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  const int t = (int)dtype;
  Multiplier multiplier(dtype, g, p);
  const bool in_place = p.a.in_place(dtype), c_is_wide = size_of(c_type(dtype, g)) == acc;
  const int64_t rows = round_up(p.a.count, mr);
  char* a = in_place ? nullptr : (char*)scratch(Slot::packed_a, rows * std::min(p.k_count, round_up(g.k, p.kc)) * acc);
  Epilogue& e = multiplier.epilogue;
  if (c_is_wide) {
    e.partial = e.c;
    e.partial_stride = e.c_stride;
  } else if (g.k > p.kc) {
    e.partial_stride = g.n;
    e.partial = scratch(Slot::partial, g.m * g.n * acc);
  }
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += p.k_count) {
    const Range depth = {k0, std::min(k0 + p.k_count, g.k)};
    if (!in_place)
      lay_out(dtype, p, p.a, mr, p.a.along_k() ? kernels().widen_a[t] : kernels().pack_a[t], {0, p.a.count}, depth, a);
    take_tasks(p.b_parts * p.a_parts, p.threads, [&](int64_t task) {
      const Range j = part_of(p.b.count, nr, task / p.a_parts, p.b_parts);
      const Range i = part_of(p.a.count, mr, task % p.a_parts, p.a_parts);
      GemmBlockArgs block = {};
      for (int64_t at = depth.begin; at == 0 || at < depth.end; at += p.kc) {
        const int64_t k = std::min(p.kc, depth.end - at);
        char* b = (char*)scratch(Slot::packed_b, round_up(j.size(), nr) * k * acc);
        kernels().pack_b[t]({p.b.view, p.b.across, j.begin, j.size(), at, k, b});
        in_place ? multiplier.read_in_place(block, i.begin, at)
                 : multiplier.read_laid_out(block, a + (at - k0) * rows * acc, i.begin, k);
        multiplier.multiply(block, i, b, j, at, k);
        if (g.k == 0) break;
      }
    });
    if (g.k == 0) break;
  }
}

void multiply(DType dtype, const Gemm& g, int64_t threads) {
  const Plan p = make_plan(dtype, g, threads);
  p.a_is_longer ? multiply_in_place(dtype, g, p) : multiply_packed(dtype, g, p);
}

// How many parts K is cut into where C alone gives the threads too little to share. By shape, not by the number of
// threads: the same bits with any number of them.
int64_t k_parts(const Gemm& g) {
  const bool affine = (!g.a_transposed || g.a.inner == 1) && (g.b_transposed || g.b.inner == 1);
  if (!affine || g.m * g.n > tuning::kSplitOutputs || std::max(g.m, g.n) > tuning::kSplitSide) return 1;
  return std::max<int64_t>(1, std::min(tuning::kMostSplits, g.k / tuning::kSplitK));
}

// Parts of K, one to a task, and their sums added in order.
void split_k(DType dtype, const Gemm& g, int64_t parts) {
  const int64_t acc = acc_size(dtype), size = g.m * g.n;
  char* sums = (char*)scratch(Slot::splits, parts * size * acc);
  take_tasks(parts, thread_count(), [&](int64_t task) {
    const Range k = part_of(g.k, tuning::kGemmChain, task, parts);
    Gemm part = g;
    part.k = k.size();
    const auto from = [&](MatrixView& m, bool rows_are_k) {
      const int64_t at = rows_are_k ? m.row_offset(k.begin) : k.begin * m.col_stride;
      m.data = (const char*)m.data + at * size_of(dtype);
    };
    from(part.a, g.a_transposed);
    from(part.b, !g.b_transposed);
    part.wide_c = true;
    part.epilogue = {};
    part.epilogue.c = sums + task * size * acc;
    part.epilogue.c_stride = g.n;
    multiply(dtype, part, 1);
  });
  const auto add = [&](auto* first) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) first[i] += first[part * size + i];
  };
  dtype == DType::f64 ? add((double*)sums) : add((float*)sums);
  // A block without products adds them to nothing and finishes C.
  GemmBlockArgs block = {};
  block.a = block.b = sums;
  block.chain = 1;
  block.last = true;
  block.epilogue = g.epilogue;
  block.epilogue.partial = sums;
  block.epilogue.partial_stride = g.n;
  const int64_t mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  block.a_count = g.m;
  block.b_count = g.n;
  block.tiles = scratch(Slot::tiles, round_up(g.m, mr) * round_up(g.n, nr) * acc);
  kernels().gemm_block[(int)c_type(dtype, g)](block);
}

void dot(DType dtype, const Gemm& g, bool few_rows) {
  const int64_t many = few_rows ? g.n : g.m, few = few_rows ? g.m : g.n;
  const int64_t grain = tuning::kParallelElements / std::max<int64_t>(1, few * g.k / 8) + 1;
  parallel_for(many, grain, [&](int64_t begin, int64_t end) {
    kernels().gemm_dot[(int)dtype](
        {few_rows ? g.b : g.a, few_rows ? g.a : g.b, begin, end, few, g.k, few_rows, g.epilogue});
  });
}

// A matrix of a half type, widened to float for kernels that read their operands in place.
MatrixView widened(DType dtype, const MatrixView& m, int64_t rows, int64_t columns, Slot slot) {
  float* to = (float*)scratch(slot, rows * columns * (int64_t)sizeof(float));
  parallel_for(rows, tuning::kParallelElements / std::max<int64_t>(1, columns) + 1, [&](int64_t begin, int64_t end) {
    kernels().widen_a[(int)dtype]({m, false, begin, end - begin, 0, columns, to + begin * columns});
  });
  return {to, 1, columns, 0, 1};
}

// Threads share whichever of C's sides has more register tiles.
void direct(DType dtype, const Gemm& g) {
  const int64_t mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  MatrixView a = g.a;
  if (size_of(dtype) != acc_size(dtype))
    a = widened(dtype, a, g.a_transposed ? g.k : g.m, g.a_transposed ? g.m : g.k, Slot::packed_a);
  DirectArgs args = {};
  args.a = a.data;
  args.a_row = g.a_transposed ? a.col_stride : a.outer_stride;
  args.a_k = g.a_transposed ? a.outer_stride : a.col_stride;
  args.b = g.b.data;
  args.b_k = g.b.outer_stride;
  args.k = g.k;
  args.epilogue = g.epilogue;
  const bool by_rows = g.k <= tuning::kSkinny && g.m / mr > g.n / nr;
  const int64_t step = by_rows ? mr : nr, side = by_rows ? g.m : g.n, other = by_rows ? g.n : g.m;
  const int64_t grain = tuning::kParallelElements / std::max<int64_t>(1, step * other * g.k / 8) + 1;
  parallel_for(ceil_div(side, step), grain, [&](int64_t first, int64_t last) {
    DirectArgs mine = args;
    const int64_t begin = first * step, end = std::min(last * step, side);
    mine.row_begin = by_rows ? begin : 0;
    mine.row_end = by_rows ? end : g.m;
    mine.column_begin = by_rows ? 0 : begin;
    mine.column_end = by_rows ? g.n : end;
    kernels().gemm_direct[(int)dtype](mine);
  });
}

}  // namespace

GemmPath gemm_path(DType dtype, const Gemm& g) {
  const bool along_k = !g.a_transposed && g.b_transposed && g.a.col_stride == 1 && g.b.col_stride == 1;
  if (along_k && g.n <= tuning::kSkinny) return GemmPath::dot_few_columns;
  if (along_k && g.m <= tuning::kFewRows) return GemmPath::dot_few_rows;
  const bool half = size_of(dtype) != acc_size(dtype);
  const bool readable = g.b.col_stride == 1 && g.b.inner == 1 && (half ? g.a.col_stride == 1 : g.a.inner == 1);
  if (!g.b_transposed && readable && (g.m <= tuning::kSkinny || g.k <= tuning::kSkinny)) return GemmPath::direct;
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
  if (const int64_t parts = k_parts(g); parts > 1) return split_k(dtype, g, parts);
  switch (gemm_path(dtype, g)) {
    case GemmPath::dot_few_columns:
      return dot(dtype, g, false);
    case GemmPath::dot_few_rows:
      return dot(dtype, g, true);
    case GemmPath::direct:
      return direct(dtype, g);
    case GemmPath::packed:
      return multiply(dtype, g, thread_count());
  }
}

}  // namespace rf
