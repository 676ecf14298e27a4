// Barriers in shared memory, which count arrivals of threads and bytes of copies, and the fences of asynchronous units.
// After the PTX manual, from "mbarrier" on.
#include "machine.h"

namespace cuda_on_host {
namespace {

constexpr int kMbarrierBytes = 8, kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

std::string text(const Mbarrier& m) {
  return "an mbarrier of " + std::to_string(m.expected) + " arrivals in phase " + std::to_string(m.phase);
}

void finish_phase(Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.expected;
  m.had_from_outside = m.from_outside;
  m.from_outside = false;
  m.seen.swap(m.arriving);
  m.arriving.clear();
  for (Thread* t : m.waiting) make_ready(*t);  // to look again: this phase too may be over by then
  m.waiting.clear();
}

}  // namespace

void mbarrier_init(void* barrier, int arrivals, Site site) {
  Thread& t = *machine.current;
  Block& b = *t.block;
  if ((uintptr_t)barrier % kMbarrierBytes) fault(Kind::misaligned, "an mbarrier is aligned to 8 bytes", site);
  if (arrivals < 1 || arrivals > kMostArrivals)
    fault(Kind::mbarrier, "mbarrier.init for " + std::to_string(arrivals) + " arrivals", site);
  if (!b.dynamic.contains(barrier))
    fault(Kind::out_of_bounds, "mbarrier.init: the emulator has them in dynamic shared memory only", site);
  check_access(barrier, kMbarrierBytes, Access::write, __builtin_return_address(0));
  mark_shared(b.dynamic, (const char*)barrier, kMbarrierBytes, Use::mbarrier, now(t));
  Mbarrier m = {};
  m.expected = m.pending = arrivals;
  m.unit = machine.units++;
  m.made = now(t);
  b.mbarriers[(uintptr_t)barrier] = m;
}

Mbarrier& mbarrier_at(Block& b, const void* barrier, const char* what, Site site) {
  Thread& t = *machine.current;
  step(t);
  const auto found = b.mbarriers.find((uintptr_t)barrier);
  if (found == b.mbarriers.end())
    fault(Kind::mbarrier, std::string(what) + " of an mbarrier that is not initialised", site);
  if (!ordered(view_of(t), found->second.made))
    fault(Kind::race, std::string(what) + " of an mbarrier with no barrier after its initialisation", site);
  return found->second;
}

namespace {

void arrive(Mbarrier& m, Site site) {
  Thread& t = *machine.current;
  if (m.pending == 0) fault(Kind::mbarrier, "one arrival more than there are to be at " + text(m), site);
  merge(m.arriving, t.seen);
  set_seen(m.arriving, t.number, t.time++);
  --m.pending;
  finish_phase(m);
}

}  // namespace

// The bytes are counted before the arrival.
void mbarrier_arrive_expect(void* barrier, int bytes, Site site) {
  Mbarrier& m = mbarrier_at(*machine.current->block, barrier, "mbarrier.arrive.expect_tx", site);
  m.bytes += bytes;
  if (bytes < 0 || m.bytes > kMostBytes)
    fault(Kind::mbarrier, "more bytes expected than it can count at " + text(m), site);
  arrive(m, site);
}

void mbarrier_arrive_at(void* barrier, unsigned rank, Site site) {
  constexpr const char* kName = "mbarrier.arrive.shared::cluster";
  Block& b = block_of_cluster(rank, kName, site);
  Mbarrier& m = mbarrier_at(b, same_place(b, barrier), kName, site);
  Thread& t = *machine.current;
  if (&b != t.block) {
    m.from_outside = true;
    m.outside[t.number] = now(t);
  }
  arrive(m, site);
}

void mbarrier_copied(Mbarrier& m, int64_t bytes) {
  m.bytes -= bytes;
  if (m.bytes < -kMostBytes) fault(Kind::mbarrier, "more bytes copied than it can count at " + text(m));
  m.last_copied = m.phase + 1;
  set_seen(m.arriving, unit_index(m.unit), m.phase + 1);
  finish_phase(m);
}

// Of this parity the current phase may be, and then it has to end, or the one before it.
void mbarrier_wait(void* barrier, uint32_t parity, bool of_cluster, Site site) {
  Thread& t = *machine.current;
  if (parity > 1) fault(Kind::mbarrier, "mbarrier.try_wait.parity: the parity is 0 or 1", site);
  for (;;) {
    Mbarrier& m = mbarrier_at(*t.block, barrier, "mbarrier.try_wait", site);
    if ((m.phase & 1) != parity) {
      if (m.had_from_outside && !of_cluster)
        fault(Kind::race, "arrivals from another block, waited for by mbarrier.try_wait of the block's scope", site);
      return merge(t.seen, m.seen);
    }
    m.waiting.push_back(&t);
    wait_for("mbarrier.try_wait", site);
  }
}

// ---- fences --------------------------------------------------------------------------------------------------------

void fence_mbarrier_init() {
  Thread& t = *machine.current;
  for (auto& [address, m] : t.block->mbarriers)
    if (m.made.thread == t.number && m.announced.thread < 0) m.announced = now(t);
  ++t.time;
}

void fence_proxy_async() {
  Thread& t = *machine.current;
  t.proxy_fences.push_back(now(t));
  for (auto& [address, m] : t.block->mbarriers)
    if (m.made.thread == t.number && m.announced.thread < 0) m.announced = now(t);
  ++t.time;
}

}  // namespace cuda_on_host
