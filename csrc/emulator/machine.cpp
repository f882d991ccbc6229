#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace emulator {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr char POISON = '\xff';  // bytes of ones are NaN in every type the kernels use
constexpr uint32_t MARGIN = 4096;  // behind shared memory: who writes there is found out
constexpr int RESIDENT = 4;          // clusters at a time, at most
constexpr int MOST_BLOCKS = 65000;   // that memory.cpp can tell from each other
Thread* running_thread = nullptr;

int draw(Machine& m, int n) { return static_cast<int>(m.random() % static_cast<uint64_t>(n)); }

std::string place(const Thread& t) {
  return std::string(t.block->cluster->grid->number ? "dependent grid, " : "") + "block " +
         std::to_string(t.block->index) + ", thread " + std::to_string(t.index);
}

}  // namespace

Thread& current() { return *running_thread; }

void fail(const std::string& what) {
  throw Failure(running_thread ? place(*running_thread) + ": " + what : what);
}

const Launch& Block::launch() const { return cluster->grid->launch; }

uint32_t Block::offset(const void* p, uint32_t bytes, const char* what) const {
  const auto at = static_cast<const char*>(p) - shared;
  const uint32_t all = launch().shared_bytes;
  if (at < 0 || at + static_cast<int64_t>(bytes) > all) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(at) + " are not in the " + std::to_string(all) +
         " bytes of shared memory");
  }
  return static_cast<uint32_t>(at);
}

Mbarrier& Block::mbarrier(const void* p, const char* what) {
  const uint32_t at = offset(p, 8, what);
  const auto found = mbarriers.find(at);
  if (found == mbarriers.end()) {
    fail(std::string(what) + ": no barrier was initialised at offset " + std::to_string(at));
  }
  return found->second;
}

int initial_registers(const Launch& launch) {
  const int most = std::min(REGISTERS / launch.threads / 8 * 8, 255);
  if (launch.registers > most) throw Failure("more registers at launch than there are");
  return launch.registers ? launch.registers : most;
}

Machine::Machine(const Launch& launch, std::function<void()> kernel)
    : random(launch.seed), order(launch.order) {
  dependent(launch, std::move(kernel));
}

void Machine::dependent(const Launch& launch, std::function<void()> kernel) {
  if (grids.size() == 2) throw Failure("a chain of dependent grids is not emulated");
  if (launch.shared_bytes > SHARED_LIMIT) {
    throw Failure("a block asks for " + std::to_string(launch.shared_bytes) + " bytes of shared " +
                  "memory, there are " + std::to_string(SHARED_LIMIT));
  }
  if (launch.blocks % launch.cluster != 0) throw Failure("the grid is no whole number of clusters");
  if (launch.cluster > 8) throw Failure("a cluster of more than 8 blocks");
  if (launch.threads % WARP != 0 || launch.threads > 1024) throw Failure("threads of a block");
  if (launch.blocks > MOST_BLOCKS) throw Failure("more blocks than are emulated");
  initial_registers(launch);
  grids.push_back(std::make_unique<Grid>(
      Grid{launch, std::move(kernel), static_cast<int>(grids.size())}));
}

void Machine::run() {
  memory().forget();
  for (const auto& grid : grids) {
    grid->unreleased = grid->launch.blocks;
    grid->unfinished = grid->launch.blocks / grid->launch.cluster;
    grid->clusters.resize(grid->unfinished);
    std::iota(grid->clusters.begin(), grid->clusters.end(), 0);
    std::shuffle(grid->clusters.begin(), grid->clusters.end(), random);
  }
  const size_t most = order == Order::random ? 1 + draw(*this, RESIDENT) : RESIDENT;
  for (begin_clusters(most); failure.empty() && !live.empty(); begin_clusters(most)) {
    // Any of them that can go on.
    size_t first = draw(*this, static_cast<int>(live.size())), i = 0;
    while (i < live.size() && !live[(first + i) % live.size()]->step()) ++i;
    if (i == live.size()) deadlock();
    if (failure.empty()) end_clusters();
  }
  running_thread = nullptr;
  if (!failure.empty()) throw Failure(failure);
}

void Machine::begin_clusters(size_t most) {
  for (const auto& grid : grids) {
    // The second grid waits until all of the first one's blocks have begun and let it; it finds
    // room of its own.
    const bool dependent = grid->number > 0;
    if (dependent && grids[0]->unreleased) return;
    if (dependent && order == Order::latest && grids[0]->unfinished) return;
    while (!grid->clusters.empty() && live.size() < most + (dependent ? 1 : 0)) {
      live.push_back(std::make_unique<Cluster>(*this, *grid, grid->clusters.back()));
      grid->clusters.pop_back();
    }
  }
}

void Machine::end_clusters() {
  for (size_t i = 0; i < live.size();) {
    if (!live[i]->ended()) {
      ++i;
      continue;
    }
    live[i]->check_margins();
    Grid& grid = *live[i]->grid;
    if (--grid.unfinished == 0) wake(grid.finished);
    live.erase(live.begin() + static_cast<int64_t>(i));
  }
}

void Machine::release(Block& block) {
  if (!block.released) --block.cluster->grid->unreleased;
  block.released = true;
}

void Machine::touch(Touch how, const void* p, int64_t bytes, const char* what, const void* value) {
  const Thread& t = current();
  const Toucher who{t.block->cluster->grid->number, t.block->index, !t.waited};
  memory().touch(how, who, p, bytes, what, value);
}

Cluster::Cluster(Machine& m, Grid& g, int number) : machine(&m), grid(&g) {
  for (int rank = 0; rank < g.launch.cluster; ++rank) {
    add_block(rank, number * g.launch.cluster + rank);
  }
}

void Cluster::add_block(int rank, int index) {
  const Launch& launch = grid->launch;
  const size_t bytes = (launch.shared_bytes + MARGIN + 1023) / 1024 * 1024;
  auto block = std::make_unique<Block>();
  block->cluster = this;
  block->machine = machine;
  block->index = index;
  block->rank = rank;
  block->arena.reset(static_cast<char*>(std::aligned_alloc(1024, bytes)));
  block->shared = block->arena.get();
  std::memset(block->shared, POISON, bytes);
  block->groups.resize((launch.threads + WARPGROUP - 1) / WARPGROUP);
  for (Warpgroup& g : block->groups) g.registers = initial_registers(launch);
  block->registers = (initial_registers(launch) + 7) / 8 * 8 * launch.threads;
  block->dirty.assign(launch.shared_bytes, 0);
  block->running = launch.threads;
  for (int w = 0; w < launch.threads / WARP; ++w) block->elected.push_back(draw(*machine, WARP));
  for (int i = 0; i < launch.threads; ++i) add_thread(*block, i);
  running += launch.threads;
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
      if (!t->accumulators.empty()) fail("ends with a WGMMA whose result it has not waited for");
      if (t->open_stores->writes) fail("ends with TMA stores that it has not committed");
      if (--t->block->running == 0) {
        if (t->block->stores_reading) {
          fail("the block ends while a TMA store still reads its shared memory");
        }
        machine->release(*t->block);
      }
    } catch (const std::exception& error) {
      if (machine->failure.empty()) machine->failure = error.what();
    }
  };
  thread->fiber = std::make_unique<Fiber>(body, STACK);
  runnable.push_back(t);
  block.threads.push_back(std::move(thread));
}

bool Cluster::step() {
  const bool idle = pending.empty();
  run_pending(false);
  if (!machine->failure.empty()) return true;
  if (runnable.empty()) {
    if (pending.empty()) return !idle;
    run_pending(true);
    return true;
  }
  const int i = draw(*machine, static_cast<int>(runnable.size()));
  Thread* t = runnable[i];
  runnable[i] = runnable.back();
  runnable.pop_back();
  enter(*t);
  if (t->fiber->finished()) {
    --running;
  } else if (!t->waits_for) {
    runnable.push_back(t);
  }
  return true;
}

void Cluster::check_margins() const {
  for (const auto& block : blocks) {
    const char* end = block->shared + grid->launch.shared_bytes;
    if (!std::all_of(end, end + 1024, [](char c) { return c == POISON; })) {
      machine->failure =
          "block " + std::to_string(block->index) + ": wrote behind its shared memory";
    }
  }
}

// Does some of the pending work: what may be done now or, if nothing else can go on, any of it,
// that which is to be late last.
void Cluster::run_pending(bool all) {
  const bool late_only = std::all_of(pending.begin(), pending.end(),
                                     [](const Pending& p) { return p.mood == Pending::late; });
  for (int tries = all ? 1 : 2; tries && !pending.empty(); --tries) {
    if (!all && machine->order == Order::random && draw(*machine, 4) != 0) return;
    int i = draw(*machine, static_cast<int>(pending.size()));
    while (all && !late_only && pending[i].mood == Pending::late) {
      i = draw(*machine, static_cast<int>(pending.size()));
    }
    int chosen = i;
    for (int j = 0; j < i; ++j) {  // the first of its queue
      if (pending[i].queue >= 0 && pending[j].queue == pending[i].queue) {
        chosen = j;
        break;
      }
    }
    if (!all && pending[chosen].mood == Pending::late) continue;
    const Pending work = std::move(pending[chosen]);
    pending.erase(pending.begin() + chosen);
    running_thread = work.by;
    try {
      work.run();
    } catch (const std::exception& error) {
      if (machine->failure.empty()) machine->failure = error.what();
    }
    running_thread = nullptr;
  }
}

void Cluster::add(std::function<void()> work, int queue) {
  const bool in_queue = std::any_of(pending.begin(), pending.end(), [&](const Pending& p) {
    return queue >= 0 && p.queue == queue;
  });
  const int mood = machine->order == Order::earliest ? 0
                   : machine->order == Order::latest ? 2
                                                     : draw(*machine, 3);
  if (mood == 0 && !in_queue) return work();
  pending.push_back(
      {mood == 2 ? Pending::late : Pending::any_time, std::move(work), queue, &current()});
}

void Machine::wait(Channel& channel, const std::function<std::string()>& what,
                   const std::function<bool()>& ready) {
  Thread& t = current();
  while (!ready()) {
    t.waits_for = &what;
    channel.waiting.push_back(&t);
    t.fiber->leave();
  }
}

void Machine::pause(int odds) {
  if (draw(*this, odds) == 0) current().fiber->leave();
}

void Machine::wake(Channel& channel) {
  for (Thread* t : channel.waiting) {
    t->waits_for = nullptr;
    t->block->cluster->runnable.push_back(t);
  }
  channel.waiting.clear();
}

void Machine::deadlock() {
  std::string all = "deadlock:";
  for (const auto& cluster : live) {
    const std::string grid = cluster->grid->number ? "dependent grid, " : "";
    for (const auto& block : cluster->blocks) {
      for (int w = 0; w < cluster->grid->launch.threads / WARP; ++w) {
        std::map<std::string, int> reasons;
        for (int lane = 0; lane < WARP; ++lane) {
          const Thread& t = *block->threads[w * WARP + lane];
          if (t.waits_for) ++reasons[(*t.waits_for)()];
        }
        for (const auto& [reason, lanes] : reasons) {
          all += "\n  " + grid + "block " + std::to_string(block->index) + ", warp " +
                 std::to_string(w) + ", " + std::to_string(lanes) + " lanes wait for " + reason;
        }
      }
    }
  }
  throw Failure(all);
}

void enter(Thread& thread) {
  running_thread = &thread;
  thread.fiber->enter();
  running_thread = nullptr;
}

}  // namespace emulator
