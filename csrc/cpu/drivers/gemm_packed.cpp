// The GEMM engine's loops around the micro-kernel, and the division of C among threads.
#include "cpu/drivers/gemm_packed.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

// The slots of the accumulator's size in which K is counted: a number to each, or two where the CPU multiplies pairs of
// bf16.
struct Slots {
  const PairKernels* pairs;  // or null
  int64_t numbers;           // of K

  Slots(DType dtype, const GemmProblem& g) : pairs(pair_kernels(dtype, g)), numbers(g.k) {}
  int64_t width() const { return pairs ? 2 : 1; }
  int64_t count() const { return round_up(ceil_div(numbers, width()), std::max<int64_t>(1, step())); }
  // What pairs' micro-kernel has of its own.
  int64_t mr(DType dtype) const { return pairs ? pairs->mr : kernels().mr[(int)dtype]; }
  int64_t nr(DType dtype) const { return pairs ? pairs->nr : kernels().nr[(int)dtype]; }
  int64_t step() const { return pairs ? pairs->step : 0; }
  int64_t chain() const { return pairs ? pairs->chain : tuning::kGemmChain; }
  int64_t block_rows() const { return pairs ? pairs->rows : tuning::kBlockRows; }
  int64_t group_columns() const { return pairs ? pairs->columns : tuning::kGroupColumns; }
  // Rows of A are cut into equal parts of about block_rows: fewer than so many are one.
  int64_t tallest_piece() const { return block_rows() * 3 / 2; }
};

// An operand of a product as the engine sees it: count x K, its memory's rows along K or across it.
struct Side {
  DType type;
  MatrixView view;
  bool across;
  int64_t count;
  Slots slots;

  Side(DType t, const MatrixView& v, bool rows_are_k, int64_t n, const Slots& s)
      : type(t), view(v), across(rows_are_k), count(n), slots(s) {
    // Columns of memory that are adjacent down them are rows of the transposed matrix.
    if (v.inner == 1 && v.outer_stride == 1 && v.col_stride != 1) {
      view = {v.data, 1, v.col_stride, 0, 1};
      across = !across;
    }
  }
  bool along_k() const { return !across && view.col_stride == 1; }
  // Whether its slots can be broadcast from where they lie; or steps of them loaded, each as long as a line of memory.
  // By layout alone, which decides the order of sums, never by address.
  bool in_place() const {
    const int64_t width = slots.width() * std::max<int64_t>(1, slots.step());
    return along_k() && view.inner == 1 && size_of(type) * slots.width() == acc_size(type) &&
           slots.numbers % width == 0 && view.outer_stride % width == 0;
  }
  // Lays out rows [i, i + n) of it as panels of the micro-kernel's A or B, of `k` slots from k0 on.
  void pack_as_a(int64_t i, int64_t n, int64_t k0, int64_t k, void* to) const {
    const PackArgs args = part(i, n, k0, k, to);
    if (slots.pairs)
      (along_k() ? slots.pairs->lay_out_a : slots.pairs->pack_a)[type == DType::f32](args);
    else
      (along_k() ? kernels().widen_a : kernels().pack_a)[(int)type](args);
  }
  void pack_as_b(int64_t i, int64_t n, int64_t k0, int64_t k, void* to) const {
    const PackArgs args = part(i, n, k0, k, to);
    slots.pairs ? slots.pairs->pack_b[type == DType::f32](args) : kernels().pack_b[(int)type](args);
  }
  // Its memory that packing will read; none if its layout is another.
  Region memory_of(Range rows, int64_t k0, int64_t k) const {
    const PackArgs a = part(rows.begin, rows.size(), k0, k, nullptr);
    const int64_t size = size_of(type), stride = view.outer_stride * size;
    if (view.col_stride != 1 || view.inner != 1 || k <= 0) return {};
    const char* data = (const char*)view.data;
    return across ? Region{data + a.k0 * stride + a.i0 * size, a.k, stride, a.count * size}
                  : Region{data + a.i0 * stride + a.k0 * size, a.count, stride, a.k * size};
  }

 private:
  PackArgs part(int64_t i, int64_t n, int64_t k0, int64_t k, void* to) const {
    const int64_t first = k0 * slots.width();
    return {.from = view,
            .across = across,
            .i0 = i,
            .count = n,
            .k0 = first,
            .k = std::min(k * slots.width(), slots.numbers - first),
            .to = to};
  }
};

// Where the sums of a K block wait for the next one.
enum class Waiting {
  nowhere,  // K is one block, or stays in tiles
  c,        // in C itself, which has their type; also what they are added to
  task,     // in scratch of the task, which sees all of K
  all       // in scratch for all tasks
};

// A product, planned. The micro-kernel broadcasts elements of A and loads vectors of B's packed panels. A longer side
// that can be read in place is A, and the shorter one is packed by all threads together before they share A's rows.
// Otherwise the longer side is B, of which each thread packs what it needs, and the shorter one is laid out for all.
// Where a micro-kernel loads A by steps, which are laid out as quickly as panels, A is X and C is computed as it lies,
// unless a W in place saves more than that; an X that is longer and cannot be read in place is laid out by whoever
// multiplies it.
struct Plan {
  Side a, b;
  bool transposed;  // A's rows are C's columns
  bool a_is_longer;
  DType c;    // type of C, its bias and its pre-activation
  int64_t k;  // slots, as all of K below
  int64_t threads = 1;
  int64_t kc = 1, chain = 1;         // K block, and the additions in a row within it
  int64_t most_kc = 1;               // what a K block may have at most
  int64_t k_count = 1;               // of K, at a time, of the side that is laid out for all; whole K blocks
  int64_t b_count = 0;               // rows of B at a time, where it is packed for all
  int64_t a_parts = 1, b_parts = 1;  // tasks
  Waiting waiting = Waiting::nowhere;
  // Deep blocks of few rows of A stay in the same tiles over all of K. Their sums then have another order than those of
  // blocks that wait, so it is decided by shape, and tasks are narrow enough for it with any number of threads.
  bool stays_in_tiles = false;

  // Of the side that is laid out for all threads.
  int64_t depth() const { return std::min(k_count, round_up(k, kc)); }
  int64_t a_task(int64_t mr) const { return ceil_div(ceil_div(a.count, mr), a_parts) * mr; }
  int64_t b_task(int64_t nr) const { return ceil_div(ceil_div(b_count, nr), b_parts) * nr; }
};

// What the engine assumes of a product and of its plan. A caller or a planner that breaks it is a bug of this library,
// which must not become a write to memory that is not ours.
void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("regfast: gemm: ") + what);
}
void check_product(DType dtype, const GemmProblem& g) {
  require(g.m >= 0 && g.n >= 0 && g.k >= 0, "expected sizes of at least 0");
  require(g.c && (g.m == 1 || g.c_stride >= g.n), "expected rows of C that do not overlap");
  require(!g.accumulate || c_type(dtype, g) == acc_dtype(dtype), "expected a C of the accumulator's type to add to");
  require(g.k == 0 || (g.a.data && g.b.data), "expected operands");
}
void check_plan(DType dtype, const GemmProblem& g, const Plan& p) {
  require(p.a.count == (p.transposed ? g.n : g.m) && p.b.count == (p.transposed ? g.m : g.n), "the plan has its sides");
  require(!p.a_is_longer || p.a.in_place() || p.a.slots.step(), "A, which is not laid out, can be read in place");
  require(p.kc >= 1 && p.k_count >= p.kc && p.k_count % p.kc == 0, "K is laid out in whole blocks");
  require(p.chain >= 1 && p.a_parts >= 1 && p.b_parts >= 1 && p.threads >= 1, "the plan has tasks");
  const bool wait = g.accumulate || (p.k > p.kc && !p.stays_in_tiles);
  require(wait == (p.waiting != Waiting::nowhere), "sums that wait have a place");
  require(p.waiting != Waiting::c || p.c == acc_dtype(dtype), "sums that wait in C have its type");
  require(p.waiting != Waiting::task || p.k_count >= p.k, "a task whose sums wait with it sees all of K");
  require(!p.stays_in_tiles || p.k_count >= p.k, "a task whose sums stay in tiles sees all of K");
}

Plan make_plan(DType dtype, const GemmProblem& g, int64_t threads) {
  const Slots slots(dtype, g);
  const int64_t acc = acc_size(dtype), mr = slots.mr(dtype), nr = slots.nr(dtype), k = slots.count();
  const Side x(g.wide_a ? acc_dtype(dtype) : dtype, g.a, g.a_transposed, g.m, slots);
  const Side w(g.wide_b ? acc_dtype(dtype) : dtype, g.b, !g.b_transposed, g.n, slots);
  // Few columns of a W across K: it costs less to pack than X, a task's rows of which are read again for each part of
  // W.
  const bool narrow = w.across && x.in_place() && g.n <= tuning::kNarrowColumns;
  // Storing C takes longer than so short a K: W is packed, however long it is, so that C is computed as it lies.
  const bool short_k = k <= tuning::kShortK && x.in_place();
  const bool w_is_longer = !short_k && (g.n >= g.m || (narrow && 2 * g.n >= g.m));
  const bool by_steps = slots.step() != 0;
  // To pack W takes longer than to transpose C.
  const bool w_in_place = w_is_longer && w.in_place() && g.m * tuning::kRowsOfTransposed <= g.k;
  const bool a_is_longer = by_steps ? !w_is_longer || w_in_place : (w_is_longer ? w : x).in_place();
  const bool transposed = by_steps ? w_in_place : w_is_longer == a_is_longer;
  Plan p = {transposed ? w : x, transposed ? x : w, transposed, a_is_longer, c_type(dtype, g), k};
  const double products = (double)g.m * (double)g.n * (double)std::max<int64_t>(g.k, 1);
  const double for_one = by_steps ? tuning::kAmxProductsPerThread : tuning::kProductsPerThread;
  p.threads = std::min<int64_t>(threads, 1 + (int64_t)(products / for_one));
  // K in equal parts, so that the last is not a sliver; and in whole steps, where there are some.
  const int64_t step = std::max<int64_t>(1, slots.step());
  const auto parts = [step](int64_t whole, int64_t part) {
    return std::max(step, round_up(ceil_div(whole, std::max<int64_t>(1, ceil_div(whole, part))), step));
  };
  const bool deep = !a_is_longer && !p.b.across;
  const int64_t laid_out = deep ? tuning::kDeepBlockK : std::max(tuning::kBlockK, slots.chain());
  p.most_kc = a_is_longer && !by_steps ? tuning::kBlockKInPlace : laid_out;
  p.kc = parts(k, p.most_kc);
  p.chain = parts(p.kc, slots.chain());
  p.b_count = a_is_longer ? std::min(round_up(p.b.count, nr), round_up(tuning::kPackedColumns, nr)) : p.b.count;
  const int64_t for_all = (a_is_longer ? p.b_count : p.a.count) * acc,
                budget = by_steps ? caches().l2 : caches().last / tuning::kCacheShare;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(k, p.kc));
  p.k_count = p.kc * std::max<int64_t>(1, std::min(blocks, budget / (for_all * p.kc)));
  // Half types: laying out all of K takes less scratch than keeping all of C's sums, where K is the shorter.
  const bool half = size_of(p.c) != acc;
  if (!a_is_longer && (p.a.in_place() || (half && k <= p.b.count))) p.k_count = p.kc * blocks;
  p.stays_in_tiles = deep && k > p.kc && p.k_count >= k && p.a.count < slots.tallest_piece();
  if (g.accumulate || (k > p.kc && !p.stays_in_tiles))
    p.waiting = !half ? Waiting::c : p.k_count >= k ? Waiting::task : Waiting::all;
  // Several tasks to a thread, for the balance; a side is cut up further where the other one gives too few.
  const int64_t tiles = ceil_div(p.a.count, mr), panels = ceil_div(p.b_count, nr);
  const int64_t wanted = p.threads == 1 ? 1 : p.threads * tuning::kTasksPerThread;
  if (a_is_longer) {
    const int64_t most = std::max<int64_t>(1, tiles / (tuning::kTaskTiles * p.threads)) * p.threads;
    p.a_parts =
        std::min({tiles, most, p.threads * ceil_div(std::max(wanted, p.a.count / slots.block_rows()), p.threads)});
    p.b_parts = std::min(panels, ceil_div(p.threads, p.a_parts));
  } else {
    // For few rows of A packing decides, and it wants long pieces of memory.
    const int64_t least = p.a.count < tuning::kPackingDecides && !deep ? p.threads : wanted;
    const int64_t columns = deep ? tuning::kDeepTaskColumns : tuning::kTaskColumns;
    const int64_t most = narrow ? std::max<int64_t>(1, p.b_count / slots.group_columns()) : panels;
    p.b_parts = std::min(most, p.threads * ceil_div(std::max(least, p.b_count / columns), p.threads));
    if (p.stays_in_tiles) p.b_parts = std::max(p.b_parts, ceil_div(panels, round_up(slots.group_columns(), nr) / nr));
    p.a_parts = std::min(tiles, ceil_div(p.threads, p.b_parts));
  }
  check_plan(dtype, g, p);
  return p;
}

// The place where sums of rows i of A and j of B wait.
void place_sums(Epilogue& e, DType dtype, const Plan& p, Range i, Range j) {
  if (p.waiting == Waiting::nowhere) return;
  if (p.waiting == Waiting::c) {
    e.partial = e.c;
    e.partial_stride = e.c_stride;
    return;
  }
  const Range &down = p.transposed ? j : i, &across = p.transposed ? i : j;
  const int64_t acc = acc_size(dtype);
  e.partial_stride = across.size();
  e.partial = (char*)scratch(Slot::partial, down.size() * across.size() * acc) -
              (down.begin * across.size() + across.begin) * acc;
}

// Where a block's A is read from: rows from i on, K from k0 on, where they lie.
void read_in_place(GemmBlockArgs& block, DType dtype, const Side& a, int64_t i, int64_t k0) {
  const int64_t stride = a.view.outer_stride / a.slots.width();
  block.a = (const char*)a.view.data + (i * stride + k0) * acc_size(dtype);
  block.a_row = stride;
  block.a_k = 1;
  block.a_panel = a.slots.mr(dtype) * stride;
}
// The same where a K block of A was laid out: widened rows, panels, or steps of rows.
void read_laid_out(GemmBlockArgs& block, DType dtype, const Side& a, const char* laid_out, int64_t i, int64_t k) {
  const int64_t mr = a.slots.mr(dtype), step = a.slots.step();
  block.a = laid_out + i * k * acc_size(dtype);
  block.a_row = step ? step : a.along_k() ? k : 1;
  block.a_k = !step && a.along_k() ? 1 : mr;
  block.a_panel = mr * k;
}

Region region_part(const Region& r, int64_t i, int64_t n) {
  const Range rows = part_of(r.rows, 1, i, n);
  return {(const char*)r.from + rows.begin * r.stride, rows.size(), r.stride, r.bytes};
}

// The rows of A that come after a block's, where products take less time than memory.
Region rows_below(const GemmBlockArgs& block, const Plan& p, int64_t rows, int64_t acc) {
  if (!p.a.slots.step() || rows <= 0) return {};
  const char* const from = (const char*)block.a + ceil_div(block.a_count, p.a.slots.pairs->mr) * block.a_panel * acc;
  return {from, rows, (block.a_k == 1 ? block.a_row : block.k) * acc, block.k * acc};
}

// Rows i of A, from where `block` reads them, times the packed rows j of B, in pieces that fit the caches. `block`
// holds the epilogue too.
void multiply_pieces(GemmBlockArgs block, DType dtype, const Plan& p, Range i, const char* b, Range j, int64_t k0,
                     int64_t k) {
  const int64_t acc = acc_size(dtype), mr = p.a.slots.mr(dtype), nr = p.a.slots.nr(dtype);
  // Equal parts of about block_rows: a sliver of rows would read all of B again for itself.
  const int64_t most = p.a.slots.block_rows(), parts = std::max<int64_t>(1, (i.size() + most / 2) / most);
  const int64_t rows = round_up(ceil_div(i.size(), parts), mr), group = round_up(p.a.slots.group_columns(), nr);
  const int64_t groups = ceil_div(j.size(), group), pieces = ceil_div(i.size(), rows) * groups;
  const Region next = block.next;
  int64_t piece = 0;
  block.k = k;
  block.chain = p.chain;
  block.transposed = p.transposed;
  block.last = k0 + k == p.k;
  const bool adds = !block.first && !block.continues, keeps = !block.last && !block.continued;
  require(!(adds || keeps) || block.epilogue.partial, "sums that wait have a place");
  block.b_is_far = group * k * acc > caches().l2;
  block.tiles = scratch(Slot::tiles, rows * std::min(group, round_up(j.size(), nr)) * acc);
  const char* a = (const char*)block.a;
  for (int64_t s = i.begin; s < i.end; s += rows) {
    block.a = a + (s - i.begin) / mr * block.a_panel * acc;
    block.a_index = s;
    block.a_count = std::min(rows, i.end - s);
    const Region below = next.rows ? Region{} : rows_below(block, p, std::min(rows, i.end - s - rows), acc);
    for (int64_t t = j.begin; t < j.end; t += group, ++piece) {
      block.next = next.rows ? region_part(next, piece, pieces) : region_part(below, (t - j.begin) / group, groups);
      block.b = b + (t - j.begin) * k * acc;
      block.b_index = t;
      block.b_count = std::min(group, j.end - t);
      p.a.slots.pairs ? p.a.slots.pairs->gemm_block[p.c == DType::f32](block) : kernels().gemm_block[(int)p.c](block);
    }
  }
}

// Lays out rows and K of a side for all threads: K blocks one behind another.
void lay_out(DType dtype, const Plan& p, const Side& side, int64_t width,
             void (Side::*pack)(int64_t, int64_t, int64_t, int64_t, void*) const, Range rows, Range depth, char* to) {
  const int64_t acc = acc_size(dtype), padded = round_up(rows.size(), width), blocks = ceil_div(depth.size(), p.kc);
  const int64_t step = std::max<int64_t>(1, tuning::kPackTask / (p.kc * width)) * width;
  const int64_t parts = ceil_div(padded, step);
  take_tasks(parts * blocks, p.threads, [&](int64_t task) {
    const int64_t block = task / parts * p.kc, k = std::min(p.kc, depth.size() - block), i = task % parts * step;
    (side.*pack)(rows.begin + i, std::min(step, rows.size() - i), depth.begin + block, k,
                 to + (block * padded + i * k) * acc);
  });
}

// The longer side in place, or laid out by whoever multiplies it.
void multiply_by_rows(DType dtype, const GemmProblem& g, const Plan& p) {
  const int64_t acc = acc_size(dtype), mr = p.a.slots.mr(dtype), nr = p.a.slots.nr(dtype);
  char* packed = (char*)scratch(Slot::packed_b, p.b_count * p.depth() * acc);
  for (int64_t j0 = 0; j0 < p.b.count; j0 += p.b_count) {
    const Range rows = {j0, std::min(j0 + p.b_count, p.b.count)};
    const int64_t padded = round_up(rows.size(), nr);
    Epilogue e = epilogue_of(g);
    if (p.waiting != Waiting::task) place_sums(e, dtype, p, {0, p.a.count}, rows);
    int64_t k0 = 0;
    do {  // once for an empty K too: C is written all the same
      const Range depth = {k0, std::min(k0 + p.k_count, p.k)};
      lay_out(dtype, p, p.b, nr, &Side::pack_as_b, rows, depth, packed);
      take_tasks(p.a_parts * p.b_parts, p.threads, [&](int64_t task) {
        const Range i = part_of(p.a.count, mr, task / p.b_parts, p.a_parts);
        const Range part = part_of(rows.size(), nr, task % p.b_parts, p.b_parts);
        const Range j = {rows.begin + part.begin, rows.begin + part.end};
        GemmBlockArgs block = {};
        block.epilogue = e;
        if (p.waiting == Waiting::task) place_sums(block.epilogue, dtype, p, i, j);
        int64_t at = depth.begin;
        do {
          const int64_t k = std::min(p.kc, depth.end - at);
          const char* b = packed + ((at - k0) * padded + part.begin * k) * acc;
          if (p.a.in_place()) {
            read_in_place(block, dtype, p.a, i.begin, at);
          } else {
            char* const a = (char*)scratch(Slot::packed_a, round_up(i.size(), mr) * k * acc);
            p.a.pack_as_a(i.begin, i.size(), at, k, a);
            read_laid_out(block, dtype, p.a, a, 0, k);
          }
          block.first = at == 0 && !g.accumulate;
          multiply_pieces(block, dtype, p, i, b, j, at, k);
          at += p.kc;
        } while (at < depth.end);
      });
      k0 += p.k_count;
    } while (k0 < p.k);
  }
}

// The longer side packed, by whoever multiplies it.
void multiply_by_columns(DType dtype, const GemmProblem& g, const Plan& p) {
  const int64_t acc = acc_size(dtype), mr = p.a.slots.mr(dtype), nr = p.a.slots.nr(dtype);
  const bool in_place = p.a.in_place();
  const int64_t rows = round_up(p.a.count, mr);
  char* laid_out = in_place ? nullptr : (char*)scratch(Slot::packed_a, rows * p.depth() * acc);
  Epilogue e = epilogue_of(g);
  if (p.waiting != Waiting::task) place_sums(e, dtype, p, {0, p.a.count}, {0, p.b.count});
  int64_t k0 = 0;
  do {  // once for an empty K too
    const Range depth = {k0, std::min(k0 + p.k_count, p.k)};
    if (!in_place) lay_out(dtype, p, p.a, mr, &Side::pack_as_a, {0, p.a.count}, depth, laid_out);
    take_tasks(p.b_parts * p.a_parts, p.threads, [&](int64_t task) {
      const Range j = part_of(p.b.count, nr, task / p.a_parts, p.b_parts);
      const Range i = part_of(p.a.count, mr, task % p.a_parts, p.a_parts);
      // For few rows of A, what packing waits for memory shows: it is asked for while the K block before is multiplied.
      const bool few = i.size() < tuning::kPackingDecides;
      // All K blocks in the same tiles: also where that is the same order of sums, block after block in any place,
      // which it is not where sums go on from those of the block before.
      const bool same_order = p.chain == p.kc && !g.accumulate && !p.a.slots.step();
      const bool one_piece =
          p.stays_in_tiles || (same_order && p.k_count >= p.k && i.size() < p.a.slots.tallest_piece() &&
                               j.size() <= p.a.slots.group_columns());
      GemmBlockArgs block = {};
      block.epilogue = e;
      if (p.waiting == Waiting::task) place_sums(block.epilogue, dtype, p, i, j);
      int64_t at = depth.begin;
      do {
        const int64_t k = std::min(p.kc, depth.end - at);
        char* b = (char*)scratch(Slot::packed_b, round_up(j.size(), nr) * k * acc);
        p.b.pack_as_b(j.begin, j.size(), at, k, b);
        in_place ? read_in_place(block, dtype, p.a, i.begin, at)
                 : read_laid_out(block, dtype, p.a, laid_out + (at - k0) * rows * acc, i.begin, k);
        const int64_t then = std::min(p.kc, depth.end - at - k);
        if (few) block.next = p.b.memory_of(j, at + k, then);
        block.first = (one_piece || at == 0) && !g.accumulate;
        block.continues = one_piece && at > 0;
        block.continued = one_piece && then > 0;
        multiply_pieces(block, dtype, p, i, b, j, at, k);
        at += p.kc;
      } while (at < depth.end);
    });
    k0 += p.k_count;
  } while (k0 < p.k);
}

}  // namespace

void gemm_packed(DType dtype, const GemmProblem& g, int64_t threads) {
  check_product(dtype, g);
  const Plan p = make_plan(dtype, g, threads);
  p.a_is_longer ? multiply_by_rows(dtype, g, p) : multiply_by_columns(dtype, g, p);
}

int64_t gemm_scratch_bytes(DType dtype, const GemmProblem& g, int64_t threads) {
  const Plan p = make_plan(dtype, g, threads);
  const int64_t acc = acc_size(dtype), mr = p.a.slots.mr(dtype), nr = p.a.slots.nr(dtype);
  const Slots& s = p.a.slots;
  const int64_t tiles = p.threads * round_up(s.tallest_piece(), mr) * round_up(s.group_columns(), nr);
  const int64_t for_all = p.a_is_longer ? p.b_count : p.a.in_place() ? 0 : round_up(p.a.count, mr);
  // A task has no more of A's tiles (a_parts), nor a K block more slots: bounds that grow with the product's sides, as
  // those who look for the largest that fits some memory want it.
  const int64_t most_rows = std::min(round_up(p.a.count, mr), 2 * tuning::kTaskTiles * mr);
  const int64_t task = !p.a_is_longer ? p.b_task(nr) : p.a.in_place() ? 0 : most_rows;
  const int64_t panels = p.threads * std::min(round_up(p.k, p.kc), p.most_kc) * task;
  const int64_t waiting = p.waiting == Waiting::task  ? p.threads * p.a_task(mr) * p.b_task(nr)
                          : p.waiting == Waiting::all ? p.a.count * std::min(p.b_count, p.b.count)
                                                      : 0;
  return (tiles + for_all * p.depth() + panels + waiting) * acc;
}

}  // namespace rf
