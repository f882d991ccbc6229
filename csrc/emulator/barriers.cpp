// Barriers of csrc/sm90/primitives.cuh, and the operations that all lanes of a warp must call.
//
// A barrier passes clocks on (shared_memory.h): a thread that waits has observed what the threads
// observed that arrived.
#include <utility>

#include "calls.h"
#include "primitives.h"

namespace emulator {

Block& cluster_block(int rank, const char* what) {
  if (rank < 0 || rank >= static_cast<int>(cluster().blocks.size())) {
    fail(std::string(what) + ": no block of rank " + std::to_string(rank));
  }
  const Thread& t = current();
  if (rank != t.block->rank && !t.passed_cluster_barrier) {
    fail(std::string(what) + ": this thread has not passed a cluster barrier");
  }
  return *cluster().blocks[rank];
}

std::vector<uint64_t> collect(CollectiveKind kind, int group, int size, int rank, uint64_t value,
                              const char* what) {
  Thread& t = current();
  Block& block = *t.block;
  const uint64_t call = t.collective_calls[kind]++;
  const auto key = std::make_pair(kind * 1024 + group, call);
  auto& c = block.collectives[key];
  c.values.resize(size);
  c.values[rank] = value;
  if (kind == SYNC) {  // the others do not order accesses to memory
    t.finish_stores();
    c.clock.merge(t.clock);
  }
  if (++c.arrived == size) {
    machine().wake(c.waiters);
  } else {
    machine().wait(c.waiters, [&] { return std::string(what) + " by all lanes"; },
                   [&] { return c.arrived == size; });
  }
  if (kind == SYNC) t.clock.merge(c.clock);
  const std::vector<uint64_t> values = c.values;
  if (++c.returned == size) block.collectives.erase(key);
  return values;
}

std::vector<uint64_t> warp_collect(CollectiveKind kind, uint64_t value, const char* what) {
  Thread& t = current();
  return collect(kind, t.warp(), WARP_SIZE, t.lane(), value, what);
}

bool converge(const char* what, uint64_t operands) {
  Thread& t = current();
  Warp& warp = t.block->warps[t.warp()];
  const uint64_t number = t.aligned_calls++ - warp.completed;
  if (number == warp.calls.size()) warp.calls.push_back({what, operands, 0});
  Warp::Call& call = warp.calls[number];
  if (std::string(call.what) != what || call.operands != operands) {
    fail(std::string("the lanes of the warp diverge: one calls ") + what + ", another " +
         call.what + (std::string(call.what) == what ? " with other operands" : ""));
  }
  if (++call.lanes < WARP_SIZE) return false;
  warp.calls.pop_front();  // of earlier calls none is left, as lanes make them in order
  ++warp.completed;
  machine().wake(warp.waiters);
  return true;
}

void converge_and_wait(const char* what, uint64_t operands) {
  Thread& t = current();
  if (converge(what, operands)) return;
  Warp& warp = t.block->warps[t.warp()];
  const uint64_t calls = t.aligned_calls;
  machine().wait(warp.waiters, [&] { return std::string(what) + " by all lanes"; },
                 [&] { return warp.completed >= calls; });
}

namespace {

std::string describe(const Mbarrier& b, uint32_t offset, uint32_t parity) {
  return "barrier at offset " + std::to_string(offset) + ", parity " + std::to_string(parity) +
         " (pending: " + std::to_string(b.pending_arrivals) + " of " +
         std::to_string(b.expected_arrivals) + " arrivals and " +
         std::to_string(b.pending_bytes) + " bytes, phase " + std::to_string(b.phase) + ")";
}

// Completes the phase if no arrivals and no bytes are pending.
void maybe_complete_phase(Machine& m, Mbarrier& b) {
  if (b.pending_arrivals == 0 && b.pending_bytes == 0) {
    ++b.phase;
    b.pending_arrivals = b.expected_arrivals;
    b.arrived = std::exchange(b.arriving, {});
    b.arrived_cluster = std::exchange(b.arriving_cluster, {});
    m.wake(b.waiters);
  }
}

enum class Scope { block, cluster };

void check_arrival(const Block& block, const Mbarrier& b) {
  if (b.pending_arrivals == 0) fail("a barrier gets more arrivals than its initial count");
  if (block.running_threads == 0) fail("arrival at a barrier of a block that has ended");
}

void arrive(Block& block, Mbarrier& b, int64_t bytes, Scope scope = Scope::block) {
  Thread& t = current();
  t.finish_stores();
  check_arrival(block, b);
  if (&block == t.block) {
    b.arriving.merge(t.clock);
  } else if (scope == Scope::cluster) {
    b.arriving_cluster.merge_blocks(t.clock);
    b.arriving_cluster.blocks[t.block->rank] = machine().time++;
  }
  b.pending_bytes += bytes;
  if (b.pending_bytes >= 1 << 20) fail("a barrier expects more than 2^20 - 1 bytes");
  --b.pending_arrivals;
  maybe_complete_phase(*block.machine, b);
}

void arrive_at(sm90::Barrier* barrier, int rank, Scope scope, const char* what) {
  const uint32_t offset = current().block->offset(barrier, 8, what);
  Block& block = cluster_block(rank, what);
  Mbarrier& b = block.mbarrier(block.shared + offset, what);
  if (!b.init_fenced) fail(std::string(what) + ": no barrier_init_fence after barrier_init");
  arrive(block, b, 0, scope);
}

void wait_at(sm90::Barrier* barrier, uint32_t parity, Scope scope, const char* what) {
  Thread& t = current();
  Block& block = *t.block;
  Mbarrier& b = block.mbarrier(barrier, what);
  if (parity > 1) {
    fail(std::string(what) + ": parity: expected 0 or 1, got " + std::to_string(parity));
  }
  machine().maybe_yield(8);
  const uint32_t offset = block.offset(barrier, 8, what);
  machine().wait(b.waiters, [&] { return describe(b, offset, parity); },
                 [&] { return (b.phase & 1) != parity; });
  t.clock.merge(b.arrived);
  if (scope == Scope::cluster) t.clock.merge_blocks(b.arrived_cluster);
  t.clock.observe_phase(b.number, b.phase);
}

// Lets the warp arrive when its last lane calls this. `what` is a literal: it names the call.
NamedBarrier& named_arrival(int id, int threads, const char* what) {
  Thread& t = current();
  t.finish_stores();
  if (id < 0 || id > 15) fail("named barrier: id: expected 1 to 15, got " + std::to_string(id));
  if (threads % WARP_SIZE || threads < WARP_SIZE || threads > 1024) {
    fail("named barrier: threads: expected a multiple of 32 up to 1024, got " +
         std::to_string(threads));
  }
  const std::string name = "named barrier " + std::to_string(id);
  auto& b = t.block->named_barriers[id];
  if (b.arrived && b.threads != threads) {
    fail(name + ": threads: expected " + std::to_string(b.threads) +
         " as in another call, got " + std::to_string(threads));
  }
  b.arriving.merge(t.clock);
  if (!converge(what, static_cast<uint64_t>(id) << 32 | threads)) return b;
  t.block->warps[t.warp()].generation = b.generation;
  b.threads = threads;
  if (!b.arrived_warps.insert(t.warp()).second) {
    fail(name + ": the warp arrives twice in one phase");
  }
  b.arrived += WARP_SIZE;
  if (b.arrived >= threads) {
    b.arrived = 0;
    b.arrived_warps.clear();
    b.released = std::exchange(b.arriving, {});
    ++b.generation;
    machine().wake(b.waiters);
  }
  return b;
}

void sync(int id, int threads, const char* what, const std::string& name) {
  Thread& t = current();
  NamedBarrier& b = named_arrival(id, threads, what);
  Warp& warp = t.block->warps[t.warp()];
  const uint64_t calls = t.aligned_calls;
  machine().wait(warp.waiters, [&] { return name + " by all lanes"; },
                 [&] { return warp.completed >= calls; });
  const uint64_t generation = warp.generation;
  machine().wait(b.waiters, [&] { return name; }, [&] { return b.generation != generation; });
  t.clock.merge(b.released);
}

void check_not_block_sync(int id) {
  if (id == 0) fail("named barrier 0 is reserved for block_sync");
}

}  // namespace

void complete_bytes(Block& block, Mbarrier& barrier, uint32_t bytes) {
  barrier.pending_bytes -= bytes;
  if (barrier.pending_bytes <= -(1 << 20)) {
    fail("a barrier gets more than 2^20 - 1 bytes that no thread has announced");
  }
  maybe_complete_phase(*block.machine, barrier);
}

void complete_arrival(Mbarrier& barrier) {
  Block& block = *current().block;
  check_arrival(block, barrier);
  --barrier.pending_arrivals;
  maybe_complete_phase(*block.machine, barrier);
}

Mbarrier& barrier_of_copy(Block& block, uint32_t offset) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) fail("a copy completes on a barrier not initialized");
  if (block.running_threads == 0) fail("a copy writes to a block that has ended");
  return found->second;
}

void check_no_barrier(const Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  const auto next = block.mbarriers.lower_bound(offset < 7 ? 0 : offset - 7);
  if (next != block.mbarriers.end() && next->first < offset + bytes) {
    fail(std::string(what) + " overwrites the barrier at offset " + std::to_string(next->first));
  }
}

}  // namespace emulator

namespace sm90 {

using namespace emulator;

void barrier_init(Barrier* barrier, int count) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(barrier, 8, "barrier_init");
  if (offset % 8) fail("barrier_init: address is not aligned");
  if (count < 1 || count >= 1 << 20) {
    fail("barrier_init: count: expected 1 to 2^20 - 1, got " + std::to_string(count));
  }
  if (t.block->mbarriers.count(offset)) fail("barrier_init: the barrier is initialized already");
  const auto number = static_cast<int>(t.block->mbarriers.size());
  Mbarrier& b = t.block->mbarriers[offset];
  b.number = number;
  b.expected_arrivals = b.pending_arrivals = count;
  b.init_thread = t.index;
}

void barrier_init_fence() {
  Thread& t = current();
  for (auto& [offset, b] : t.block->mbarriers) {
    (void)offset;
    if (b.init_thread == t.index) b.init_fenced = true;
  }
}

void barrier_arrive(Barrier* barrier) {
  machine().maybe_yield(8);
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive"), 0);
}

void barrier_arrive_remote(Barrier* barrier, int rank) {
  arrive_at(barrier, rank, Scope::block, "barrier_arrive_remote");
}

void barrier_arrive_release_cluster(Barrier* barrier, int rank) {
  arrive_at(barrier, rank, Scope::cluster, "barrier_arrive_release_cluster");
}

void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive_expect"), bytes);
}

void barrier_wait(Barrier* barrier, uint32_t parity) {
  wait_at(barrier, parity, Scope::block, "barrier_wait");
}

void barrier_wait_acquire_cluster(Barrier* barrier, uint32_t parity) {
  wait_at(barrier, parity, Scope::cluster, "barrier_wait_acquire_cluster");
}

void named_barrier_sync(int id, int threads) {
  check_not_block_sync(id);
  sync(id, threads, "named_barrier_sync", "named barrier " + std::to_string(id));
}

void named_barrier_arrive(int id, int threads) {
  check_not_block_sync(id);
  named_arrival(id, threads, "named_barrier_arrive");
}

void block_sync() { sync(0, current().block->launch().threads, "block_sync", "block_sync"); }

void warp_sync() { warp_collect(SYNC, 0, "warp_sync"); }

void cluster_arrive() {
  Cluster& c = cluster();
  Thread& t = current();
  t.finish_stores();
  if (t.cluster_arrivals++ != 0) fail("cluster_arrive: no cluster_wait since the last call");
  c.arriving[t.block->rank].merge(t.clock);
  if (!converge("cluster_arrive")) return;
  c.arrived_threads += WARP_SIZE;
  if (c.arrived_threads < c.grid->launch.threads * c.grid->launch.cluster) return;
  c.arrived_threads = 0;
  const uint64_t now = machine().time++;
  for (auto& block : c.blocks) {
    Clock& released = c.released[block->rank];
    released = c.arriving[block->rank];
    for (const Clock& other : c.arriving) released.merge_blocks(other);
    for (size_t rank = 0; rank < c.blocks.size(); ++rank) released.blocks[rank] = now;
    for (auto& thread : block->threads) thread->cluster_arrivals = -thread->cluster_arrivals;
  }
  machine().wake(c.waiters);
}

void cluster_wait() {
  Thread& t = current();
  if (t.cluster_arrivals == 0) fail("cluster_wait: no cluster_arrive since the last call");
  converge_and_wait("cluster_wait");
  machine().wait(cluster().waiters, [] { return "the cluster barrier"; },
                 [&] { return t.cluster_arrivals < 0; });
  t.cluster_arrivals = 0;
  t.passed_cluster_barrier = true;
  t.clock.merge(cluster().released[t.block->rank]);
}

}  // namespace sm90
