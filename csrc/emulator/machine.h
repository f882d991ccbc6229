// A Hopper multiprocessor, as far as the kernels of csrc/sm90 can tell, and an adversary in it.
//
// The threads of a few clusters run as fibers, in an order drawn from a seed. What the hardware
// does asynchronously (TMA copies, WGMMA) stands in a list of pending work, each piece of which is
// done early, late or at any time between, as far as the rules allow. So a missing wait shows:
// shared memory and accumulators hold NaN until the work is done, and a buffer that is handed on
// too soon is overwritten while it is still read. A grid may be followed by one that depends on it
// (programmatic dependent launch), whose clusters begin as soon as they may.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "tensor_map.h"

namespace emulator {

constexpr int WARP = 32, WARPGROUP = 128;
constexpr uint32_t SHARED_LIMIT = 232448;  // bytes that a block may have
constexpr int REGISTERS = 65536;           // of a multiprocessor, in groups of 8 a thread

// What a kernel did that the hardware does not forgive, or that it forgives by chance only.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { random, earliest, latest };  // when pending work is done

struct Launch {
  int blocks = 1, cluster = 1, threads = 128;
  uint32_t shared_bytes = 0;
  int registers = 0;  // of a thread at launch; 0: as many as there are for so many threads
  uint64_t seed = 0;
  Order order = Order::random;
  int accumulator_bits = 0;  // kept of an FP8 sum, 0: those of float32
};

struct Block;
struct Cluster;
struct Machine;

// Something a thread can wait for.
struct Channel {
  std::vector<struct Thread*> waiting;
};

// The accumulators of one array in registers while WGMMAs on it are under way.
struct InFlight {
  std::vector<float> values;
  uint64_t last;  // number of the last WGMMA issued on it
};

struct StoreGroup {
  int reads = 0, writes = 0;  // still to be done
};

struct Thread {
  Block* block;
  int index;
  std::unique_ptr<Fiber> fiber;
  const std::function<std::string()>* waits_for = nullptr;  // null: it can run
  bool fenced = false;              // wgmma.fence since registers were last its own
  uint64_t issued = 0;              // WGMMAs
  std::deque<uint64_t> commits;     // `issued` at each commit
  std::map<float*, InFlight> accumulators;
  std::vector<std::pair<uint32_t, uint32_t>> dirty;  // shared bytes written and not fenced
  std::shared_ptr<StoreGroup> open_stores = std::make_shared<StoreGroup>();
  std::deque<std::shared_ptr<StoreGroup>> stores;
  Channel stores_done;
  int cluster_arrivals = 0;
  bool waited = false;  // for the grid that its own depends on
  bool met_cluster = false;  // has waited for all blocks of its cluster, so that they have begun
  std::map<int, uint64_t> collectives;  // calls of each kind of warp- or group-wide operation

  int warp() const { return index / WARP; }
  int lane() const { return index % WARP; }
  int group() const { return index / WARPGROUP; }
};

struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet come
  uint32_t phase = 0;
  bool fenced = false;  // its initialisation is visible to others than its block's threads
  int owner = -1;
  Channel channel;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::set<int> who;  // has arrived
  uint64_t generation = 0;
  Channel channel;
};

// A rendezvous of the lanes of a warp, or the threads of a warpgroup, with a value of each.
struct Rendezvous {
  int arrived = 0, left = 0;
  std::vector<uint64_t> values;
  Channel channel;
};

// One WGMMA of a warpgroup: it may begin when all 128 threads have issued it.
struct Wgmma {
  int N = 0, K = 0;
  bool fp8 = false, accumulate = false, a_in_registers = false, a_by_row = true, b_by_row = true;
  uint64_t a = 0, b = 0;  // descriptors
  int arrived = 0;
  std::vector<float*> accumulators;
  std::vector<uint32_t> a_registers;  // 4 a thread
};

struct Warpgroup {
  std::map<uint64_t, Wgmma> operations;
  uint64_t executed = 0;
  int registers = 0;
  Channel done;
};

struct Block {
  Cluster* cluster;
  Machine* machine;
  int index, rank;  // in the grid, in its cluster
  char* shared = nullptr;
  std::unique_ptr<char, void (*)(void*)> arena{nullptr, std::free};
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warpgroup> groups;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::map<int, NamedBarrier> named;
  std::map<std::pair<int, uint64_t>, Rendezvous> rendezvous;  // (kind and who, which call)
  std::vector<uint16_t> dirty;  // per shared byte: thread + 1 that wrote it and did not fence
  std::vector<int> elected;     // per warp
  int running = 0;              // threads not yet finished
  int stores_reading = 0;
  int registers = 0;            // of all its threads, in groups of 8 a thread
  bool released = false;        // as far as it goes, the dependent grid may begin
  Channel registers_freed;

  const struct Launch& launch() const;
  // The offset of `bytes` at `p`, checked to lie in shared memory.
  uint32_t offset(const void* p, uint32_t bytes, const char* what) const;
  Mbarrier& mbarrier(const void* p, const char* what);
};

struct Pending {
  enum Mood { any_time, late } mood;
  std::function<void()> run;
  int queue;  // work of one queue is done in its order; -1: of none
  Thread* by;
};

// A kernel and how it is launched.
struct Grid {
  Launch launch;
  std::function<void()> kernel;
  int number;
  std::vector<int> clusters = {};  // not yet begun, the next one last
  int unreleased = 0;              // blocks that neither ended nor let the dependent grid begin
  int unfinished = 0;              // clusters
  Channel finished = {};
};

// Blocks that run together, and what they have under way.
struct Cluster {
  Machine* machine;
  Grid* grid;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread*> runnable;
  std::vector<Pending> pending;
  int running = 0;  // threads not yet finished
  int arrived = 0;  // threads at the cluster's barrier
  uint64_t generation = 0;
  Channel channel;

  Cluster(Machine& machine, Grid& grid, int number);
  bool step();  // lets something happen, if anything can
  bool ended() const { return running == 0 && pending.empty(); }
  void check_margins() const;
  void add(std::function<void()> work, int queue = -1);

 private:
  void add_block(int rank, int index);
  void add_thread(Block& block, int index);
  void run_pending(bool all);
};

// Runs the clusters of a grid, a few at a time, and those of a grid that depends on it.
struct Machine {
  Machine(const Launch& launch, std::function<void()> kernel);
  // A grid launched behind the first with programmatic dependent launch.
  void dependent(const Launch& launch, std::function<void()> kernel);
  void run();

  std::vector<std::unique_ptr<Grid>> grids;
  std::vector<std::unique_ptr<Cluster>> live;
  std::mt19937_64 random;
  Order order;
  std::string failure;

  // `what`: in words, for when it never comes.
  void wait(Channel& channel, const std::function<std::string()>& what,
            const std::function<bool()>& ready);
  void wake(Channel& channel);
  void pause(int odds);  // lets other threads run, one time in `odds`: a warp's lanes may diverge
  void touch(Touch how, const void* p, int64_t bytes, const char* what,
             const void* value = nullptr);
  void release(Block& block);

 private:
  void begin_clusters(size_t most);
  void end_clusters();
  [[noreturn]] void deadlock();
};

int initial_registers(const Launch& launch);

Thread& current();  // the thread that runs now
void enter(Thread& thread);

// What the values that `what` is about were, for messages: "block 0, thread 5: ...".
[[noreturn]] void fail(const std::string& what);

}  // namespace emulator
