// The inside of the emulator: threads, blocks, what they know of one another's accesses, the launch under way.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

namespace cuda_on_host {

// An access: by which thread of the cluster, at which of its times, after how many barriers of its block. Or by a unit
// that works beside the threads: the copies that an mbarrier counts, whose time is its phase, and the products of a
// warpgroup, whose time is their group. No barrier of threads tells how far a unit is: they know it from waiting for
// it.
struct Stamp {
  int32_t thread = -1;
  uint32_t time = 0, epoch = 0;
};
constexpr int32_t kFirstUnit = 1 << 20;

enum class Use : uint16_t { plain, copy_under_way, mbarrier };

// One byte of shared memory. Everything in it is about the block whose generation it holds; others have not used it.
struct Cell {
  uint32_t generation = 0;
  uint16_t by_atomic = false;
  Use use = Use::plain;
  Stamp write, read;
  int32_t more_reads = -1;  // the last of further readers since the write, among machine.reads
};
static_assert(std::has_unique_object_representations_v<Cell>, "cells are compared by their bytes");

// A reader in a list of them. Lists do not change once made, so bytes with the same history share one.
struct Read {
  Stamp stamp;
  int32_t earlier, count;  // the list that it was added to, or -1; how long it made it
};

// A range of shared memory with its cells.
struct SharedRange {
  char* begin = nullptr;
  int64_t bytes = 0;
  std::vector<Cell> cells;
  bool contains(const void* p) const { return (uintptr_t)p - (uintptr_t)begin < (uintptr_t)bytes; }
};

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

enum class State { ready, waiting, done };

// What a lane has come to a function of its warp with.
struct WarpCall {
  bool pending = false;
  unsigned mask;
  const char* what;
  Site site;
  void* payload;
};

struct Block;

// Sums of a thread that products under way may change.
struct Sums {
  const char* begin;
  uint32_t group;
};

struct Thread {
  Block* block;
  int local, lane, number;  // within the block, the warp, the cluster
  uint3 index;
  State state;
  const char* waits_for;
  Site site;
  // Time advances when the thread tells others what it has done. seen[u] is the last time of thread u of the cluster
  // that is known to lie before this thread's present, beyond what epochs tell; empty where nothing is. The units come
  // after the threads.
  uint32_t time;
  std::vector<uint32_t> seen;
  std::vector<Stamp> proxy_fences;
  // Its stores by tensor map: who makes them, groups that are committed, the group of the last one.
  int store_unit;
  uint32_t store_groups, last_store;
  std::vector<Copy> copies;         // asynchronous, in order of issue
  std::vector<size_t> copy_groups;  // how many copies each committed group has
  std::vector<Sums> sums;
  // A bit for each word of its stack: used since its last fence of wgmma. Outside of [begin, end) they are 0.
  std::vector<uint64_t> touched;
  size_t touched_begin = 0, touched_end = 0;
  bool watched, fenced;  // whether the above is kept; whether there was a fence
  int64_t steps;         // accesses since it last waited
  WarpCall call;
  Fiber* fiber;
};

struct Barrier {
  int expected = 0, arrived = 0, value = 0, last_value = 0;
  const char* what = nullptr;
  Site site = {};
  std::vector<int> arrivals;   // threads of the block
  std::vector<uint32_t> seen;  // what those who arrived had done
  std::vector<Thread*> waiting;
};

// A barrier in shared memory, after the PTX manual: a phase is over when the arrivals that it is for have come and as
// many bytes been copied as were expected.
struct Mbarrier {
  int expected, pending, unit;
  int64_t bytes = 0;  // expected and not yet copied
  uint32_t phase = 0, last_copied = 0;
  bool from_outside = false, had_from_outside = false;  // arrivals of other blocks in this phase, in the one before
  std::map<int, Stamp> outside;                         // the last arrival of each thread of another block
  Stamp made, announced;                 // by its initialisation, and the fence that tells the copying unit of it
  std::vector<uint32_t> arriving, seen;  // what those knew who have arrived in this phase, and in the one before
  std::vector<Thread*> waiting;
};

struct WarpgroupProduct {
  float* d[128];
  uint64_t a, b;
  Factors type;
  bool a_across, b_across, add;
  uint32_t group;
};

struct Warpgroup {
  int unit = -1, arrived = 0, registers = 0, wanted = 0;  // registers of a thread; more that it waits for
  const char* what = nullptr;
  Site site = {};
  void* payloads[128];
  uint32_t groups[4] = {};                 // that its warps have committed
  std::vector<WarpgroupProduct> products;  // under way, in order
};

struct Block {
  uint3 index;
  int rank, live;
  uint32_t generation, epoch;  // epoch: barriers of all its threads so far
  uint32_t cluster_epoch;      // its epoch after the last barrier of the cluster
  uint32_t reads_kept;         // the epoch since which lists of readers are kept
  int free_registers;
  std::map<uintptr_t, Mbarrier> mbarriers;
  std::vector<Warpgroup> warpgroups;
  Thread* threads;
  Barrier barriers[16];
  SharedRange dynamic, fixed;    // fixed: the module's thread-local memory while this block is current
  std::vector<char> fixed_data;  // its content while another block of the cluster is
};

struct Machine {
  const Launch* launch = nullptr;
  int block_threads = 0;
  std::vector<Thread> threads;  // of the cluster that runs
  std::vector<Block> blocks;
  Thread* current = nullptr;
  Block* loaded = nullptr;  // whose static shared memory is in place
  uint32_t generations = 0;
  int units = 0;
  Barrier cluster_barrier;
  std::vector<uint64_t> ready;  // bits
  std::vector<Read> reads;
  std::unique_ptr<Fault> fault;
  const void* fault_address = nullptr;
  jmp_buf scheduler;
};

extern Machine machine;

// The thread that calls, or null outside of kernels.
Thread* running();
// Ends the launch: never returns in a fiber. `address`: where in the kernel's code, if a Site does not tell.
[[noreturn]] void fault(Kind kind, const std::string& text, const void* address = nullptr);
[[noreturn]] void fault(Kind kind, const std::string& text, Site site);
void make_ready(Thread& t);
// Gives the others a turn until someone makes this thread ready.
void wait_for(const char* what, Site site);
// Counts an access, and interrupts the thread now and then where the schedule wants that.
void step(Thread& t);

// Waits until all lanes of the mask that have not ended have called with the same arguments; the last to come runs
// finish on their payloads. Returns the caller's payload.
using Finish = void (*)(unsigned mask, void** payloads);
void warp_call(unsigned mask, const char* what, void* payload, Finish finish, Site site);
// What a thread's end completes: calls of its warp, barriers of its block.
void finish_warp_calls_after_exit(Thread& t);
void finish_barriers_after_exit(Block& b);
std::string place(const Site& site);

// A unit by its number, as lists of what was seen and stamps have it.
inline size_t unit_index(int unit) { return machine.threads.size() + unit; }
inline Stamp unit_stamp(int unit, uint32_t time) { return {kFirstUnit + unit, time, 0}; }
void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);
void set_seen(std::vector<uint32_t>& seen, size_t index, uint32_t time);

// From where accesses are judged: the present of a thread, or of several, which know what each of them does.
struct View {
  const Block* block;
  int thread;  // whose own accesses are in order, or -1
  const std::vector<uint32_t>* seen;
};
inline View view_of(const Thread& t) { return {t.block, t.number, &t.seen}; }
inline Stamp now(const Thread& t) { return {t.number, t.time, t.block->epoch}; }
// Whether an access lies before the present, whatever the order in which threads run.
bool ordered(const View& view, const Stamp& s);

enum class Access { read, write, atomic };
// Checks an access of the running thread to any memory; to what is neither shared memory nor the thread's stack; notes
// one to its stack.
void check_access(const void* p, int64_t bytes, Access access, const void* address);
void check_global(const void* p, int64_t bytes, Access access, const void* address);
void note_stack_access(Thread& t, const char* p, int64_t bytes, const void* address);
void forget_stack_accesses(Thread& t);

// An access to the block's shared memory, by a thread or a unit.
struct SharedAccess {
  View view;
  Stamp stamp;
  Access access;
  const void* address;
  Site site = {nullptr, 0};  // of the instruction that set a unit to work
  // The last byte's, before and after: neighbours mostly have the same history.
  Cell before = {}, after = {};
  bool any = false;
};
void check_shared(SharedAccess& a, Block& owner, SharedRange& range, const char* p, int64_t bytes);

// Shared memory as the destination of an asynchronous copy, or as written by it; as an mbarrier.
void mark_shared(SharedRange& range, const char* p, int64_t bytes, Use use, const Stamp& writer);

// The mbarrier of an instruction of the running thread; what a copy of so many bytes does to one.
Mbarrier& mbarrier_at(Block& b, const void* barrier, const char* what, Site site);
void mbarrier_copied(Mbarrier& m, int64_t bytes);

// The block of that rank in the cluster, which still has to be there; what it has where the running thread's has p.
Block& block_of_cluster(unsigned rank, const char* what, Site site);
char* same_place(const Block& other, const void* p);

// Where chunks of 16 bytes lie that are swizzled over 128: the place among those of a row, by the row's number.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Work of units that may be done now or later: at once in one schedule, when nothing else can go on in another.
bool at_once();
size_t choose(size_t count);
// Completes a copy by tensor map, if there is one. All have to be over when their block ends, and so have arrivals from
// other blocks: somebody in it has to know of them.
bool finish_copy();
void check_end_of_block(Block& b);
void forget_copies();
void check_end_of_products(const Thread& t);
void check_end_of_stores(const Thread& t);
void need_whole_warp(unsigned present, const char* what);

void prepare_memory(int64_t shared_bytes, int cluster);
void start_block_memory(Block& b);
void load_fixed(Block& b);

}  // namespace cuda_on_host
