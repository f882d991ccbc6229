// An emulated Hopper SM that runs the kernels of csrc/sm90 and checks how they synchronize.
//
// How: the threads of a few clusters run as fibers, in an order drawn from a seed. TMA copies and
// WGMMAs, which are asynchronous, go into a list, and the machine does each of them early, late or
// at any time between, within the rules of the hardware. Shared memory and accumulators hold NaN
// until the work is done, and a buffer that is released too early is overwritten while it is still
// read, so a missing wait gives a wrong result. A second grid can depend on the first one, as in a
// programmatic dependent launch; its clusters start as early as the first grid allows.
//
// Limit: switches between fibers, about 100,000 for a GEMM tile.
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
#include "shared_memory.h"
#include "tensor_map.h"

namespace emulator {

constexpr int WARP_SIZE = 32, WARPGROUP_SIZE = 128;  // threads
constexpr uint32_t MAX_SHARED_BYTES = 232448;        // per block
constexpr int SM_REGISTERS = 65536;                  // allocated in units of 8 per thread

// An error of a kernel: the hardware forbids what it did, or gives the right result by chance only.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { random, earliest, latest };  // when pending work is done

struct Launch {
  int blocks = 1, cluster = 1, threads = 128;  // blocks, blocks per cluster, threads per block
  uint32_t shared_bytes = 0;                   // per block
  int registers = 0;                           // per thread at launch; 0: the maximum
  uint64_t seed = 0;
  Order order = Order::random;
};

struct Block;
struct Cluster;
struct Machine;

// The threads that wait for one condition.
struct WaitList {
  std::vector<struct Thread*> threads;
};

// The accumulator registers of pending WGMMAs. The kernel's own array holds NaN meanwhile.
struct PendingAccumulators {
  std::vector<float> values;
  uint64_t last_wgmma;  // number of the last WGMMA issued on them
};

// The TMA stores of one commit group.
struct StoreGroup {
  int pending_reads = 0, pending_writes = 0;
};

// An arrival of a thread at an mbarrier that happens when earlier copies of the thread are done.
struct CopyArrival {
  uint32_t barrier;  // offset in shared memory
  int groups = 0;    // not done yet
  std::vector<uint32_t> offsets = {};  // of the copies, 16 bytes each
};

// The 16-byte copies (cp.async) of one commit group. They are generic stores of their thread, which
// may not be relied on before the thread has waited for the group, or for an mbarrier at which it
// arrives by its copies.
struct CopyGroup {
  struct Copy {
    uint32_t offset;     // in shared memory
    const void* from;    // null: zeros
  };
  std::vector<Copy> copies;
  bool done = false;
  std::vector<std::shared_ptr<CopyArrival>> arrivals;
};

struct Thread {
  Block* block;
  int index;  // in the block
  std::unique_ptr<Fiber> fiber;
  const std::function<std::string()>* wait_reason = nullptr;  // null: the thread can run
  std::vector<char> fenced_stack;  // the thread's stack at the last wgmma_fence: its registers
  std::set<float*> written_accumulators;  // by WGMMAs, since then
  uint64_t wgmmas_issued = 0;
  std::deque<uint64_t> wgmma_commits;  // `wgmmas_issued` at each commit
  std::map<float*, PendingAccumulators> accumulators;
  Clock clock;
  std::vector<std::pair<uint32_t, uint32_t>> unfenced_stores;  // offset and bytes, shared memory
  std::vector<DelayedStore> delayed_stores;
  uint64_t aligned_calls = 0;
  std::shared_ptr<StoreGroup> open_store_group = std::make_shared<StoreGroup>();
  std::deque<std::shared_ptr<StoreGroup>> store_groups;  // committed
  WaitList store_waiters;
  std::shared_ptr<CopyGroup> open_copy_group = std::make_shared<CopyGroup>();
  std::deque<std::shared_ptr<CopyGroup>> copy_groups;  // committed and not waited for
  WaitList copy_waiters;
  int copies_in_flight = 0;  // started, not done
  int cluster_arrivals = 0;  // 1: arrived at the cluster barrier; -1: all others have, too
  bool waited_for_grid = false;  // called grid_dependency_wait
  bool passed_cluster_barrier = false;  // so all blocks of its cluster have started
  std::map<int, uint64_t> collective_calls;  // calls of each kind of warp or warpgroup operation

  int warp() const { return index / WARP_SIZE; }
  int lane() const { return index % WARP_SIZE; }
  void finish_stores();  // the delayed ones reach memory
  int group() const { return index / WARPGROUP_SIZE; }
};

struct Mbarrier {
  int number = 0;  // of the block's mbarriers
  int expected_arrivals = 0, pending_arrivals = 0;
  int64_t pending_bytes = 0;  // announced and not yet copied
  uint32_t phase = 0;
  bool init_fenced = false;  // the initialization is visible to TMA and to other blocks
  int init_thread = -1;
  // Of the arrivals in this phase and in the last one: from this block, and releases of cluster
  // scope from others.
  Clock arriving, arrived, arriving_cluster, arrived_cluster;
  WaitList waiters;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;  // expected threads, arrived threads
  std::set<int> arrived_warps;   // indices
  uint64_t generation = 0;
  Clock arriving, released;
  WaitList waiters;
};

// A warp executes an .aligned instruction when all its lanes call it, one after another here.
struct Warp {
  struct Call {
    const char* what;
    uint64_t operands;
    int lanes;
  };
  std::deque<Call> calls;  // that some lanes have not made yet
  uint64_t completed = 0;  // calls that all lanes have made
  uint64_t generation = 0;  // of the named barrier that the warp arrived at last
  int running_lanes = WARP_SIZE;
  WaitList waiters;
};

// One collective operation of a warp or a warpgroup, in which each thread contributes a value.
struct Collective {
  int arrived = 0, returned = 0;  // threads
  std::vector<uint64_t> values;
  Clock clock;
  WaitList waiters;
};

// One WGMMA of a warpgroup. It can start when all 128 threads have issued it.
struct Wgmma {
  int N = 0, K = 0;
  bool fp8 = false, fp16 = false;  // else bf16
  bool accumulate = false, a_in_registers = false;
  bool a_k_major = true, b_k_major = true;  // else M-major, N-major
  uint64_t a = 0, b = 0;                    // matrix descriptors
  int issued = 0;                           // threads
  std::vector<float*> accumulators;         // of each thread
  std::vector<uint32_t> a_registers;        // 4 per thread
  std::vector<Clock> clocks;                // of the warps that issued it
};

struct Warpgroup {
  std::map<uint64_t, Wgmma> wgmmas;  // issued and not yet executed, by number
  uint64_t executed = 0;             // WGMMAs
  int registers = 0;                 // per thread
  WaitList waiters;
};

struct Block {
  Cluster* cluster;
  Machine* machine;
  int index, rank;  // in the grid, in its cluster
  char* shared = nullptr;
  std::unique_ptr<char, void (*)(void*)> arena{nullptr, std::free};
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warpgroup> groups;
  std::vector<Warp> warps;
  SharedMemory records;
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset in shared memory
  std::map<int, NamedBarrier> named_barriers;
  std::map<std::pair<int, uint64_t>, Collective> collectives;  // by kind and warp, number of call
  std::vector<int> elected_lanes;    // per warp
  int running_threads = 0;           // not yet ended
  int stores_reading = 0;            // TMA stores that still read shared memory
  int registers = 0;                 // of all threads, in units of 8 per thread
  bool released_dependents = false;  // the dependent grid need not wait for this block
  WaitList register_waiters;

  const struct Launch& launch() const;
  // The offset of `p` in shared memory; fails unless all `bytes` at `p` are in it.
  uint32_t offset(const void* p, uint32_t bytes, const char* what) const;
  Mbarrier& mbarrier(const void* p, const char* what);
};

// Asynchronous work that is not done yet.
struct PendingWork {
  enum Policy { any_time, as_late_as_possible } policy;
  std::function<void()> run;
  int queue;       // work of one queue is done in order; -1: no queue
  Thread* thread;  // that issued it
};

// A kernel and its launch parameters.
struct Grid {
  Launch launch;
  std::function<void()> kernel;
  int index;                                 // 1: the dependent grid
  std::vector<int> unstarted_clusters = {};  // the next one last
  int unreleased_blocks = 0;                 // neither ended nor called grid_dependency_launch
  int unfinished_clusters = 0;
  WaitList finish_waiters = {};
};

// Blocks that run together, and their pending work.
struct Cluster {
  Machine* machine;
  Grid* grid;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread*> runnable;
  std::vector<PendingWork> pending;
  int running_threads = 0;  // not yet ended
  int arrived_threads = 0;  // at the cluster barrier
  std::vector<Clock> arriving, released;  // there, of each block
  WaitList waiters;

  Cluster(Machine& machine, Grid& grid, int number);
  bool step();  // does some pending work and runs a thread; false: nothing can progress
  bool ended() const { return running_threads == 0 && pending.empty(); }
  void check_guard_bytes() const;
  void schedule(std::function<void()> work, int queue = -1);

 private:
  void add_block(int rank, int index);
  void add_thread(Block& block, int index);
  void run_pending(bool blocked);
};

// Runs the clusters of a grid, a few at a time, and those of a grid that depends on it.
struct Machine {
  Machine(const Launch& launch, std::function<void()> kernel);
  // Adds a grid launched after the first one with programmatic dependent launch.
  void add_dependent_grid(const Launch& launch, std::function<void()> kernel);
  void run();

  std::vector<std::unique_ptr<Grid>> grids;
  std::vector<std::unique_ptr<Cluster>> running_clusters;
  std::mt19937_64 random;
  Order order;
  uint64_t time = 1;  // releases of cluster scope
  std::string failure;

  // Blocks the current thread until ready(). `reason` describes the condition in a deadlock.
  void wait(WaitList& waiters, const std::function<std::string()>& reason,
            const std::function<bool()>& ready);
  void wake(WaitList& waiters);
  void maybe_yield(int odds);  // runs other threads first, once in `odds` calls: lanes may diverge
  void maybe_lag();  // rarely lets other threads run for long: a lane falls behind its warp
  // Records an access of the current thread to global memory, see memory.h.
  void record_access(Access access, const void* p, int64_t bytes, const char* what,
                     const void* value = nullptr);
  void release_dependents(Block& block);

 private:
  void start_clusters(size_t max_running);
  void remove_ended_clusters();
  [[noreturn]] void deadlock();
};

int initial_registers(const Launch& launch);

Thread& current();  // the thread that runs now
void enter(Thread& thread);

// Throws a Failure with the position of the current thread: "block 0, thread 5: <message>".
[[noreturn]] void fail(const std::string& message);

}  // namespace emulator
