// Runs CUDA kernels on the CPU and finds fault with them. Each thread of a block is a fiber; the scheduler decides who
// goes on where threads wait, and in one schedule at any access to memory. g++ -fsanitize=thread,alignment,bounds calls
// before every load and store; hooks.cpp answers those calls in place of the sanitizer's library, so nothing that a
// kernel reads or writes goes unseen. Kernel side first, then what tests use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

struct uint3;
struct dim3;

namespace cuda_on_host {

// A place in the kernel's source, taken as a default argument.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// ---- a kernel's thread ---------------------------------------------------------------------------------------------

uint3 thread_index();
uint3 block_index();
dim3 block_shape();
dim3 grid_shape();
unsigned lane_index();
void* dynamic_shared();

constexpr int kWholeBlock = -1;
// Waits (or, not `waiting`, only arrives) at barrier `id` of `threads` threads; the sum of all values.
int block_barrier(int id, int threads, bool waiting, int value, const char* what, Site site);
void warp_barrier(unsigned mask, Site site);
void cluster_barrier(Site site);
unsigned cluster_rank();
unsigned cluster_size();
void* cluster_map(void* shared, unsigned rank, Site site);

enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };
uint64_t shuffle_bits(unsigned mask, uint64_t value, unsigned source, const char* what, Site site);
unsigned ballot(unsigned mask, bool value, const char* what, Site site);
int64_t reduce_bits(unsigned mask, int64_t value, Reduce kind, const char* what, Site site);

void copy_async(void* shared, const void* global, int bytes, int valid, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

enum class Factors { bf16, f16, tf32 };
void load_matrix(uint32_t* r, const void* row, int matrices, bool transposed, Site site);
void multiply(float* d, const uint32_t* a, const uint32_t* b, Factors type, Site site);
void multiply_f64(double* d, double a, double b, Site site);

// Hopper's. An address in shared memory as instructions have it, of 32 bits.
uint32_t shared_address(const void* p);
void mbarrier_init(void* barrier, int arrivals, Site site);
void mbarrier_arrive_expect(void* barrier, int bytes, Site site);
void mbarrier_arrive_at(void* barrier, unsigned rank, Site site);
void mbarrier_wait(void* barrier, uint32_t parity, bool of_cluster, Site site);
void fence_mbarrier_init();
void fence_proxy_async();
void prefetch_map(const void* map, Site site);
constexpr unsigned kThisBlock = ~0u;
void copy_box(void* shared, const void* map, int x, int y, void* barrier, unsigned blocks, Site site);
void store_box(const void* map, int x, int y, const void* shared, Site site);
void store_commit();
void store_wait_read(int pending, Site site);
void set_registers(int count, bool more, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
// d[128] of each thread of a warpgroup: 64 x 256 of a product, k = 16.
void wgmma(float* d, uint64_t a, uint64_t b, Factors type, bool a_across, bool b_across, bool add, Site site);

[[noreturn]] void assertion(const char* text, const char* function, Site site);

// The memory of an atomic operation, checked, for as long as the object lives.
struct AtomicAccess {
  AtomicAccess(void* p, size_t size);
  void load(void* value);
  void store(const void* value);
  void* memory;
  size_t size;
};

// ---- launches ------------------------------------------------------------------------------------------------------

enum class Kind {
  out_of_bounds,   // of every buffer, of shared memory, of a local array
  read_only,       // a write to an input
  misaligned,      // a vector access that a GPU refuses
  unwritten,       // shared memory read before anyone wrote it
  copy_under_way,  // shared memory used before the wait for the asynchronous copy into it; a copy left to nobody
  race,            // shared memory used by two threads, one of them writing, with no barrier between
  divergence,      // threads at different barriers, or at one that others will never reach
  assertion,       // RF_DEVICE_ASSERT
  division,        // an integer by zero, of which a GPU makes some number and a CPU a signal
  hang,            // a loop without end
  launch,          // a configuration that a GPU refuses
  mbarrier,        // one that is not initialised, has too many arrivals, or is used as memory
  proxy,           // shared memory written by a thread and used by an asynchronous unit with no fence between
  registers,       // of wgmma, used before they are waited for or without a fence; more than setmaxnreg can have
  descriptor,      // a tensor map or the description of a matrix that the unit cannot take
};

// What a kernel did wrong, thrown by its launch: the first fault ends it.
struct Fault : std::runtime_error {
  Fault(Kind kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
  Kind kind;
};

struct Launch {
  void (*call)(const void* kernel, const void* parameters);
  const void* kernel;
  const void* parameters;
  size_t parameter_bytes;
  const dim3 &grid, &block;
  int cluster;
  int64_t shared_bytes;
};
void run(const Launch&);

// ---- tests ---------------------------------------------------------------------------------------------------------

// forward and reverse: the first (last) thread that can go on does so until it waits, the first (last) block first.
// shuffled: at random, and threads may be interrupted at any access. Copies and products that go on beside the threads
// are made as late as may be, at once, or at random.
enum class Schedule { forward, reverse, shuffled };
constexpr Schedule kSchedules[] = {Schedule::forward, Schedule::reverse, Schedule::shuffled};
const char* name(Schedule);
void set_schedule(Schedule, unsigned seed = 1);

// The GPU that launchers see. arch decides about clusters; few SMs make loops over the grid wrap around.
void set_device(int arch, int sms = 3);
void get_device(int* arch, int* sms, int64_t* shared_per_block);

// Boxes that kernels have had stored by tensor map so far.
int64_t boxes_stored();

// Declares a range of memory to be a buffer on the device, or to be none any more.
void add_buffer(const void* p, size_t bytes, bool writable = true);
void remove_buffer(const void* p);

}  // namespace cuda_on_host
