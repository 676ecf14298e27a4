// Tensor maps, as the driver makes them, and the unit that copies boxes of them to shared memory and back while threads
// go on.
#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace cuda_on_host {
namespace {

constexpr uint64_t kMagic = 0x70616d726f736e65;
constexpr int kElementBytes = 2, kRowBytes = 128;  // of the types, and of a box's row where it is swizzled
constexpr uintptr_t kMapAlignment = 64, kBoxAlignment = 128;

// What is in the map: a matrix of which `extent` and `box` are columns and rows.
struct TiledMap {
  uint64_t magic;
  const char* address;
  uint64_t extent[2], stride;
  uint32_t box[2];
};
static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap), "it takes the place of the driver's content");

struct Box {
  TiledMap map;
  Block* block;
  char* shared;
  int64_t x, y;
};
struct BoxCopy : Box {
  Mbarrier* barrier;
};
struct BoxStore : Box {
  int thread;
  uint32_t group;
};
// Under way, of all blocks.
std::vector<BoxCopy> copies;
std::vector<BoxStore> stores;
int64_t stored = 0;

TiledMap read_map(const void* map, const char* what, Site site) {
  if ((uintptr_t)map % kMapAlignment)
    fault(Kind::misaligned, std::string(what) + ": a tensor map lies at 64 bytes", site);
  TiledMap m;
  std::memcpy(&m, map, sizeof m);
  if (m.magic != kMagic) fault(Kind::descriptor, std::string(what) + ": this is no tensor map", site);
  return m;
}

int64_t box_bytes(const TiledMap& m) { return (int64_t)m.box[1] * kRowBytes; }

// Of the row y, the elements [begin, end) that exist; none where the row does not.
void existing(const Box& b, int64_t y, int64_t* begin, int64_t* end) {
  const bool row = y >= 0 && y < (int64_t)b.map.extent[1];
  *begin = std::max<int64_t>(b.x, 0);
  *end = row ? std::min<int64_t>(b.x + b.map.box[0], (int64_t)b.map.extent[0]) : *begin;
}

// f(r, address, bytes, offset): of each row r of the box what exists of it, and how far into the row it begins.
template <class F>
void each_existing(const Box& b, F&& f) {
  for (int64_t r = 0; r < b.map.box[1]; ++r) {
    int64_t begin, end;
    existing(b, b.y + r, &begin, &end);
    if (begin < end)
      f(r, const_cast<char*>(b.map.address) + (b.y + r) * (int64_t)b.map.stride + begin * kElementBytes,
        (end - begin) * kElementBytes, (begin - b.x) * kElementBytes);
  }
}

// Where 16 bytes of a row of the box lie in shared memory.
char* swizzled_chunk(const Box& b, int64_t r, int chunk) {
  char* const begin = b.block->dynamic.begin;
  return begin + swizzled((uint32_t)(b.shared - begin + r * kRowBytes + chunk));
}

// What an instruction says of a box, and whether memory may be used as it says.
Box checked_box(const void* map, const void* shared, int x, int y, Access access, const char* what, Site site,
                const void* address) {
  Thread& t = *machine.current;
  const Box box = {read_map(map, what, site), t.block, (char*)shared, x, y};
  if (!t.block->dynamic.contains(shared))
    fault(Kind::out_of_bounds, std::string(what) + ": a box outside dynamic shared memory", site);
  if ((uintptr_t)shared % kBoxAlignment)
    fault(Kind::misaligned, std::string(what) + ": a box in shared memory lies at 128 bytes", site);
  each_existing(box, [&](int64_t, char* p, int64_t bytes, int64_t) { check_global(p, bytes, access, address); });
  return box;
}

void finish(const BoxCopy& c) {
  if (c.block->live == 0) fault(Kind::copy_under_way, "a copy into the shared memory of a block that has ended");
  for (int64_t r = 0; r < c.map.box[1]; ++r)
    for (int chunk = 0; chunk < kRowBytes; chunk += 16) std::memset(swizzled_chunk(c, r, chunk), 0, 16);
  each_existing(c, [&](int64_t r, const char* from, int64_t bytes, int64_t offset) {
    char row[kRowBytes] = {};
    std::memcpy(row + offset, from, (size_t)bytes);
    for (int chunk = 0; chunk < kRowBytes; chunk += 16) std::memcpy(swizzled_chunk(c, r, chunk), row + chunk, 16);
  });
  const uint32_t phase = c.barrier->phase + 1;
  mark_shared(c.block->dynamic, c.shared, box_bytes(c.map), Use::plain, unit_stamp(c.barrier->unit, phase));
  mbarrier_copied(*c.barrier, box_bytes(c.map));
}

void finish(const BoxStore& s) {
  each_existing(s, [&](int64_t r, char* to, int64_t bytes, int64_t offset) {
    char row[kRowBytes];
    for (int chunk = 0; chunk < kRowBytes; chunk += 16) std::memcpy(row + chunk, swizzled_chunk(s, r, chunk), 16);
    std::memcpy(to, row + offset, (size_t)bytes);
  });
}

}  // namespace

void prefetch_map(const void* map, Site site) { read_map(map, "prefetch.tensormap", site); }

void copy_box(void* shared, const void* map, int x, int y, void* barrier, unsigned blocks, Site site) {
  constexpr const char* kName = "cp.async.bulk.tensor";
  Thread& t = *machine.current;
  BoxCopy copy = {checked_box(map, shared, x, y, Access::read, kName, site, __builtin_return_address(0)), nullptr};
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (blocks == kThisBlock ? (int)rank != t.block->rank : !(blocks >> rank & 1)) continue;
    Block& b = block_of_cluster(rank, kName, site);
    Mbarrier& m = mbarrier_at(b, same_place(b, barrier), kName, site);
    if (m.announced.thread < 0 || !ordered(view_of(t), m.announced))
      fault(Kind::proxy, std::string(kName) + ": no fence has told the unit of the mbarrier's initialisation", site);
    copy.block = &b;
    copy.shared = same_place(b, shared);
    copy.barrier = &m;
    // Until it is complete, its bytes are nobody's.
    const Stamp under_way = unit_stamp(m.unit, ~uint32_t(0));
    SharedAccess write = {view_of(t), under_way, Access::write, nullptr, site};
    check_shared(write, b, b.dynamic, copy.shared, box_bytes(copy.map));
    mark_shared(b.dynamic, copy.shared, box_bytes(copy.map), Use::copy_under_way, under_way);
    if (at_once())
      finish(copy);
    else
      copies.push_back(copy);
  }
}

bool finish_copy() {
  if (copies.empty()) return false;
  const size_t i = choose(copies.size());
  const BoxCopy copy = copies[i];
  copies.erase(copies.begin() + (long)i);
  finish(copy);
  return true;
}

void forget_copies() {
  copies.clear();
  stores.clear();
}

// The unit reads all of the box, whatever of it exists. What it writes is not followed further: no kernel of one launch
// reads another's results.
void store_box(const void* map, int x, int y, const void* shared, Site site) {
  Thread& t = *machine.current;
  step(t);
  if (t.store_unit < 0) t.store_unit = machine.units++;
  t.last_store = t.store_groups + 1;
  BoxStore store = {
      checked_box(map, shared, x, y, Access::write, "cp.async.bulk.tensor", site, __builtin_return_address(0)),
      t.number, t.last_store};
  SharedAccess read = {view_of(t), unit_stamp(t.store_unit, store.group), Access::read, nullptr, site};
  check_shared(read, *t.block, t.block->dynamic, store.shared, box_bytes(store.map));
  ++stored;
  if (at_once())
    finish(store);
  else
    stores.push_back(store);
}

void store_commit() { ++machine.current->store_groups; }

void store_wait_read(int pending, Site site) {
  Thread& t = *machine.current;
  step(t);
  if (pending < 0) fault(Kind::copy_under_way, "cp.async.bulk.wait_group.read for less than no groups", site);
  if (t.store_unit < 0 || t.store_groups <= (uint32_t)pending) return;
  const uint32_t over = t.store_groups - pending;
  const auto mine = std::stable_partition(stores.begin(), stores.end(),
                                          [&](const BoxStore& s) { return s.thread != t.number || s.group > over; });
  std::for_each(mine, stores.end(), [](const BoxStore& s) { finish(s); });
  stores.erase(mine, stores.end());
  set_seen(t.seen, unit_index(t.store_unit), over);
}

// Nobody else can wait for them.
void check_end_of_stores(const Thread& t) {
  if (t.last_store > 0 && !ordered(view_of(t), unit_stamp(t.store_unit, t.last_store)))
    fault(Kind::copy_under_way, "a thread ends with stores out of shared memory that it has not waited for");
}

int64_t boxes_stored() { return stored; }

void check_end_of_block(Block& b) {
  const auto known = [&](const Stamp& s) {
    for (int i = 0; i < machine.block_threads; ++i)
      if (ordered(view_of(b.threads[i]), s)) return true;
    return false;
  };
  bool waited_for = true;
  for (const BoxCopy& c : copies) waited_for = waited_for && c.block != &b;
  for (const auto& [address, m] : b.mbarriers) {
    waited_for = waited_for && (m.last_copied == 0 || known(unit_stamp(m.unit, m.last_copied)));
    for (const auto& [thread, stamp] : m.outside)
      if (!known(stamp)) fault(Kind::out_of_bounds, "a block ends that may still be arrived at from another");
  }
  if (!waited_for)
    fault(Kind::copy_under_way, "a block ends with copies into its shared memory that nobody waited for");
}

}  // namespace cuda_on_host

// The driver's rules, from the comment of this function in the toolkit's cuda.h; what is not emulated is not supported.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extent, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  using namespace cuda_on_host;
  if ((uintptr_t)map % kMapAlignment || (uintptr_t)address % 16 || rank < 1 || rank > 5)
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (extent[i] == 0 || extent[i] > uint64_t(1) << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (element_strides[i] == 0 || element_strides[i] > 8) return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i)
    if (strides[i] % 16 || strides[i] >= uint64_t(1) << 40) return CUDA_ERROR_INVALID_VALUE;
  if (rank > 1 && strides[0] < extent[0] * kElementBytes) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * kElementBytes % 16) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * kElementBytes > kRowBytes) return CUDA_ERROR_INVALID_VALUE;
  const bool known = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!known || rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      box[0] * kElementBytes != kRowBytes || element_strides[1] != 1 || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_NOT_SUPPORTED;
  *map = {};
  const TiledMap content = {kMagic, (const char*)address, {extent[0], extent[1]}, strides[0], {box[0], box[1]}};
  std::memcpy(map, &content, sizeof content);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = !std::strcmp(name, "cuTensorMapEncodeTiled");
  *found = known ? (void*)cuTensorMapEncodeTiled : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
