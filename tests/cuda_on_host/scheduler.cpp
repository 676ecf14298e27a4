// Launches, blocks one after another (a cluster's together), their threads in the order of the schedule; barriers.
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

constexpr int kMostThreads = 1024;                // of a block
constexpr int64_t kMostSteps = int64_t(1) << 24;  // accesses of a thread between two waits: a loop without end
constexpr int kInterruptionOdds = 48;             // one access in so many, where threads are interrupted

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

void run_cluster(int64_t first_block) {
  const Launch& l = *machine.launch;
  const int n = machine.block_threads;
  machine.cluster_barrier = {};
  std::fill(machine.ready.begin(), machine.ready.end(), 0);
  machine.reads.clear();
  machine.loaded = nullptr;
  for (int rank = 0; rank < l.cluster; ++rank) {
    Block& b = machine.blocks[rank];
    const int64_t at = first_block + rank;
    b.index = {(unsigned)(at % l.grid.x), (unsigned)(at / l.grid.x % l.grid.y), (unsigned)(at / l.grid.x / l.grid.y)};
    b.rank = rank;
    b.live = n;
    b.epoch = b.cluster_epoch = 0;
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
      t.copies.clear();
      t.copy_groups.clear();
      t.steps = 0;
      t.call.pending = false;
      t.fiber = &fiber(t.number);
      if (!t.fiber->parked) start_fiber(*t.fiber, thread_body);
      make_ready(t);
    }
  }
  while (Thread* t = next_thread()) {
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

void step(Thread& t) {
  if (++t.steps > kMostSteps) fault(Kind::hang, "a loop that does not end");
  if (schedule == Schedule::shuffled && random_numbers() % kInterruptionOdds == 0)
    switch_fibers(t.fiber->context, machine.scheduler);
}

// ---- barriers ------------------------------------------------------------------------------------------------------

namespace {

// The waiting threads go on, knowing what all who arrived have done.
void release(Block& b, Barrier& barrier, bool whole_block) {
  if (whole_block) {
    ++b.epoch;
    if (machine.blocks.size() == 1) machine.reads.clear();  // nobody goes back to them: see forget_reads
  } else {
    std::vector<int> lanes((machine.block_threads + 31) / 32);
    for (int i : barrier.arrivals) ++lanes[i / 32];
    for (int i : barrier.arrivals) {
      int present = 0;
      const int first = i / 32 * 32, last = std::min(first + 32, machine.block_threads);
      for (int j = first; j < last; ++j) present += b.threads[j].state != State::done;
      if (lanes[i / 32] < present)
        fault(Kind::divergence, std::string(barrier.what) + " by a part of a warp", barrier.site);
    }
    for (Thread* t : barrier.waiting) {
      t->seen.resize(machine.block_threads);
      for (int i = 0; i < machine.block_threads; ++i) t->seen[i] = std::max(t->seen[i], barrier.seen[i]);
    }
  }
  const int value = barrier.value;
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  barrier = {};
  barrier.last_value = value;
  for (Thread* t : waiting) make_ready(*t);
}

void release_cluster() {
  for (Block& b : machine.blocks) b.cluster_epoch = ++b.epoch;
  std::vector<Thread*> waiting;
  waiting.swap(machine.cluster_barrier.waiting);
  machine.cluster_barrier = {};
  for (Thread* t : waiting) make_ready(*t);
}

int live_threads() {
  int live = 0;
  for (const Block& b : machine.blocks) live += b.live;
  return live;
}

}  // namespace

// Threads that have ended count as arrived at __syncthreads and at the barrier of a cluster, as on a GPU.
void finish_barriers_after_exit(Block& b) {
  Barrier& whole = b.barriers[0];
  if (whole.arrived > 0 && whole.arrived == b.live) release(b, whole, true);
  if (machine.cluster_barrier.arrived > 0 && machine.cluster_barrier.arrived == live_threads()) release_cluster();
}

int block_barrier(int id, int threads, bool waiting, int value, const char* what, Site site) {
  Thread& t = *machine.current;
  Block& b = *t.block;
  const bool whole = threads == kWholeBlock;
  if (id < 0 || id > 15 || (!whole && (threads <= 0 || threads % 32 != 0)))
    fault(Kind::divergence, std::string(what) + ": barriers are 0 to 15, their threads whole warps", site);
  Barrier& barrier = b.barriers[id];
  if (barrier.arrived > 0) {
    if (whole != (barrier.expected == kWholeBlock) || (!whole && threads != barrier.expected))
      fault(Kind::divergence, std::string(what) + " with another number of threads than at " + place(barrier.site),
            site);
    if (whole && (std::strcmp(what, barrier.what) || site.line != barrier.site.line ||
                  std::strcmp(site.file, barrier.site.file)))
      fault(
          Kind::divergence,
          std::string(what) + " while other threads of the block wait at " + barrier.what + ", " + place(barrier.site),
          site);
  } else {
    barrier.expected = threads;
    barrier.what = what;
    barrier.site = site;
  }
  ++barrier.arrived;
  barrier.value += value;
  if (!whole) {
    barrier.arrivals.push_back(t.local);
    barrier.seen.resize(machine.block_threads);
    for (size_t i = 0; i < t.seen.size(); ++i) barrier.seen[i] = std::max(barrier.seen[i], t.seen[i]);
    barrier.seen[t.local] = t.time++;
    if (barrier.arrived > barrier.expected)
      fault(Kind::divergence, std::string(what) + " by more threads than it is for", site);
  }
  if (waiting) barrier.waiting.push_back(&t);
  const bool complete = barrier.arrived == (whole ? b.live : threads);
  if (complete) release(b, barrier, whole);
  if (waiting && !complete) wait_for(what, site);
  return b.barriers[id].last_value;
}

void cluster_barrier(Site site) {
  Thread& t = *machine.current;
  Barrier& barrier = machine.cluster_barrier;
  ++barrier.arrived;
  barrier.waiting.push_back(&t);
  if (barrier.arrived == live_threads())
    release_cluster();
  else
    wait_for("the barrier of the cluster", site);
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
