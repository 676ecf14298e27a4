// Barriers of a block, of some of its warps, and of a cluster: who waits, and what those who go on know of the others.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace cuda_on_host {

namespace {

// The epoch tells what threads did before a barrier of all of them; what each knew of units and, by mbarriers, of other
// blocks, all know now.
void share_seen(Thread* threads, int count) {
  if (machine.units == 0) return;
  std::vector<uint32_t> seen;
  for (int i = 0; i < count; ++i) merge(seen, threads[i].seen);
  for (int i = 0; i < count; ++i) threads[i].seen = seen;
}

// The waiting threads go on, knowing what all who arrived have done.
void release(Block& b, Barrier& barrier, bool whole_block) {
  if (whole_block) {
    ++b.epoch;
    share_seen(b.threads, machine.block_threads);
    if (machine.blocks.size() == 1 && machine.units == 0) {
      machine.reads.clear();
      b.reads_kept = b.epoch;
    }
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
    for (Thread* t : barrier.waiting) merge(t->seen, barrier.seen);
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
  share_seen(machine.threads.data(), (int)machine.threads.size());
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
    merge(barrier.seen, t.seen);
    set_seen(barrier.seen, t.number, t.time++);
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

}  // namespace cuda_on_host
