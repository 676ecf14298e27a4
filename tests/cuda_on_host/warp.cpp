// What the lanes of a warp do together: shuffles, votes, reductions, matrix loads and products.
#include <algorithm>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine.h"

namespace cuda_on_host {
namespace {

constexpr unsigned kAllLanes = ~0u;

bool same_text(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

// The warp of a thread: its lane 0, and how many lanes it has.
Thread* lanes_of(const Thread& t) { return t.block->threads + t.local / 32 * 32; }
int lane_count(const Thread& t) { return std::min(32, machine.block_threads - t.local / 32 * 32); }

// Finishes the call that lane l of the warp waits in, if all lanes that it names are there or have ended.
bool finish_if_complete(Thread* lanes, int count, const WarpCall& call, Finish finish) {
  void* payloads[32] = {};
  unsigned present = 0;
  for (int l = 0; l < count; ++l) {
    if (!(call.mask >> l & 1) || lanes[l].state == State::done) continue;
    if (!lanes[l].call.pending || lanes[l].call.mask != call.mask) return false;  // it may first finish another
    payloads[l] = lanes[l].call.payload;
    present |= 1u << l;
  }
  if (finish) finish(present, payloads);
  for (int l = 0; l < count; ++l)
    if (present >> l & 1) {
      lanes[l].call.pending = false;
      if (lanes[l].state == State::waiting) make_ready(lanes[l]);
    }
  return true;
}

// The finish of each lane's pending call, beside the call itself so that a lane's end can complete it.
Finish finish_of[1024 * 16];

}  // namespace

void warp_call(unsigned mask, const char* what, void* payload, Finish finish, Site site) {
  Thread& t = *machine.current;
  Thread* lanes = lanes_of(t);
  const int count = lane_count(t);
  if (!(mask >> t.lane & 1)) fault(Kind::divergence, std::string(what) + " by a lane that its mask leaves out", site);
  for (int l = 0; l < count; ++l) {
    const WarpCall& other = lanes[l].call;
    // One that waits with another mask may find this lane there later, or never: then nobody can go on.
    if (!other.pending || other.mask != mask) continue;
    if (other.site.line != site.line || !same_text(other.what, what) || !same_text(other.site.file, site.file))
      fault(
          Kind::divergence,
          std::string(what) + " while lane " + std::to_string(l) + " waits at " + other.what + ", " + place(other.site),
          site);
  }
  t.call = {true, mask, what, site, payload};
  finish_of[t.number] = finish;
  if (!finish_if_complete(lanes, count, t.call, finish)) wait_for(what, site);
}

void finish_warp_calls_after_exit(Thread& t) {
  Thread* lanes = lanes_of(t);
  for (int l = 0; l < lane_count(t); ++l)
    if (lanes[l].call.pending && (lanes[l].call.mask >> t.lane & 1)) {
      const WarpCall call = lanes[l].call;
      finish_if_complete(lanes, lane_count(t), call, finish_of[lanes[l].number]);
    }
}

// ---- memory order --------------------------------------------------------------------------------------------------

void warp_barrier(unsigned mask, Site site) {
  warp_call(
      mask, "__syncwarp", machine.current,
      [](unsigned present, void** payloads) {
        std::vector<uint32_t> seen;
        for (int l = 0; l < 32; ++l) {
          if (!(present >> l & 1)) continue;
          Thread& t = *(Thread*)payloads[l];
          merge(seen, t.seen);
          set_seen(seen, t.number, t.time++);
        }
        for (int l = 0; l < 32; ++l)
          if (present >> l & 1) ((Thread*)payloads[l])->seen = seen;
      },
      site);
}

// ---- values --------------------------------------------------------------------------------------------------------

namespace {
struct Shuffle {
  uint64_t value, result;
  unsigned source;
};
struct Vote {
  bool value;
  unsigned result;
};
struct Reduction {
  int64_t value;
  Reduce kind;
};

int64_t combine(Reduce kind, int64_t a, int64_t b) {
  switch (kind) {
    case Reduce::add:
      return a + b;
    case Reduce::min:
      return std::min(a, b);
    case Reduce::max:
      return std::max(a, b);
    case Reduce::bit_and:
      return a & b;
    case Reduce::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}
}  // namespace

uint64_t shuffle_bits(unsigned mask, uint64_t value, unsigned source, const char* what, Site site) {
  Shuffle mine = {value, 0, source};
  warp_call(
      mask, what, &mine,
      [](unsigned present, void** payloads) {
        for (int l = 0; l < 32; ++l) {
          if (!(present >> l & 1)) continue;
          Shuffle& s = *(Shuffle*)payloads[l];
          if (!(present >> s.source & 1))
            fault(Kind::divergence, "lane " + std::to_string(l) + " shuffles from lane " + std::to_string(s.source) +
                                        ", which does not take part");
          s.result = ((Shuffle*)payloads[s.source])->value;
        }
      },
      site);
  return mine.result;
}

unsigned ballot(unsigned mask, bool value, const char* what, Site site) {
  Vote mine = {value, 0};
  warp_call(
      mask, what, &mine,
      [](unsigned present, void** payloads) {
        unsigned votes = 0;
        for (int l = 0; l < 32; ++l)
          if (present >> l & 1) votes |= (unsigned)((Vote*)payloads[l])->value << l;
        for (int l = 0; l < 32; ++l)
          if (present >> l & 1) ((Vote*)payloads[l])->result = votes;
      },
      site);
  return mine.result;
}

int64_t reduce_bits(unsigned mask, int64_t value, Reduce kind, const char* what, Site site) {
  Reduction mine = {value, kind};
  warp_call(
      mask, what, &mine,
      [](unsigned present, void** payloads) {
        bool first = true;
        int64_t result = 0;
        for (int l = 0; l < 32; ++l) {
          if (!(present >> l & 1)) continue;
          const Reduction& r = *(Reduction*)payloads[l];
          result = first ? r.value : combine(r.kind, result, r.value);
          first = false;
        }
        for (int l = 0; l < 32; ++l)
          if (present >> l & 1) ((Reduction*)payloads[l])->value = result;
      },
      site);
  return mine.value;
}

// ---- matrices ------------------------------------------------------------------------------------------------------

namespace {

struct MatrixLoad {
  const char* row;
  uint32_t* r;
  int matrices;
  bool transposed;
};

struct Product {
  float* d;
  const uint32_t *a, *b;
  Factors type;
};

struct ProductF64 {
  double* d;
  double a, b;
};

float half_of(uint32_t r, int which, Factors type) {
  const uint16_t bits = (uint16_t)(r >> 16 * which);
  return type == Factors::bf16 ? __bfloat162float(__nv_bfloat16{bits}) : __half2float(__half{bits});
}

}  // namespace

void need_whole_warp(unsigned present, const char* what) {
  if (present != kAllLanes) fault(Kind::divergence, std::string(what) + " by a part of a warp");
}

// Lane l gets, of each matrix, elements 2(l % 4) and one further of row l / 4; transposed, those of column l / 4.
void load_matrix(uint32_t* r, const void* row, int matrices, bool transposed, Site site) {
  Thread& t = *machine.current;
  if (t.lane < 8 * matrices) {
    if ((uintptr_t)row % 16) fault(Kind::misaligned, "ldmatrix: rows are aligned to 16 bytes", site);
    if (!t.block->dynamic.contains(row) && !t.block->fixed.contains(row))
      fault(Kind::out_of_bounds, "ldmatrix: a row that is not in the block's shared memory", site);
    check_access(row, 16, Access::read, __builtin_return_address(0));
  }
  MatrixLoad mine = {(const char*)row, r, matrices, transposed};
  warp_call(
      kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", &mine,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "ldmatrix");
        for (int l = 0; l < 32; ++l) {
          const MatrixLoad& m = *(MatrixLoad*)payloads[l];
          for (int i = 0; i < m.matrices; ++i) {
            uint16_t two[2];
            for (int j = 0; j < 2; ++j) {
              const int row = m.transposed ? 2 * (l % 4) + j : l / 4, column = m.transposed ? l / 4 : 2 * (l % 4) + j;
              std::memcpy(&two[j], ((MatrixLoad*)payloads[8 * i + row])->row + 2 * column, 2);
            }
            m.r[i] = two[0] | (uint32_t)two[1] << 16;
          }
        }
      },
      site);
}

// Fragments after the PTX manual, with group = lane / 4 and pair = lane % 4.
//   16-bit, m16n8k16: a[i] holds row group + 8 (i % 2), columns 2 pair + 8 (i / 2) and one further; b[i] rows
//   2 pair + 8 i and one further of column group.  tf32, m16n8k8: a[i] row group + 8 (i % 2), column pair + 4 (i / 2);
//   b[i] row pair + 4 i of column group.  d[i]: row group + 8 (i / 2), column 2 pair + i % 2.
void multiply(float* d, const uint32_t* a, const uint32_t* b, Factors type, Site site) {
  Product mine = {d, a, b, type};
  warp_call(
      kAllLanes, "mma", &mine,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "mma");
        const Factors type = ((Product*)payloads[0])->type;
        const int k_size = type == Factors::tf32 ? 8 : 16;
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; ++l) {
          const Product& p = *(Product*)payloads[l];
          const int group = l / 4, pair = l % 4;
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < (type == Factors::tf32 ? 1 : 2); ++j) {
              if (type == Factors::tf32)  // the low 13 bits are not read
                a[group + 8 * (i % 2)][pair + 4 * (i / 2)] = __uint_as_float(p.a[i] & ~0x1fffu);
              else
                a[group + 8 * (i % 2)][2 * pair + 8 * (i / 2) + j] = half_of(p.a[i], j, type);
            }
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < (type == Factors::tf32 ? 1 : 2); ++j) {
              if (type == Factors::tf32)
                b[pair + 4 * i][group] = __uint_as_float(p.b[i] & ~0x1fffu);
              else
                b[2 * pair + 8 * i + j][group] = half_of(p.b[i], j, type);
            }
        }
        for (int l = 0; l < 32; ++l) {
          float* d = ((Product*)payloads[l])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            double sum = d[i];  // the hardware's order and rounding of these sums is not documented
            for (int k = 0; k < k_size; ++k) sum += (double)a[row][k] * b[k][column];
            d[i] = (float)sum;
          }
        }
      },
      site);
}

// m8n8k4: a is row group, column pair; b is row pair, column group; d[i] is row group, column 2 pair + i.
void multiply_f64(double* d, double a, double b, Site site) {
  ProductF64 mine = {d, a, b};
  warp_call(
      kAllLanes, "mma.f64", &mine,
      [](unsigned present, void** payloads) {
        need_whole_warp(present, "mma.f64");
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 2; ++i) {
            double& sum = ((ProductF64*)payloads[l])->d[i];
            for (int k = 0; k < 4; ++k)
              sum = fma(((ProductF64*)payloads[l / 4 * 4 + k])->a,
                        ((ProductF64*)payloads[(2 * (l % 4) + i) * 4 + k])->b, sum);
          }
      },
      site);
}

}  // namespace cuda_on_host
