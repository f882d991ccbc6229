#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr char POISON = '\xff';         // bytes of ones are NaN in every type the kernels use
constexpr uint32_t GUARD_BYTES = 4096;  // after shared memory, to detect writes past its end
constexpr int MAX_RUNNING_CLUSTERS = 4;
constexpr int MAX_BLOCKS = 65000;  // the block records of memory.cpp have 16 bits
Thread* running_thread = nullptr;

int draw(Machine& m, int n) { return static_cast<int>(m.random() % static_cast<uint64_t>(n)); }

std::string position(const Thread& t) {
  return std::string(t.block->cluster->grid->index ? "dependent grid, " : "") + "block " +
         std::to_string(t.block->index) + ", thread " + std::to_string(t.index);
}

}  // namespace

Thread& current() { return *running_thread; }

void fail(const std::string& message) {
  throw Failure(running_thread ? position(*running_thread) + ": " + message : message);
}

const Launch& Block::launch() const { return cluster->grid->launch; }

uint32_t Block::offset(const void* p, uint32_t bytes, const char* what) const {
  const auto start = static_cast<const char*>(p) - shared;
  const uint32_t size = launch().shared_bytes;
  if (start < 0 || start + static_cast<int64_t>(bytes) > size) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(start) + " are not in the " + std::to_string(size) +
         " bytes of shared memory");
  }
  return static_cast<uint32_t>(start);
}

void Thread::finish_stores() {
  for (const DelayedStore& s : delayed_stores) {
    std::memcpy(block->shared + s.offset, s.data.data(), s.bytes);
  }
  delayed_stores.clear();
}

Mbarrier& Block::mbarrier(const void* p, const char* what) {
  const uint32_t start = offset(p, 8, what);
  const auto found = mbarriers.find(start);
  if (found == mbarriers.end()) {
    fail(std::string(what) + ": no initialized barrier at offset " + std::to_string(start));
  }
  return found->second;
}

int initial_registers(const Launch& launch) {
  const int limit = std::min(SM_REGISTERS / launch.threads / 8 * 8, 255);
  if (launch.registers > limit) {
    throw Failure("launch: expected at most " + std::to_string(limit) +
                  " registers per thread, got " + std::to_string(launch.registers));
  }
  return launch.registers ? launch.registers : limit;
}

Machine::Machine(const Launch& launch, std::function<void()> kernel)
    : random(launch.seed), order(launch.order) {
  add_dependent_grid(launch, std::move(kernel));
}

void Machine::add_dependent_grid(const Launch& launch, std::function<void()> kernel) {
  if (grids.size() == 2) throw Failure("launch: only one dependent grid is emulated");
  const auto refuse = [](const std::string& expected, int64_t got) {
    throw Failure("launch: expected " + expected + ", got " + std::to_string(got));
  };
  if (launch.shared_bytes > MAX_SHARED_BYTES) {
    refuse("at most " + std::to_string(MAX_SHARED_BYTES) + " bytes of shared memory per block",
           launch.shared_bytes);
  }
  if (launch.cluster > 8) refuse("at most 8 blocks per cluster", launch.cluster);
  if (launch.blocks % launch.cluster != 0) {
    refuse("a multiple of " + std::to_string(launch.cluster) + " blocks", launch.blocks);
  }
  if (launch.threads % WARP_SIZE != 0 || launch.threads > 1024) {
    refuse("a multiple of 32 threads per block, at most 1024", launch.threads);
  }
  if (launch.blocks > MAX_BLOCKS) {
    refuse("at most " + std::to_string(MAX_BLOCKS) + " blocks", launch.blocks);
  }
  initial_registers(launch);
  grids.push_back(std::make_unique<Grid>(
      Grid{launch, std::move(kernel), static_cast<int>(grids.size())}));
}

void Machine::run() {
  memory().clear_records();
  for (const auto& grid : grids) {
    grid->unreleased_blocks = grid->launch.blocks;
    grid->unfinished_clusters = grid->launch.blocks / grid->launch.cluster;
    auto& numbers = grid->unstarted_clusters;
    numbers.resize(grid->unfinished_clusters);
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random);
  }
  const size_t max_running = order == Order::random ? 1 + draw(*this, MAX_RUNNING_CLUSTERS)
                                                    : MAX_RUNNING_CLUSTERS;
  start_clusters(max_running);
  while (failure.empty() && !running_clusters.empty()) {
    // Step the first cluster that can progress, from a random one on.
    const size_t count = running_clusters.size(), first = draw(*this, static_cast<int>(count));
    size_t i = 0;
    while (i < count && !running_clusters[(first + i) % count]->step()) ++i;
    if (i == count) deadlock();
    if (failure.empty()) remove_ended_clusters();
    start_clusters(max_running);
  }
  running_thread = nullptr;
  if (!failure.empty()) throw Failure(failure);
}

void Machine::start_clusters(size_t max_running) {
  auto& clusters = running_clusters;
  for (const auto& grid : grids) {
    // The dependent grid starts when every block of the first grid has released it or ended. One of
    // its clusters may run in addition to `max_running`.
    const bool dependent = grid->index > 0;
    if (dependent && grids[0]->unreleased_blocks) return;
    if (dependent && order == Order::latest && grids[0]->unfinished_clusters) return;
    auto& numbers = grid->unstarted_clusters;
    while (!numbers.empty() && clusters.size() < max_running + (dependent ? 1 : 0)) {
      clusters.push_back(std::make_unique<Cluster>(*this, *grid, numbers.back()));
      numbers.pop_back();
    }
  }
}

void Machine::remove_ended_clusters() {
  auto& clusters = running_clusters;
  for (size_t i = 0; i < clusters.size();) {
    if (!clusters[i]->ended()) {
      ++i;
      continue;
    }
    clusters[i]->check_guard_bytes();
    Grid& grid = *clusters[i]->grid;
    if (--grid.unfinished_clusters == 0) wake(grid.finish_waiters);
    clusters.erase(clusters.begin() + static_cast<int64_t>(i));
  }
}

void Machine::release_dependents(Block& block) {
  if (!block.released_dependents) --block.cluster->grid->unreleased_blocks;
  block.released_dependents = true;
}

void Machine::record_access(Access access, const void* p, int64_t bytes, const char* what,
                            const void* value) {
  const Thread& t = current();
  const Accessor accessor{t.block->cluster->grid->index, t.block->index, !t.waited_for_grid};
  memory().record(access, accessor, p, bytes, what, value);
}

Cluster::Cluster(Machine& m, Grid& g, int number) : machine(&m), grid(&g) {
  arriving.resize(g.launch.cluster);
  released.resize(g.launch.cluster);
  for (int rank = 0; rank < g.launch.cluster; ++rank) {
    add_block(rank, number * g.launch.cluster + rank);
  }
}

void Cluster::add_block(int rank, int index) {
  const Launch& launch = grid->launch;
  const size_t bytes = (launch.shared_bytes + GUARD_BYTES + 1023) / 1024 * 1024;
  auto block = std::make_unique<Block>();
  block->cluster = this;
  block->machine = machine;
  block->index = index;
  block->rank = rank;
  block->arena.reset(static_cast<char*>(std::aligned_alloc(1024, bytes)));
  block->shared = block->arena.get();
  std::memset(block->shared, POISON, bytes);
  block->groups.resize((launch.threads + WARPGROUP_SIZE - 1) / WARPGROUP_SIZE);
  for (Warpgroup& g : block->groups) g.registers = initial_registers(launch);
  block->registers = (initial_registers(launch) + 7) / 8 * 8 * launch.threads;
  block->records.reset(launch.shared_bytes, launch.cluster > 1);
  block->warps.resize(launch.threads / WARP_SIZE);
  block->running_threads = launch.threads;
  for (int w = 0; w < launch.threads / WARP_SIZE; ++w) {
    block->elected_lanes.push_back(draw(*machine, WARP_SIZE));
  }
  for (int i = 0; i < launch.threads; ++i) add_thread(*block, i);
  running_threads += launch.threads;
  blocks.push_back(std::move(block));
}

void Cluster::add_thread(Block& block, int index) {
  auto thread = std::make_unique<Thread>();
  thread->block = &block;
  thread->index = index;
  Thread* t = thread.get();
  auto body = [this, t] {
    try {
      grid->kernel();
      t->finish_stores();
      Warp& warp = t->block->warps[t->warp()];
      if (--warp.running_lanes == 0 && !warp.calls.empty()) {
        const Warp::Call& call = warp.calls.front();
        fail(std::string(call.what) + ": called by " + std::to_string(call.lanes) +
             " lanes of the warp only");
      }
      if (!t->accumulators.empty()) fail("the thread ends without a wait for its last WGMMA");
      if (t->open_store_group->pending_writes) fail("the thread ends with uncommitted TMA stores");
      if (--t->block->running_threads == 0) {
        if (t->block->stores_reading) {
          fail("the block ends while a TMA store still reads its shared memory");
        }
        machine->release_dependents(*t->block);
      }
    } catch (const std::exception& error) {
      if (machine->failure.empty()) machine->failure = error.what();
    }
  };
  thread->fiber = std::make_unique<Fiber>(body, STACK_BYTES);
  runnable.push_back(t);
  block.threads.push_back(std::move(thread));
}

bool Cluster::step() {
  const bool no_work = pending.empty();
  run_pending(false);
  if (!machine->failure.empty()) return true;
  if (runnable.empty()) {
    if (pending.empty()) return !no_work;
    run_pending(true);
    return true;
  }
  const int i = draw(*machine, static_cast<int>(runnable.size()));
  Thread* t = runnable[i];
  runnable[i] = runnable.back();
  runnable.pop_back();
  enter(*t);
  if (t->fiber->finished()) {
    --running_threads;
  } else if (!t->wait_reason) {
    runnable.push_back(t);
  }
  return true;
}

void Cluster::check_guard_bytes() const {
  for (const auto& block : blocks) {
    const char* end = block->shared + grid->launch.shared_bytes;
    if (!std::all_of(end, end + 1024, [](char c) { return c == POISON; })) {
      machine->failure =
          "block " + std::to_string(block->index) + ": wrote past the end of its shared memory";
    }
  }
}

// Does some pending work: up to two pieces of policy any_time or, if all threads are blocked, one
// piece of any policy, as_late_as_possible last.
void Cluster::run_pending(bool blocked) {
  const auto is_late = [](const PendingWork& p) {
    return p.policy == PendingWork::as_late_as_possible;
  };
  const bool only_late = std::all_of(pending.begin(), pending.end(), is_late);
  for (int tries = blocked ? 1 : 2; tries && !pending.empty(); --tries) {
    if (!blocked && machine->order == Order::random && draw(*machine, 4) != 0) return;
    int i = draw(*machine, static_cast<int>(pending.size()));
    while (blocked && !only_late && is_late(pending[i])) {
      i = draw(*machine, static_cast<int>(pending.size()));
    }
    int chosen = i;
    for (int j = 0; j < i; ++j) {  // the first piece of the same queue
      if (pending[i].queue >= 0 && pending[j].queue == pending[i].queue) {
        chosen = j;
        break;
      }
    }
    if (!blocked && is_late(pending[chosen])) continue;
    const PendingWork work = std::move(pending[chosen]);
    pending.erase(pending.begin() + chosen);
    running_thread = work.thread;
    try {
      work.run();
    } catch (const std::exception& error) {
      if (machine->failure.empty()) machine->failure = error.what();
    }
    running_thread = nullptr;
  }
}

void Cluster::schedule(std::function<void()> work, int queue) {
  const bool queue_busy = std::any_of(pending.begin(), pending.end(), [&](const PendingWork& p) {
    return queue >= 0 && p.queue == queue;
  });
  const int delay = machine->order == Order::earliest ? 0  // 0: now, 1: any time, 2: late
                    : machine->order == Order::latest ? 2
                                                      : draw(*machine, 3);
  if (delay == 0 && !queue_busy) return work();
  const auto policy = delay == 2 ? PendingWork::as_late_as_possible : PendingWork::any_time;
  pending.push_back({policy, std::move(work), queue, &current()});
}

void Machine::wait(WaitList& waiters, const std::function<std::string()>& reason,
                   const std::function<bool()>& ready) {
  Thread& t = current();
  while (!ready()) {
    t.wait_reason = &reason;
    waiters.threads.push_back(&t);
    t.fiber->leave();
  }
}

void Machine::maybe_yield(int odds) {
  if (draw(*this, odds) == 0) current().fiber->leave();
}

void Machine::maybe_lag() {
  constexpr int ODDS = 256, SWITCHES = 40;
  if (draw(*this, ODDS) != 0) return;
  for (int i = 0; i < SWITCHES; ++i) current().fiber->leave();
}

void Machine::wake(WaitList& waiters) {
  for (Thread* t : waiters.threads) {
    t->wait_reason = nullptr;
    t->block->cluster->runnable.push_back(t);
  }
  waiters.threads.clear();
}

void Machine::deadlock() {
  std::string message = "deadlock:";
  for (const auto& cluster : running_clusters) {
    const std::string grid = cluster->grid->index ? "dependent grid, " : "";
    for (const auto& block : cluster->blocks) {
      for (int w = 0; w < cluster->grid->launch.threads / WARP_SIZE; ++w) {
        std::map<std::string, int> reasons;
        for (int lane = 0; lane < WARP_SIZE; ++lane) {
          const Thread& t = *block->threads[w * WARP_SIZE + lane];
          if (t.wait_reason) ++reasons[(*t.wait_reason)()];
        }
        for (const auto& [reason, lanes] : reasons) {
          message += "\n  " + grid + "block " + std::to_string(block->index) + ", warp " +
                 std::to_string(w) + ", " + std::to_string(lanes) + " lanes wait for " + reason;
        }
      }
    }
  }
  throw Failure(message);
}

void enter(Thread& thread) {
  running_thread = &thread;
  thread.fiber->enter();
  running_thread = nullptr;
}

}  // namespace emulator
