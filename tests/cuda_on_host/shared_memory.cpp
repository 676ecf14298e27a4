// What is known of each byte of shared memory: who has written and read it, and whether that lies before whoever uses
// it now. Also cp.async, whose copies are made when they are waited for, so that whoever uses them earlier is found
// out.
#include <algorithm>
#include <cstring>
#include <set>

#include "machine.h"

namespace cuda_on_host {

void set_seen(std::vector<uint32_t>& seen, size_t index, uint32_t time) {
  if (seen.size() <= index) seen.resize(index + 1);
  seen[index] = std::max(seen[index], time);
}

void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

bool ordered(const View& view, const Stamp& s) {
  if (s.thread < 0 || s.thread == view.thread) return true;
  const auto seen = [&](size_t index) { return index < view.seen->size() && (*view.seen)[index] >= s.time; };
  if (s.thread >= kFirstUnit) return seen(unit_index(s.thread - kFirstUnit));
  const Block& owner = machine.blocks[s.thread / machine.block_threads];
  return s.epoch < (&owner == view.block ? owner.epoch : owner.cluster_epoch) || seen(s.thread);
}

namespace {

bool is_unit(const Stamp& s) { return s.thread >= kFirstUnit; }

std::string whom(const Stamp& s) {
  return is_unit(s) ? "an asynchronous unit" : "thread " + std::to_string(s.thread % machine.block_threads);
}

[[noreturn]] void found(Kind kind, const SharedAccess& a, const std::string& text) {
  if (a.site.file) fault(kind, text, a.site);
  fault(kind, text, a.address);
}

[[noreturn]] void race(const SharedAccess& a, const Stamp& other, const char* mine, const char* theirs,
                       int64_t offset) {
  found(Kind::race, a,
        std::string(mine) + " of shared memory (byte " + std::to_string(offset) + ") and a " + theirs + " by " +
            whom(other) + " with " + (is_unit(other) ? "no wait for it" : "no barrier") + " between them");
}

// One reader is kept in the cell; others that are not ordered with it in a list, which the next write has to be ordered
// after as well.
int32_t reads_with(int32_t list, const Stamp& mine) {
  auto& reads = machine.reads;
  if (list >= 0 && reads[list].stamp.thread == mine.thread) list = reads[list].earlier;
  if (list >= 0 && reads[list].count >= 4 * (int)machine.threads.size()) {
    // A thread's last read stands for its earlier ones.
    std::set<int32_t> known;
    int32_t shorter = -1;
    for (int32_t i = list; i >= 0; i = reads[i].earlier) {
      if (!known.insert(reads[i].stamp.thread).second) continue;
      reads.push_back({reads[i].stamp, shorter, shorter < 0 ? 1 : reads[shorter].count + 1});
      shorter = (int32_t)reads.size() - 1;
    }
    list = shorter;
  }
  reads.push_back({mine, list, list < 0 ? 1 : reads[list].count + 1});
  return (int32_t)reads.size() - 1;
}

// Where the block's barriers order everything, readers from before the last one are of no interest: a cell's list is of
// the same time as the reader in it.
void forget_reads(const Block& b, Cell& c) {
  if (c.read.epoch < b.reads_kept) c.more_reads = -1;
}

void note_read(const SharedAccess& a, Cell& c) {
  if (c.read.thread == a.stamp.thread || ordered(a.view, c.read))
    c.read = a.stamp;
  else
    c.more_reads = reads_with(c.more_reads, a.stamp);
}

// A unit sees what a thread has written once the thread has fenced it, before it told whoever set the unit to work. (It
// may overwrite what threads have read without that.)
bool fenced(const View& view, const Stamp& write) {
  const auto& fences = machine.threads[write.thread].proxy_fences;
  const auto first = std::lower_bound(fences.begin(), fences.end(), write.time,
                                      [](const Stamp& fence, uint32_t time) { return fence.time < time; });
  return first != fences.end() && ordered(view, *first);
}

void check_cell(const SharedAccess& a, const Block& owner, Cell& c, int64_t i) {
  const bool writes = a.access != Access::read, atomic = a.access == Access::atomic;
  const auto byte = [&] { return "shared memory (byte " + std::to_string(i) + ")"; };
  forget_reads(*a.view.block, c);
  if (c.generation != owner.generation) {
    c = Cell();
    c.generation = owner.generation;
  }
  if (c.use == Use::copy_under_way)
    found(Kind::copy_under_way, a, byte() + " used before the wait for the copy of " + whom(c.write) + " into it");
  if (c.use == Use::mbarrier) found(Kind::mbarrier, a, byte() + " used as memory, and it is an mbarrier's");
  if (a.access != Access::write && c.write.thread < 0)
    found(Kind::unwritten, a, byte() + " read before it was written");
  const bool both_atomic = atomic && c.by_atomic;
  if (!both_atomic && !ordered(a.view, c.write)) race(a, c.write, writes ? "write" : "read", "write", i);
  if (is_unit(a.stamp) && c.write.thread >= 0 && !is_unit(c.write) && !fenced(a.view, c.write))
    found(Kind::proxy, a, byte() + " written by " + whom(c.write) + " without fence.proxy.async before a unit uses it");
  if (writes) {
    if (!ordered(a.view, c.read)) race(a, c.read, "write", "read", i);
    for (int32_t r = c.more_reads; r >= 0; r = machine.reads[r].earlier)
      if (!ordered(a.view, machine.reads[r].stamp)) race(a, machine.reads[r].stamp, "write", "read", i);
    c.write = a.stamp;
    c.by_atomic = atomic;
    c.read = Stamp();
    c.more_reads = -1;
  } else {
    note_read(a, c);
  }
}

}  // namespace

void check_shared(SharedAccess& a, Block& owner, SharedRange& range, const char* p, int64_t bytes) {
  const int64_t offset = p - range.begin;
  if (offset < 0 || offset + bytes > range.bytes)
    found(Kind::out_of_bounds, a,
          "shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
              std::to_string(range.bytes));
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& c = range.cells[i];
    if (a.any && !std::memcmp(&c, &a.before, sizeof c)) {
      c = a.after;
      continue;
    }
    a.before = c;
    check_cell(a, owner, c, i);
    a.after = c;
    a.any = true;
  }
}

void mark_shared(SharedRange& range, const char* p, int64_t bytes, Use use, const Stamp& writer) {
  for (int64_t i = p - range.begin, end = i + bytes; i < end; ++i) {
    range.cells[i].use = use;
    range.cells[i].write = writer;
  }
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

namespace {
SharedRange& range_of(Block& b, const void* p, Site site) {
  if (b.dynamic.contains(p)) return b.dynamic;
  if (b.fixed.contains(p)) return b.fixed;
  fault(Kind::out_of_bounds, "cp.async: a destination that is not in shared memory", site);
}
}  // namespace

void copy_async(void* shared, const void* global, int bytes, int valid, Site site) {
  Thread& t = *machine.current;
  const void* address = __builtin_return_address(0);
  if (valid < 0 || valid > bytes) fault(Kind::out_of_bounds, "cp.async: more valid bytes than bytes", site);
  if ((uintptr_t)shared % (uintptr_t)bytes || (uintptr_t)global % (uintptr_t)bytes)
    fault(Kind::misaligned, "cp.async: both addresses are aligned to the " + std::to_string(bytes) + " bytes", site);
  SharedRange& range = range_of(*t.block, shared, site);
  check_access(shared, bytes, Access::write, address);
  if (valid) check_access(global, valid, Access::read, address);
  mark_shared(range, (char*)shared, bytes, Use::copy_under_way, now(t));
  t.copies.push_back({(char*)shared, (const char*)global, bytes, valid});
}

void copy_async_commit() {
  Thread& t = *machine.current;
  size_t grouped = 0;
  for (size_t n : t.copy_groups) grouped += n;
  t.copy_groups.push_back(t.copies.size() - grouped);
}

void copy_async_wait(int pending) {
  Thread& t = *machine.current;
  while ((int)t.copy_groups.size() > pending) {
    const auto end = t.copies.begin() + (long)t.copy_groups.front();
    for (auto c = t.copies.begin(); c != end; ++c) {
      std::memcpy(c->to, c->from, (size_t)c->valid);
      std::memset(c->to + c->valid, 0, (size_t)(c->bytes - c->valid));
      mark_shared(range_of(*t.block, c->to, Site::here()), c->to, c->bytes, Use::plain, now(t));
    }
    t.copies.erase(t.copies.begin(), end);
    t.copy_groups.erase(t.copy_groups.begin());
  }
}

}  // namespace cuda_on_host
