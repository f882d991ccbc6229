#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace emulator {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr char POISON = '\xff';  // bytes of ones are NaN in every type the kernels use
constexpr uint32_t MARGIN = 4096;  // behind shared memory: who writes there is found out
Thread* running_thread = nullptr;

int draw(Machine& m, int n) { return static_cast<int>(m.random() % static_cast<uint64_t>(n)); }

std::string place(const Thread& t) {
  return "block " + std::to_string(t.block->index) + ", thread " + std::to_string(t.index);
}

}  // namespace

Thread& current() { return *running_thread; }

void fail(const std::string& what) {
  throw Failure(running_thread ? place(*running_thread) + ": " + what : what);
}

uint32_t Block::offset(const void* p, uint32_t bytes, const char* what) const {
  const auto at = static_cast<const char*>(p) - shared;
  if (at < 0 || at + static_cast<int64_t>(bytes) > machine->launch.shared_bytes) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(at) + " are not in the " + std::to_string(machine->launch.shared_bytes) +
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

Machine::Machine(const Launch& l, std::function<void()> k)
    : launch(l), kernel(std::move(k)), random(l.seed) {
  if (launch.shared_bytes > SHARED_LIMIT) {
    throw Failure("a block asks for " + std::to_string(launch.shared_bytes) + " bytes of shared " +
                  "memory, there are " + std::to_string(SHARED_LIMIT));
  }
  if (launch.blocks % launch.cluster != 0) throw Failure("the grid is no whole number of clusters");
  if (launch.threads % WARP != 0 || launch.threads > 1024) throw Failure("threads of a block");
}

Machine::~Machine() = default;

int Machine::initial_registers() const {
  const int most = std::min(REGISTERS / launch.threads / 8 * 8, 255);
  if (launch.registers > most) throw Failure("more registers at launch than there are");
  return launch.registers ? launch.registers : most;
}

void Machine::run() {
  std::vector<int> order(launch.blocks / launch.cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int i : order) run_cluster(i * launch.cluster);
}

void enter(Thread& thread) {
  running_thread = &thread;
  thread.fiber->enter();
  running_thread = nullptr;
}

void Machine::run_cluster(int first) {
  std::vector<std::unique_ptr<char, void (*)(void*)>> arenas;
  cluster.clear();
  runnable.clear();
  pending.clear();
  cluster_arrived = 0;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    const size_t bytes = (launch.shared_bytes + MARGIN + 1023) / 1024 * 1024;
    arenas.emplace_back(static_cast<char*>(std::aligned_alloc(1024, bytes)), std::free);
    std::memset(arenas.back().get(), POISON, bytes);
    auto block = std::make_unique<Block>();
    block->machine = this;
    block->index = first + rank;
    block->rank = rank;
    block->shared = arenas.back().get();
    block->groups.resize((launch.threads + WARPGROUP - 1) / WARPGROUP);
    for (Warpgroup& g : block->groups) g.registers = initial_registers();
    block->dirty.assign(launch.shared_bytes, 0);
    block->running = launch.threads;
    for (int w = 0; w < launch.threads / WARP; ++w) block->elected.push_back(draw(*this, WARP));
    for (int i = 0; i < launch.threads; ++i) {
      auto thread = std::make_unique<Thread>();
      thread->block = block.get();
      thread->index = i;
      Thread* t = thread.get();
      auto body = [this, t] {
        try {
          kernel();
          for (const auto& [registers, state] : t->accumulators) {
            (void)registers, (void)state;
            fail("ends with a WGMMA whose result it has not waited for");
          }
          if (--t->block->running == 0 && t->block->stores_reading) {
            fail("the block ends while a TMA store still reads its shared memory");
          }
        } catch (const std::exception& error) {
          if (failure.empty()) failure = error.what();
        }
      };
      thread->fiber = std::make_unique<Fiber>(body, STACK);
      runnable.push_back(t);
      block->threads.push_back(std::move(thread));
    }
    cluster.push_back(std::move(block));
  }
  int left = launch.threads * launch.cluster;
  while (left && failure.empty()) {
    run_pending(false);
    if (!failure.empty()) break;
    if (runnable.empty()) {
      if (pending.empty()) deadlock();
      run_pending(true);
      continue;
    }
    const int i = draw(*this, static_cast<int>(runnable.size()));
    Thread* t = runnable[i];
    runnable[i] = runnable.back();
    runnable.pop_back();
    enter(*t);
    if (t->fiber->finished()) {
      --left;
    } else if (t->waits_for.empty()) {
      runnable.push_back(t);
    }
  }
  while (failure.empty() && !pending.empty()) run_pending(true);
  for (const auto& block : cluster) {
    const char* end = block->shared + launch.shared_bytes;
    if (failure.empty() && !std::all_of(end, end + 1024, [](char c) { return c == POISON; })) {
      failure = "block " + std::to_string(block->index) + ": wrote behind its shared memory";
    }
  }
  if (!failure.empty()) throw Failure(failure);
}

// Does some of the pending work: what may be done now or, if nothing else can go on, any of it,
// that which is to be late last.
void Machine::run_pending(bool all) {
  const bool late_only = std::all_of(pending.begin(), pending.end(),
                                     [](const Pending& p) { return p.mood == Pending::late; });
  for (int tries = all ? 1 : 2; tries && !pending.empty(); --tries) {
    if (!all && launch.order == Order::random && draw(*this, 4) != 0) return;
    int i = draw(*this, static_cast<int>(pending.size()));
    while (all && !late_only && pending[i].mood == Pending::late) {
      i = draw(*this, static_cast<int>(pending.size()));
    }
    int chosen = i;
    for (int j = 0; j < i; ++j) {  // the first of its queue
      if (pending[i].queue >= 0 && pending[j].queue == pending[i].queue) {
        chosen = j;
        break;
      }
    }
    if (!all && pending[chosen].mood == Pending::late) continue;
    const auto work = std::move(pending[chosen].run);
    pending.erase(pending.begin() + chosen);
    try {
      work();
    } catch (const std::exception& error) {
      if (failure.empty()) failure = error.what();
    }
  }
}

void Machine::add(std::function<void()> work, int queue) {
  const bool in_queue = std::any_of(pending.begin(), pending.end(), [&](const Pending& p) {
    return queue >= 0 && p.queue == queue;
  });
  const int mood = launch.order == Order::earliest ? 0
                   : launch.order == Order::latest ? 2
                                                   : draw(*this, 3);
  if (mood == 0 && !in_queue) return work();
  pending.push_back({mood == 2 ? Pending::late : Pending::any_time, std::move(work), queue});
}

void Machine::wait(Channel& channel, const std::string& what, const std::function<bool()>& ready) {
  Thread& t = current();
  while (!ready()) {
    t.waits_for = what;
    channel.waiting.push_back(&t);
    t.fiber->leave();
    running_thread = &t;
    t.waits_for.clear();
  }
}

void Machine::pause(int odds) {
  if (draw(*this, odds) == 0) current().fiber->leave();
}

void Machine::wake(Channel& channel) {
  for (Thread* t : channel.waiting) {
    t->waits_for.clear();
    runnable.push_back(t);
  }
  channel.waiting.clear();
}

void Machine::deadlock() {
  std::string all = "deadlock:";
  for (const auto& block : cluster) {
    for (int w = 0; w < launch.threads / WARP; ++w) {
      std::map<std::string, int> reasons;
      for (int lane = 0; lane < WARP; ++lane) {
        const Thread& t = *block->threads[w * WARP + lane];
        if (!t.fiber->finished()) ++reasons[t.waits_for];
      }
      for (const auto& [reason, lanes] : reasons) {
        all += "\n  block " + std::to_string(block->index) + ", warp " + std::to_string(w) + ", " +
               std::to_string(lanes) + " lanes wait for " + reason;
      }
    }
  }
  throw Failure(all);
}

}  // namespace emulator
