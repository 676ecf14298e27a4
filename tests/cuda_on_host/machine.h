// The inside of the emulator: threads, blocks, what they know of one another's accesses, the launch under way.
#pragma once
#include <cstdint>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

namespace cuda_on_host {

// An access: by which thread of the cluster, at which of its times, after how many barriers of its block.
struct Stamp {
  int32_t thread = -1;
  uint32_t time = 0, epoch = 0;
};

// One byte of shared memory. Everything in it is about the block whose generation it holds; others have not used it.
struct Cell {
  uint32_t generation = 0;
  uint16_t by_atomic = false, copy_under_way = false;
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

struct Thread {
  Block* block;
  int local, lane, number;  // within the block, the warp, the cluster
  uint3 index;
  State state;
  const char* waits_for;
  Site site;
  // Time advances when the thread tells others what it has done. seen[u] is the last time of thread u of the block that
  // is known to lie before this thread's present, beyond what the block's epoch tells; empty where nothing is.
  uint32_t time;
  std::vector<uint32_t> seen;
  std::vector<Copy> copies;         // asynchronous, in order of issue
  std::vector<size_t> copy_groups;  // how many copies each committed group has
  int64_t steps;                    // accesses since it last waited
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

struct Block {
  uint3 index;
  int rank, live;
  uint32_t generation, epoch;  // epoch: barriers of all its threads so far
  uint32_t cluster_epoch;      // its epoch after the last barrier of the cluster
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

enum class Access { read, write, atomic };
// Checks an access of the running thread to any memory.
void check_access(const void* p, int64_t bytes, Access access, const void* address);
// Marks shared memory as the destination of an asynchronous copy, or as written by it.
void begin_copy(void* p, int64_t bytes, Site site);
void end_copy(void* p, int64_t bytes);
void prepare_memory(int64_t shared_bytes, int cluster);
void start_block_memory(Block& b);
void load_fixed(Block& b);

}  // namespace cuda_on_host
