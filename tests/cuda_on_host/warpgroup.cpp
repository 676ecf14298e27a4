// What the four warps of a warpgroup do together: products of matrices in shared memory (wgmma) by a unit that works
// beside them, and handing over registers (setmaxnreg). After the PTX manual.
#include <algorithm>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine.h"

namespace cuda_on_host {
namespace {

constexpr int kThreads = 128, kWarps = 4, kSums = 128;       // of a warpgroup; of a thread
constexpr int kM = 64, kN = 256, kK = 16;                    // of a product
constexpr uint32_t kSharedBase = 1024, kSwizzleAtom = 1024;  // the system has the first KiB of shared memory

Warpgroup& warpgroup_of(const Thread& t) { return t.block->warpgroups[t.local / kThreads]; }
Thread* first_of(const Thread& t) { return t.block->threads + t.local / kThreads * kThreads; }

// Waits for all threads of the warpgroup, which have to come with the same instruction. The last to come runs `finish`
// and lets the others go on if it returns true. Payloads are the threads' own.
void meet(const char* what, Site site, void* payload, bool (*finish)(Warpgroup&, Thread* threads, Site)) {
  Thread& t = *machine.current;
  Warpgroup& g = warpgroup_of(t);
  step(t);
  if (g.arrived > 0 && (g.site.line != site.line || std::strcmp(g.what, what)))
    fault(Kind::divergence,
          std::string(what) + " while other threads of the warpgroup wait at " + g.what + ", " + place(g.site), site);
  g.what = what;
  g.site = site;
  g.payloads[t.local % kThreads] = payload;
  if (++g.arrived < kThreads) return wait_for(what, site);
  g.arrived = 0;
  if (!finish(g, first_of(t), site)) return wait_for(what, site);
  for (int i = 0; i < kThreads; ++i)
    if (first_of(t)[i].state == State::waiting) make_ready(first_of(t)[i]);
}

// ---- products ------------------------------------------------------------------------------------------------------

// The fields of a matrix descriptor. Of its swizzles the emulator has that over 128 bytes.
struct Matrix {
  uint32_t start, leading, stride;
  bool across;  // rows of memory run across K
};

Matrix decoded(uint64_t bits, bool across, Site site) {
  const auto field = [&](int at) { return (uint32_t)(bits >> at & 0x3fff) << 4; };
  const Matrix m = {field(0), field(16), field(32), across};
  if (bits >> 62 != 1) fault(Kind::descriptor, "wgmma: a matrix that is not swizzled over 128 bytes", site);
  if ((bits >> 49 & 7) != 0 || m.start / 128 % 8 != 0)
    fault(Kind::descriptor, "wgmma: a matrix whose rows do not begin where the swizzle's pattern does", site);
  if (m.stride % kSwizzleAtom || (across && m.leading % kSwizzleAtom))
    fault(Kind::descriptor, "wgmma: strides are whole patterns of the swizzle, 1024 bytes", site);
  return m;
}

// Eight elements that lie together: along memory's rows from (mn, k) on.
uint32_t chunk_at(const Matrix& m, int mn, int k) {
  return m.across ? swizzled(m.start + mn / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + mn % 64 * 2)
                  : swizzled(m.start + mn / 8 * m.stride + mn % 8 * 128 + k * 2);
}
template <class F>
void each_chunk(const Matrix& m, int span, F&& f) {
  for (int mn = 0; mn < span; mn += m.across ? 8 : 1)
    for (int k = 0; k < kK; k += m.across ? 1 : 8) f(mn, k, chunk_at(m, mn, k));
}

// Whether the unit may read the operand now; what is to overwrite it has to wait for the group.
void check_operand(Block& b, const Matrix& m, int span, SharedAccess& read) {
  each_chunk(m, span, [&](int, int, uint32_t at) {
    check_shared(read, b, b.dynamic, b.dynamic.begin + ((int64_t)at - kSharedBase), 16);
  });
}

template <class F>
void read_operand(const Block& b, const Matrix& m, int span, Factors type, F&& put) {
  each_chunk(m, span, [&](int mn, int k, uint32_t at) {
    uint16_t bits[8];
    std::memcpy(bits, b.dynamic.begin + ((int64_t)at - kSharedBase), sizeof bits);
    for (int i = 0; i < 8; ++i)
      put(mn + (m.across ? i : 0), k + (m.across ? 0 : i),
          type == Factors::bf16 ? __bfloat162float(__nv_bfloat16{bits[i]}) : __half2float(__half{bits[i]}));
  });
}

// Thread 32 w + l has d[4 j + 2 h + i] = element (16 w + 8 h + l / 4, 8 j + 2 (l % 4) + i).
float& sum_at(const WarpgroupProduct& p, int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2;
  return p.d[row / 16 * 32 + lane][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
}

void multiply(const Block& b, const WarpgroupProduct& p) {
  static float rows[kM][kK], columns[kK][kN];
  const Site none = Site::here();
  read_operand(b, decoded(p.a, p.a_across, none), kM, p.type, [](int m, int k, float x) { rows[m][k] = x; });
  read_operand(b, decoded(p.b, p.b_across, none), kN, p.type, [](int n, int k, float x) { columns[k][n] = x; });
  for (int i = 0; i < kM; ++i) {
    double sum[kN] = {};  // the hardware's order and rounding of these sums is not documented
    for (int k = 0; k < kK; ++k) {
      const double factor = rows[i][k];
      for (int j = 0; j < kN; ++j) sum[j] += factor * columns[k][j];
    }
    for (int j = 0; j < kN; ++j) {
      float& d = sum_at(p, i, j);
      d = (float)(p.add ? d + sum[j] : sum[j]);
    }
  }
}

void run_products(const Block& b, Warpgroup& g, uint32_t last_group) {
  size_t n = 0;
  for (; n < g.products.size() && g.products[n].group <= last_group; ++n) multiply(b, g.products[n]);
  g.products.erase(g.products.begin(), g.products.begin() + (long)n);
}

struct ProductCall {
  float* d;
  WarpgroupProduct product;
};

bool start_product(Warpgroup& g, Thread* threads, Site site) {
  Block& b = *threads->block;
  WarpgroupProduct p = ((ProductCall*)g.payloads[0])->product;
  for (int w = 1; w < kWarps; ++w)
    if (g.groups[w] != g.groups[0])
      fault(Kind::divergence, "wgmma: the warps of the warpgroup have committed groups at different places", site);
  // What all of its threads know.
  std::vector<uint32_t> seen = threads[0].seen;
  for (int i = 0; i < kThreads; ++i) {
    const ProductCall& c = *(ProductCall*)g.payloads[i];
    if (c.product.a != p.a || c.product.b != p.b || c.product.add != p.add)
      fault(Kind::divergence, "wgmma: threads of a warpgroup with different operands", site);
    p.d[i] = c.d;
    const auto& other = threads[i].seen;
    if (seen.size() > other.size()) seen.resize(other.size());
    for (size_t u = 0; u < seen.size(); ++u) seen[u] = std::min(seen[u], other[u]);
  }
  if (g.unit < 0) g.unit = machine.units++;
  p.group = g.groups[0] + 1;
  SharedAccess read = {{&b, -1, &seen}, unit_stamp(g.unit, p.group), Access::read, nullptr, site};
  check_operand(b, decoded(p.a, p.a_across, site), kM, read);
  check_operand(b, decoded(p.b, p.b_across, site), kN, read);
  for (int i = 0; i < kThreads; ++i) {
    auto& sums = threads[i].sums;
    const char* begin = (const char*)p.d[i];
    if (sums.empty() || sums.back().begin != begin || sums.back().group != p.group) sums.push_back({begin, p.group});
  }
  g.products.push_back(p);
  if (at_once()) run_products(b, g, p.group);
  return true;
}

struct WarpInstruction {
  Thread* thread;
  int pending;
};

void warp_of_warpgroup(const char* what, int pending, Finish finish, Site site) {
  WarpInstruction mine = {machine.current, pending};
  step(*mine.thread);
  warp_call(~0u, what, &mine, finish, site);
}

}  // namespace

uint32_t shared_address(const void* p) {
  return (uint32_t)((const char*)p - machine.current->block->dynamic.begin) + kSharedBase;
}

// Orders what the threads do with registers before what products do with them.
void wgmma_fence(Site site) {
  warp_of_warpgroup(
      "wgmma.fence", 0,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "wgmma.fence");
        for (int l = 0; l < 32; ++l) {
          Thread& t = *((WarpInstruction*)payloads[l])->thread;
          forget_stack_accesses(t);
          t.fenced = true;
        }
      },
      site);
}

void wgmma_commit(Site site) {
  warp_of_warpgroup(
      "wgmma.commit_group", 0,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "wgmma.commit_group");
        const Thread& t = *((WarpInstruction*)payloads[0])->thread;
        ++warpgroup_of(t).groups[t.local % kThreads / 32];
      },
      site);
}

void wgmma_wait(int pending, Site site) {
  warp_of_warpgroup(
      "wgmma.wait_group", pending,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "wgmma.wait_group");
        const WarpInstruction& first = *(WarpInstruction*)payloads[0];
        Warpgroup& g = warpgroup_of(*first.thread);
        const uint32_t committed = g.groups[first.thread->local % kThreads / 32];
        if (committed <= (uint32_t)first.pending || g.unit < 0) return;
        const uint32_t over = committed - first.pending;
        run_products(*first.thread->block, g, over);
        for (int l = 0; l < 32; ++l) {
          Thread& t = *((WarpInstruction*)payloads[l])->thread;
          set_seen(t.seen, unit_index(g.unit), over);
          t.sums.erase(std::remove_if(t.sums.begin(), t.sums.end(), [&](const Sums& s) { return s.group <= over; }),
                       t.sums.end());
        }
      },
      site);
}

void wgmma(float* d, uint64_t a, uint64_t b, Factors type, bool a_across, bool b_across, bool add, Site site) {
  const Thread& t = *machine.current;
  const size_t word = (size_t)((char*)d - t.fiber->stack) / 4;
  if (word + kSums > (size_t)kStackBytes / 4) fault(Kind::registers, "wgmma: sums that are not a local array", site);
  if (!t.fenced) fault(Kind::registers, "wgmma with no wgmma.fence before it", site);
  for (size_t i = word; i < word + kSums; ++i)
    if (t.touched[i / 64] >> i % 64 & 1)
      fault(Kind::registers, "wgmma: its sums were used by the thread, with no wgmma.fence since", site);
  ProductCall mine = {d, {{}, a, b, type, a_across, b_across, add, 0}};
  meet("wgmma", site, &mine, start_product);
}

void forget_stack_accesses(Thread& t) {
  t.touched.resize(kStackBytes / 4 / 64);
  for (size_t i = t.touched_begin; i < t.touched_end; ++i) t.touched[i] = 0;
  t.touched_begin = t.touched.size();
  t.touched_end = 0;
}

// The bits are of words of the stack; the sums of a product under way are nobody's.
void note_stack_access(Thread& t, const char* p, int64_t bytes, const void* address) {
  if (!t.watched) return;
  for (const Sums& s : t.sums)
    if (p < s.begin + kSums * 4 && p + bytes > s.begin)
      fault(Kind::registers, "sums of wgmma used before the wait for them", address);
  const size_t begin = (size_t)(p - t.fiber->stack) / 4;
  const size_t end = std::min((size_t)(p - t.fiber->stack + bytes + 3) / 4, t.touched.size() * 64);
  for (size_t i = begin; i < end; ++i) t.touched[i / 64] |= uint64_t(1) << i % 64;
  t.touched_begin = std::min(t.touched_begin, begin / 64);
  t.touched_end = std::max(t.touched_end, (end + 63) / 64);
}

void check_end_of_products(const Thread& t) {
  if (!t.sums.empty()) fault(Kind::registers, "a thread ends with products of wgmma under way");
}

// ---- registers -----------------------------------------------------------------------------------------------------

namespace {

// Gives registers to warpgroups that wait for them, as long as there are enough.
void hand_out(Block& b) {
  for (Warpgroup& g : b.warpgroups) {
    if (g.wanted == 0 || g.wanted * kThreads > b.free_registers) continue;
    b.free_registers -= g.wanted * kThreads;
    g.registers += g.wanted;
    g.wanted = 0;
    Thread* threads = b.threads + (&g - b.warpgroups.data()) * kThreads;
    for (int i = 0; i < kThreads; ++i)
      if (threads[i].state == State::waiting) make_ready(threads[i]);
  }
}

bool adjust_registers(Warpgroup& g, Thread* threads, Site site) {
  Block& b = *threads->block;
  const int count = *(int*)g.payloads[0], more = count - g.registers;
  for (int i = 1; i < kThreads; ++i)
    if (*(int*)g.payloads[i] != count) fault(Kind::divergence, "setmaxnreg with different numbers", site);
  if (!std::strcmp(g.what, "setmaxnreg.inc") ? more < 0 : more > 0)
    fault(Kind::registers,
          std::string(g.what) + " to " + std::to_string(count) + " of " + std::to_string(g.registers) + " registers",
          site);
  if (more <= 0) {
    b.free_registers -= more * kThreads;
    g.registers = count;
    hand_out(b);
    return true;
  }
  g.wanted = more;
  hand_out(b);
  return g.wanted == 0;
}

}  // namespace

void set_registers(int count, bool more, Site site) {
  if (count < 24 || count > 256 || count % 8)
    fault(Kind::registers, "setmaxnreg: a multiple of 8 from 24 to 256, got " + std::to_string(count), site);
  meet(more ? "setmaxnreg.inc" : "setmaxnreg.dec", site, &count, adjust_registers);
}

}  // namespace cuda_on_host
