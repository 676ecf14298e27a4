// The choice of a way to multiply; few outputs with K in parts, and small operands where they lie.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/drivers/gemm_packed.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

// How many parts K is cut into where C alone gives the threads too little to share. By shape, not by the number of
// threads: the same bits with any number of them.
int64_t k_parts(const GemmProblem& g) {
  const bool affine = (!g.a_transposed || g.a.inner == 1) && (g.b_transposed || g.b.inner == 1);
  if (!affine || g.m * g.n > tuning::kSplitOutputs || std::max(g.m, g.n) > tuning::kSplitSide) return 1;
  return std::max<int64_t>(1, std::min(tuning::kMostSplits, g.k / tuning::kSplitK));
}

// C from its sums (acc, m x n): a block without products adds them to nothing and finishes C.
void finish(DType dtype, const GemmProblem& g, void* sums) {
  GemmBlockArgs block = {};
  block.a = block.b = sums;
  block.chain = 1;
  block.last = true;
  block.epilogue = epilogue_of(g);
  block.epilogue.partial = sums;
  block.epilogue.partial_stride = g.n;
  const int64_t mr = kernels().mr[(int)dtype], nr = kernels().nr[(int)dtype];
  block.a_count = g.m;
  block.b_count = g.n;
  block.tiles = scratch(Slot::tiles, round_up(g.m, mr) * round_up(g.n, nr) * acc_size(dtype));
  kernels().gemm_block[(int)c_type(dtype, g)](block);
}

// Rows of both factors lie along K, in the type they are multiplied in, each at a distance from the one before it.
bool rows_along_k(DType dtype, const GemmProblem& g) {
  return size_of(dtype) == acc_size(dtype) && !g.a_transposed && g.b_transposed && g.a.col_stride == 1 &&
         g.b.col_stride == 1 && g.a.inner == 1 && g.b.inner == 1;
}

void dot(DType dtype, const GemmProblem& g, bool few_rows) {
  const int64_t many = few_rows ? g.n : g.m, few = few_rows ? g.m : g.n;
  const int64_t grain = tuning::kParallelElements / (few * g.k / 8 + tuning::kRowElements) + 1;
  const bool far = short_and_far(g.k * size_of(dtype), many);
  const PairKernels* const pairs = pair_kernels(dtype, g);
  parallel_for(many, grain, [&](int64_t begin, int64_t end) {
    const DotArgs args = {.many = few_rows ? g.b : g.a,
                          .few = few_rows ? g.a : g.b,
                          .begin = begin,
                          .end = end,
                          .few_rows = few,
                          .k = g.k,
                          .many_are_columns = few_rows,
                          .many_are_far = far,
                          .epilogue = epilogue_of(g)};
    pairs ? pairs->gemm_dot(args) : kernels().gemm_dot[(int)dtype](args);
  });
}

// Parts of K, one to a task, and their sums added in order.
void split_k(DType dtype, const GemmProblem& g, int64_t parts) {
  const int64_t acc = acc_size(dtype), size = g.m * g.n;
  char* sums = (char*)scratch(Slot::splits, parts * size * acc);
  const bool few_columns = g.n <= tuning::kSkinny, few_rows = g.m <= tuning::kFewRows;
  const bool dots = (few_columns || few_rows) && rows_along_k(dtype, g);
  take_tasks(parts, thread_count(), [&](int64_t task) {
    const Range k = part_of(g.k, tuning::kGemmChain, task, parts);
    GemmProblem part = g;
    part.k = k.size();
    const auto from = [&](MatrixView& m, bool rows_are_k) {
      const int64_t at = rows_are_k ? m.row_offset(k.begin) : k.begin * m.col_stride;
      m.data = (const char*)m.data + at * size_of(dtype);
    };
    from(part.a, g.a_transposed);
    from(part.b, !g.b_transposed);
    part.wide_c = true;
    part.c = sums + task * size * acc;
    part.c_stride = g.n;
    part.bias = nullptr;
    part.activation = Activation::none;
    part.preactivation = nullptr;
    dots ? dot(dtype, part, !few_columns) : gemm_packed(dtype, part, 1);
  });
  const auto add = [&](auto* first) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) first[i] += first[part * size + i];
  };
  dtype == DType::f64 ? add((double*)sums) : add((float*)sums);
  finish(dtype, g, sums);
}

// A matrix of a half type, widened to float for kernels that read their operands in place.
MatrixView widened(DType dtype, const MatrixView& m, int64_t rows, int64_t columns, Slot slot) {
  float* to = (float*)scratch(slot, rows * columns * (int64_t)sizeof(float));
  parallel_for(rows, tuning::kParallelElements / std::max<int64_t>(1, columns) + 1, [&](int64_t begin, int64_t end) {
    kernels().widen_a[(int)dtype]({.from = m,
                                   .across = false,
                                   .i0 = begin,
                                   .count = end - begin,
                                   .k0 = 0,
                                   .k = columns,
                                   .to = to + begin * columns});
  });
  return {to, 1, columns, 0, 1};
}

// Threads share whichever of C's sides has more register tiles.
void direct(DType dtype, const GemmProblem& g) {
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
  args.b_is_far = g.k * g.n * acc_size(dtype) > 2 * caches().l2;  // by shape alone: it decides the order of sums
  args.epilogue = epilogue_of(g);
  const bool by_rows = g.k <= tuning::kSkinny && (g.m >= 4 * mr * thread_count() || g.m / mr > g.n / nr);
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

// A matrix's rows as tiles of lanes have them; `across`: its columns instead.
RowLayout lanes_of(const MatrixView& m, bool across) {
  if (across) return {1, m.col_stride, 0, m.outer_stride};
  return {m.inner, m.outer_stride, m.row_stride, m.col_stride};
}

void lanes(DType dtype, const GemmProblem& g) {
  LanesArgs args = {};
  args.a = g.a.data;
  args.a_layout = lanes_of(g.a, g.a_transposed);
  args.b = g.b.data;
  args.b_layout = lanes_of(g.b, !g.b_transposed);
  args.n = g.n;
  args.k = g.k;
  args.epilogue = epilogue_of(g);
  const int64_t grain = tuning::kParallelElements / (g.n * g.k / 8 + g.n + g.k) + 1;
  parallel_for(g.m, grain, [&](int64_t begin, int64_t end) { kernels().gemm_lanes[(int)dtype](args, begin, end); });
}

// Sums over blocks of rows, added in order. They are A's rows and B's, along which K runs.
void lane_sums(DType dtype, const GemmProblem& g) {
  LanesArgs args = {};
  args.a = g.a.data;
  args.a_layout = lanes_of(g.a, false);
  args.b = g.b.data;
  args.b_layout = lanes_of(g.b, false);
  args.n = g.n;
  args.k = g.m;
  const int64_t block = tuning::kLaneSumRows, blocks = ceil_div(g.k, block), size = g.m * g.n, acc = acc_size(dtype);
  char* parts = (char*)scratch(Slot::splits, (blocks + 1) * size * acc);
  const int64_t grain = tuning::kParallelElements / (block * (size / 8 + g.m + g.n)) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      kernels().gemm_lane_sums[(int)dtype](args, b * block, std::min(g.k, (b + 1) * block), parts + b * size * acc);
  });
  char* sums = parts + blocks * size * acc;
  add_parts(acc_dtype(dtype), parts, blocks, size, size, sums);
  finish(dtype, g, sums);
}

// One output of rows that are adjacent across k: a row of C transposed, to which A is a matrix with adjacent columns.
// The output's bias becomes one for each column. Types that differ would have to change places with the factors.
bool is_column_of_transposed(const GemmProblem& g) {
  return g.n == 1 && g.m > 1 && !g.wide_a && !g.wide_b && !g.wide_c && !g.a_transposed && g.a.inner == 1 &&
         g.a.outer_stride == 1 && g.a.col_stride != 1 && g.b_transposed && g.b.col_stride == 1 && g.c_stride == 1 &&
         g.bias_rows == 1;
}
GemmProblem as_row(DType dtype, const GemmProblem& g) {
  GemmProblem row = g;
  std::swap(row.m, row.n);
  row.a = g.b;
  row.b = {g.a.data, 1, g.a.col_stride, 0, 1};
  row.b_transposed = false;
  row.c_stride = g.m;
  if (g.bias) {
    void* const biases = scratch(Slot::tile, g.m * size_of(dtype));
    const auto fill = [&](auto* to) { std::fill(to, to + g.m, *(decltype(to))g.bias); };
    size_of(dtype) == 8   ? fill((uint64_t*)biases)
    : size_of(dtype) == 4 ? fill((uint32_t*)biases)
                          : fill((uint16_t*)biases);
    row.bias = biases;
  }
  return row;
}

// Rows or columns [begin, end) of C.
GemmProblem part_of_c(DType dtype, const GemmProblem& g, bool rows, int64_t begin, int64_t end) {
  GemmProblem part = g;
  (rows ? part.m : part.n) = end - begin;
  MatrixView& factor = rows ? part.a : part.b;
  factor.data = (const char*)factor.data + begin * factor.outer_stride * size_of(dtype);
  const int64_t size = size_of(c_type(dtype, g)), at = begin * (rows ? g.c_stride : 1) * size;
  part.c = (char*)g.c + at;
  if (g.preactivation) part.preactivation = (char*)g.preactivation + at;
  if (g.bias && !rows) part.bias = (const char*)g.bias + begin * size;
  return part;
}

// Up to so many rows are dot products: kFewRows, and of long ones what would fill most of a panel of the engine's B.
int64_t few_rows(DType dtype, const GemmProblem& g, const PairKernels* pairs) {
  if (pairs) return pairs->step ? tuning::kFewForSquares : tuning::kFewRowsOfPairs;
  if (g.k < tuning::kDotK || !rows_along_k(dtype, g)) return tuning::kFewRows;
  return std::max(tuning::kFewRows, kernels().nr[(int)dtype] * 2 / 3);
}

// Of a shorter side of some panels and a rest that would leave the last one mostly empty, where the rest begins; else
// 0.
int64_t whole_panels(DType dtype, const GemmProblem& g) {
  const int64_t shorter = std::min(g.m, g.n), panel = kernels().nr[(int)dtype], rest = shorter % panel;
  const int64_t most = panel * std::min(g.k, tuning::kDotK) / (2 * tuning::kDotK);
  const bool splits = 0 < rest && rest <= most && panel < shorter && shorter < tuning::kFewPanels * panel;
  return splits && rows_along_k(dtype, g) && g.bias_rows == 1 ? shorter - rest : 0;
}

// Whether dot products of rows along K with a few others take less than a panel that those fill in part: vectors of
// multiply-adds, and what a sum costs. Of half types without pairs, dot products widen both sides again and again.
bool dots_win(DType dtype, const GemmProblem& g, const PairKernels* pairs) {
  if (pairs && pairs->step) return g.n <= tuning::kFewForSquares;
  if (g.n <= tuning::kFewColumnsOfDots || g.m < tuning::kSkinny) return true;
  if (size_of(dtype) != acc_size(dtype) && !pairs) return g.k > tuning::kDotK;
  const int64_t panel = kernels().nr[(int)dtype], lanes = kernels().lanes[(int)dtype],
                numbers = pairs ? 2 * lanes : lanes;
  const double packed = (double)(round_up(g.n, panel) / lanes * g.k) / (pairs ? 2 : 1);
  return (double)g.n * (tuning::kDotVector * (double)ceil_div(g.k, numbers) + tuning::kDotSum) < packed;
}

bool both_few(int64_t a, int64_t b) { return std::max(a, b) <= tuning::kFewSides; }

// Whether the library under ATen multiplies bf16 faster than our squares do on AMX.
bool library_beats_squares(int64_t m, int64_t n, int64_t k, bool a_across) {
  const bool few = m <= tuning::kFewRowsOfPairs || n <= tuning::kFewForSquares, short_k = k <= tuning::kShortK;
  if (few || m * n * k < tuning::kLibraryProducts) return false;
  if (short_k) return m * n < tuning::kSquaresResults;
  return !a_across && m * n * k > tuning::kSquaresProducts;
}

}  // namespace

const PairKernels* pair_kernels(DType dtype, const GemmProblem& g) {
  return dtype == DType::bf16 && g.m * g.n * g.k > tuning::kFewPairs ? kernels().pairs : nullptr;
}

bool short_and_far(int64_t row_bytes, int64_t rows) {
  return row_bytes < tuning::kShortRow && rows * row_bytes > 2 * caches().l2;
}

GemmPath gemm_path(DType dtype, const GemmProblem& g) {
  const bool a_walks = !g.a_transposed || g.a.inner == 1, b_is_plain = g.b.inner == 1;
  const bool along_k = !g.a_transposed && g.b_transposed && g.a.col_stride == 1 && g.b.col_stride == 1;
  const bool short_dots = along_k && g.n <= tuning::kShortDots && g.k * acc_size(dtype) > tuning::kShortDotBytes;
  const PairKernels* const pairs = pair_kernels(dtype, g);
  // The most columns that lanes have are whole panels and packed for less; pairs are from most of a panel on.
  const bool half = size_of(dtype) != acc_size(dtype);
  const bool fill_panels = along_k && g.m >= tuning::kSkinny &&
                           (pairs ? 2 * g.n > kernels().nr[(int)dtype] : g.n == tuning::kSkinny && !half);
  if (both_few(g.n, g.k) && !short_dots && !fill_panels && g.k > 0 && g.m >= tuning::kLeastLanes && a_walks &&
      b_is_plain && g.bias_rows == 1)
    return GemmPath::lanes;
  if (both_few(g.m, g.n) && g.k >= tuning::kLeastLanes && g.a_transposed && !g.b_transposed) return GemmPath::lane_sums;
  if (along_k && g.n <= tuning::kSkinny && dots_win(dtype, g, pairs)) return GemmPath::dot_few_columns;
  if (along_k && g.m <= few_rows(dtype, g, pairs)) return GemmPath::dot_few_rows;
  const bool readable = g.b.col_stride == 1 && g.b.inner == 1 && (half ? g.a.col_stride == 1 : g.a.inner == 1);
  if (!g.b_transposed && readable && !pairs && (g.m <= tuning::kSkinny || g.k <= tuning::kSkinny))
    return GemmPath::direct;
  return GemmPath::packed;
}

const char* gemm_by_aten(DType dtype, int64_t m, int64_t n, int64_t k, bool a_across) {
  enum class Force { neither, own, aten };
  static const Force force = [] {
    const char* v = std::getenv("REGFAST_GEMM");
    if (!v || !*v || !std::strcmp(v, "auto")) return Force::neither;
    if (!std::strcmp(v, "own")) return Force::own;
    if (!std::strcmp(v, "aten")) return Force::aten;
    throw std::runtime_error(std::string("REGFAST_GEMM: expected auto, own or aten, got ") + v);
  }();
  if (force != Force::neither) return force == Force::aten ? "REGFAST_GEMM=aten" : nullptr;
  const PairKernels* const pairs = dtype == DType::bf16 ? kernels().pairs : nullptr;
  const bool skinny = n <= tuning::kSkinny || m <= tuning::kFewRows || k <= tuning::kSkinny;
  const bool wins = pairs && pairs->step
                        ? library_beats_squares(m, n, k, a_across)
                        : !skinny && m * n * k >= tuning::kLibraryProducts && library_gemm_wins(dtype, pairs);
  return wins ? "measured to be faster on CPUs like this one" : nullptr;
}

void gemm(DType dtype, GemmProblem g) {
  if (g.m == 0 || g.n == 0) return;
  // A column whose numbers are adjacent is a row too, along the columns of C.
  if (g.k == 1 && g.b_transposed && g.b.inner == 1 && g.b.outer_stride == 1) {
    g.b = {g.b.data, 1, g.n, 0, 1};
    g.b_transposed = false;
  }
  if (is_column_of_transposed(g)) g = as_row(dtype, g);
  const bool mixed = (g.wide_a || g.wide_b || g.wide_c) && acc_dtype(dtype) != dtype;
  if (mixed || g.accumulate) return gemm_packed(dtype, g, thread_count());
  const GemmPath path = gemm_path(dtype, g);
  const int64_t parts = path == GemmPath::lane_sums ? 1 : k_parts(g);
  if (parts > 1) return split_k(dtype, g, parts);
  switch (path) {
    case GemmPath::lanes:
      return lanes(dtype, g);
    case GemmPath::lane_sums:
      return lane_sums(dtype, g);
    case GemmPath::dot_few_columns:
      return dot(dtype, g, false);
    case GemmPath::dot_few_rows:
      return dot(dtype, g, true);
    case GemmPath::direct:
      return direct(dtype, g);
    case GemmPath::packed:
      if (const int64_t whole = whole_panels(dtype, g)) {
        const bool rows = g.m <= g.n;
        gemm_packed(dtype, part_of_c(dtype, g, rows, 0, whole), thread_count());
        return dot(dtype, part_of_c(dtype, g, rows, whole, rows ? g.m : g.n), rows);
      }
      return gemm_packed(dtype, g, thread_count());
  }
}

}  // namespace rf
