// Launches, blocks one after another (a cluster's together), their threads in the order of the schedule.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "machine.h"

namespace cuda_on_host {

Machine machine;

namespace {

constexpr int kMostThreads = 1024;                       // of a block
constexpr int64_t kMostSteps = int64_t(1) << 24;         // accesses of a thread between two waits: a loop without end
constexpr int kInterruptionOdds = 48;                    // one access in so many, where threads are interrupted
constexpr int kCopyOdds = 16;                            // a copy is completed for one turn in so many, likewise
constexpr int kRegisters = 65536, kMostRegisters = 255;  // of an SM, of a thread

std::mutex one_launch;
pthread_t owner;
Schedule schedule = Schedule::forward;
std::minstd_rand random_numbers;
int device_arch = 80, device_sms = 3;

int64_t shared_bytes_of(int arch) {
  switch (arch) {
    case 80:
      return 163 << 10;
    case 90:
    case 100:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

std::string coordinates(const char* what, uint3 i) {
  char text[96];
  std::snprintf(text, sizeof text, "%s (%u, %u, %u)", what, i.x, i.y, i.z);
  return text;
}

// ", in function at file:line" from the debug information, skipping what is the emulator's own.
std::string source_of(const void* address) {
  Dl_info info;
  if (!address || !dladdr(address, &info)) return "";
  char command[1024];
  const size_t offset = (uintptr_t)address - (uintptr_t)info.dli_fbase - 1;
  std::snprintf(command, sizeof command, "addr2line -Cfie '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    char function[2048], line[1024];
    while (std::fgets(function, sizeof function, pipe) && std::fgets(line, sizeof line, pipe)) {
      if (std::strstr(line, "??") || std::strstr(line, "/cuda_runtime.h") ||
          std::strstr(line, "cuda_on_host/cuda/device/"))
        continue;
      line[std::strcspn(line, " \n")] = function[std::strcspn(function, "\n")] = 0;
      const char* file = std::strrchr(line, '/');
      found = std::string(", in ") + function + " at " + (file ? file + 1 : line);
      break;
    }
    pclose(pipe);
  }
  return found;
}

// Runs on the fiber of a thread: the kernel, the thread's end, and the same for the thread that comes next.
void thread_body() {
  for (;;) {
    machine.launch->call(machine.launch->kernel, machine.launch->parameters);
    Thread& t = *machine.current;
    check_end_of_products(t);
    check_end_of_stores(t);
    t.state = State::done;
    --t.block->live;
    finish_warp_calls_after_exit(t);
    finish_barriers_after_exit(*t.block);
    Fiber& mine = *t.fiber;
    mine.parked = true;
    switch_fibers(mine.context, machine.scheduler);
    mine.parked = false;
  }
}

Thread* next_thread() {
  const int count = (int)machine.threads.size(), words = (int)machine.ready.size();
  const auto& ready = machine.ready;
  if (schedule == Schedule::reverse) {
    for (int w = words - 1; w >= 0; --w)
      if (ready[w]) return &machine.threads[64 * w + 63 - __builtin_clzll(ready[w])];
    return nullptr;
  }
  int start = 0;
  if (schedule == Schedule::shuffled) start = (int)(random_numbers() % count);
  for (int i = 0; i <= words; ++i) {
    const int w = (start / 64 + i) % words;
    const uint64_t bits = i == 0 ? ready[w] & (~uint64_t(0) << start % 64) : ready[w];
    if (bits) return &machine.threads[64 * w + __builtin_ctzll(bits)];
  }
  return nullptr;
}

// Who waits where: the text of a deadlock.
std::string waiting_threads() {
  std::string text;
  int listed = 0;
  for (size_t i = 0; i < machine.threads.size() && listed < 6;) {
    const Thread& first = machine.threads[i];
    size_t end = i + 1;
    const auto alike = [&](const Thread& t) {
      return t.state == first.state &&
             (t.state == State::done || (t.waits_for == first.waits_for && t.site.line == first.site.line));
    };
    while (end < machine.threads.size() && alike(machine.threads[end])) ++end;
    text += (listed++ ? "; threads " : "threads ") + std::to_string(i) + " to " + std::to_string(end - 1);
    text += first.state == State::done ? " have ended"
                                       : std::string(" wait at ") + first.waits_for + ", " + place(first.site);
    i = end;
  }
  return text;
}

bool unfinished() {
  return std::any_of(machine.blocks.begin(), machine.blocks.end(), [](const Block& b) { return b.live > 0; });
}

void run_cluster(int64_t first_block) {
  const Launch& l = *machine.launch;
  const int n = machine.block_threads;
  machine.cluster_barrier = {};
  std::fill(machine.ready.begin(), machine.ready.end(), 0);
  machine.reads.clear();
  machine.units = 0;
  machine.loaded = nullptr;
  forget_copies();
  for (int rank = 0; rank < l.cluster; ++rank) {
    Block& b = machine.blocks[rank];
    const int64_t at = first_block + rank;
    b.index = {(unsigned)(at % l.grid.x), (unsigned)(at / l.grid.x % l.grid.y), (unsigned)(at / l.grid.x / l.grid.y)};
    b.rank = rank;
    b.live = n;
    b.epoch = b.cluster_epoch = b.reads_kept = 0;
    b.free_registers = 0;
    b.mbarriers.clear();
    b.warpgroups.assign((n + 127) / 128, {});
    // What ptxas gives the threads of a block that has the SM to itself.
    for (Warpgroup& g : b.warpgroups) g.registers = std::min(kRegisters / n, kMostRegisters) / 8 * 8;
    b.generation = ++machine.generations;
    b.threads = machine.threads.data() + rank * n;
    for (Barrier& barrier : b.barriers) barrier = {};
    start_block_memory(b);
    for (int i = 0; i < n; ++i) {
      Thread& t = b.threads[i];
      t.block = &b;
      t.local = i;
      t.lane = i % 32;
      t.number = rank * n + i;
      t.index = {i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y};
      t.time = 1;
      t.seen.clear();
      t.proxy_fences.clear();
      t.sums.clear();
      forget_stack_accesses(t);
      t.watched = device_arch >= 90;
      t.fenced = false;
      t.store_unit = -1;
      t.store_groups = t.last_store = 0;
      t.copies.clear();
      t.copy_groups.clear();
      t.steps = 0;
      t.call.pending = false;
      t.fiber = &fiber(t.number);
      if (!t.fiber->parked) start_fiber(*t.fiber, thread_body);
      make_ready(t);
    }
  }
  for (;;) {
    Thread* t = next_thread();
    if (!t && unfinished() && finish_copy()) continue;
    if (!t) break;
    if (schedule == Schedule::shuffled && random_numbers() % kCopyOdds == 0) finish_copy();
    machine.current = t;
    load_fixed(*t->block);
    switch_fibers(machine.scheduler, t->fiber->context);
    machine.current = nullptr;
    if (machine.fault) {
      Fault f = *machine.fault;
      machine.fault.reset();
      throw Fault(f.kind, f.what() + source_of(machine.fault_address));
    }
    if (t->state != State::ready) machine.ready[t->number / 64] &= ~(uint64_t(1) << t->number % 64);
  }
  for (const Thread& t : machine.threads)
    if (t.state != State::done)
      fault(Kind::divergence,
            "no thread can go on: " + waiting_threads() + ", in " + coordinates("block", t.block->index));
  for (Block& b : machine.blocks) check_end_of_block(b);
}

void check_launch(const Launch& l) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw Fault(Kind::launch, std::string("launch: ") + what);
  };
  const int64_t threads = (int64_t)l.block.x * l.block.y * l.block.z;
  require(l.grid.x > 0 && l.grid.y > 0 && l.grid.z > 0 && threads > 0, "an empty grid or block");
  require(l.grid.x <= 0x7fffffffu && l.grid.y <= 65535 && l.grid.z <= 65535, "a grid beyond what a GPU takes");
  require(threads <= kMostThreads && l.block.z <= 64, "a block of more than 1024 threads");
  require(l.shared_bytes >= 0 && l.shared_bytes <= shared_bytes_of(device_arch), "more shared memory than there is");
  require(l.cluster == 1 || (device_arch >= 90 && l.cluster > 0 && l.cluster <= 16), "a cluster that the GPU has not");
  require(l.grid.x % (unsigned)l.cluster == 0, "a grid that clusters do not divide");
}

}  // namespace

const char* name(Schedule s) {
  return s == Schedule::forward ? "forward" : s == Schedule::reverse ? "reverse" : "shuffled";
}
void set_schedule(Schedule s, unsigned seed) {
  schedule = s;
  random_numbers.seed(seed);
}
void set_device(int arch, int sms) {
  device_arch = arch;
  device_sms = sms;
}
void get_device(int* arch, int* sms, int64_t* shared_per_block) {
  *arch = device_arch;
  *sms = device_sms;
  *shared_per_block = shared_bytes_of(device_arch);
}

std::string place(const Site& site) {
  const char* file = std::strrchr(site.file, '/');
  return std::string(file ? file + 1 : site.file) + ":" + std::to_string(site.line);
}

void run(const Launch& l) {
  const std::lock_guard<std::mutex> lock(one_launch);
  owner = pthread_self();
  check_launch(l);
  machine.launch = &l;
  machine.block_threads = (int)(l.block.x * l.block.y * l.block.z);
  machine.blocks.resize(l.cluster);
  machine.threads.resize((size_t)l.cluster * machine.block_threads);
  machine.ready.resize((machine.threads.size() + 63) / 64);
  make_fibers((int)machine.threads.size());
  prepare_memory(l.shared_bytes, l.cluster);
  const int64_t clusters = (int64_t)l.grid.x * l.grid.y * l.grid.z / l.cluster;
  std::vector<int64_t> order;
  if (schedule == Schedule::shuffled) {
    order.resize(clusters);
    for (int64_t i = 0; i < clusters; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers);
  }
  struct AtEnd {
    ~AtEnd() { machine.current = nullptr; }
  } at_end;
  for (int64_t i = 0; i < clusters; ++i) {
    const int64_t at = !order.empty() ? order[i] : schedule == Schedule::reverse ? clusters - 1 - i : i;
    run_cluster(at * l.cluster);
  }
}

Thread* running() { return machine.current && pthread_equal(owner, pthread_self()) ? machine.current : nullptr; }

void fault(Kind kind, const std::string& text, const void* address) {
  const Thread* t = machine.current;
  if (!t) throw Fault(kind, text);
  machine.fault = std::make_unique<Fault>(
      kind, coordinates("block", t->block->index) + ", " + coordinates("thread", t->index) + ": " + text);
  machine.fault_address = address;
  _longjmp(machine.scheduler, 1);
}
void fault(Kind kind, const std::string& text, Site site) { fault(kind, text + ", " + place(site)); }

void make_ready(Thread& t) {
  t.state = State::ready;
  machine.ready[t.number / 64] |= uint64_t(1) << t.number % 64;
}

void wait_for(const char* what, Site site) {
  Thread& t = *machine.current;
  t.state = State::waiting;
  t.waits_for = what;
  t.site = site;
  t.steps = 0;
  switch_fibers(t.fiber->context, machine.scheduler);
}

bool at_once() {
  return schedule == Schedule::reverse || (schedule == Schedule::shuffled && random_numbers() % 2 == 0);
}
size_t choose(size_t count) { return schedule == Schedule::shuffled ? random_numbers() % count : 0; }

void step(Thread& t) {
  if (++t.steps > kMostSteps) fault(Kind::hang, "a loop that does not end");
  if (schedule == Schedule::shuffled && random_numbers() % kInterruptionOdds == 0)
    switch_fibers(t.fiber->context, machine.scheduler);
}

// ---- where a thread is ---------------------------------------------------------------------------------------------

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_shape() { return machine.launch->block; }
dim3 grid_shape() { return machine.launch->grid; }
unsigned lane_index() { return (unsigned)machine.current->lane; }
unsigned cluster_rank() { return (unsigned)machine.current->block->rank; }
unsigned cluster_size() { return (unsigned)machine.launch->cluster; }

void assertion(const char* text, const char* function, Site site) {
  fault(Kind::assertion, std::string("device-side assert triggered: ") + text + " in " + function, site);
}

}  // namespace cuda_on_host
