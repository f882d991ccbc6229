// The state of a running grid: warps, blocks, clusters, and what handlers use of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "api.h"
#include "happens_before.h"
#include "program.h"

namespace deepkern::ptx {

struct Block;
struct Cluster;
struct Grid;

constexpr uint32_t SHARED_BASE = 1024;  // Hopper keeps the first 1 KiB of a block's shared memory
constexpr int RANK_SHIFT = 24;  // a shared address holds the block's rank in its cluster above it
constexpr uint64_t PARAMETER_BASE = 0x0000100000000000;  // addresses of kernel parameters
constexpr uint64_t LOCAL_BASE = 0x0000110000000000;  // of local variables, the same in every thread
constexpr uint64_t GENERIC_SHARED_BASE = 0x0000700000000000;  // + a 32-bit shared address
constexpr uint8_t NO_LANE = 255;

enum class Space : uint8_t { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };

// Lanes that execute one path between a branch and the place where its lanes meet again.
struct Path {
  int32_t pc;
  int32_t reconverge;  // -1: at the exit
  uint32_t mask;
};

// A copy or an MMA that was issued and has not completed.
struct Pending {
  uint64_t due;                    // turn of the scheduler; UINT64_MAX: when nothing else can run
  std::function<void()> complete;  // moves the data
  std::string what;
  bool done = false;
};
using PendingPointer = std::shared_ptr<Pending>;

// Groups of one kind of asynchronous work of one warp: cp.async, bulk stores, wgmma.
struct Groups {
  int agent = -1;
  std::vector<PendingPointer> open;  // issued since the last commit
  std::deque<std::vector<PendingPointer>> committed;
  Clock count = 0;  // of commits
  bool uncommitted() const { return !open.empty(); }
  Clock clock() const { return count + 1; }  // of work issued now
};

struct Warp {
  Grid* grid;
  Block* block;
  const Kernel* kernel;
  int index;  // in the block
  int agent;
  Clock epoch = 0;                   // counts synchronizations of the warp's lanes
  uint32_t live = 0;                 // lanes that have not exited
  std::vector<Path> paths;           // the last one is executed
  std::vector<uint32_t> registers;   // [slots][LANES]
  std::vector<uint32_t> predicates;  // a lane is a bit
  std::vector<uint8_t> local;        // [LANES][Kernel::local_bytes]
  bool blocked = false;
  std::string waits_for;  // while blocked, for the report of a deadlock
  int64_t ticket = -1;    // generation of the barrier at which the warp waits
  int64_t cluster_ticket = -1;
  View fenced;  // the view at the last fence.acq_rel: relaxed stores behind it publish this
  bool has_fenced = false;
  std::set<uint64_t> relaxed_reads;  // addresses: a fence makes the reads acquires
  Groups copies, bulk, wgmma;        // cp.async; reads of shared memory by bulk stores; wgmma
  bool copies_arrive = false;        // some of `copies` at an mbarrier, which has taken them over
  int bulk_write_agent = -1;         // writes of global memory by bulk stores
  std::vector<PendingPointer> bulk_writes;  // their bytes were read and may not be written yet
  std::vector<uint8_t>
      in_flight;  // [slots]: 1 an accumulator of a wgmma, 2 its A operand, 3 tcgen05.ld
  int in_flight_count = 0;
  std::vector<int32_t> wgmma_slots;               // registers of the open group
  std::deque<std::vector<int32_t>> wgmma_groups;  // and of those committed
  PendingPointer last_wgmma;                      // MMAs of a warp complete in order
  struct LastWrite {
    uint64_t executed = 0;
    int32_t statement = 0;
  };
  std::vector<LastWrite> written;  // [slots], in kernels with wgmma
  uint64_t fenced_at = 0;          // value of `executed` at the last wgmma.fence
  int tensor_store_agent = -1;  // tcgen05.st before tcgen05.wait::st
  Clock tensor_stores = 0;
  std::vector<int32_t> tensor_loads;  // registers of tcgen05.ld before tcgen05.wait::ld
  uint64_t executed = 0;

  uint32_t* u32(int slot) { return registers.data() + size_t(slot) * LANES; }
  int32_t* s32(int slot) { return reinterpret_cast<int32_t*>(u32(slot)); }
  float* f32(int slot) { return reinterpret_cast<float*>(u32(slot)); }
  uint64_t* u64(int slot) { return reinterpret_cast<uint64_t*>(u32(slot)); }
  int64_t* s64(int slot) { return reinterpret_cast<int64_t*>(u32(slot)); }
  double* f64(int slot) { return reinterpret_cast<double*>(u32(slot)); }

  const Instruction& current() const { return kernel->instructions[paths.back().pc]; }
  View& view();
  // Makes the warp's accesses so far part of its view, for others to join; starts a new clock.
  View& publish();
  Status wait(std::string what);  // blocks the warp
  // Throws Failure with kernel, source line, block, warp and, if it is not negative, the lane.
  [[noreturn]] void fail(const Instruction& instruction, int lane, const std::string& message);
};

struct Barrier {
  int arrived = 0;   // threads
  int expected = 0;  // threads; 0 before the first arrival
  int64_t generation = 0;
  View view;      // of those that arrived
  View released;  // of the last generation that completed
};

struct Mbarrier {
  uint32_t expected;  // arrivals in a phase
  int64_t pending;    // arrivals that are missing
  int64_t bytes = 0;  // that transactions still have to bring
  uint64_t phase = 0;
  int agent;  // of the copies that complete on it
  View arriving;
  View completed;
};

struct BlockTensorMemory;  // tcgen05.h

struct Block {
  Grid* grid;
  Cluster* cluster;
  uint32_t rank;  // in the cluster
  uint32_t id[3];
  uint32_t number;  // in the grid
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;  // starts at address 0 of the block's window
  Shadow shadow;
  Barrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;        // by offset in `shared`
  uint32_t mbarrier_begin = UINT32_MAX, mbarrier_end = 0;  // offsets that hold mbarriers
  std::shared_ptr<BlockTensorMemory> tensor_memory;
  int live_warps = 0;

  Block(uint32_t shared_bytes, const Options& options)
      : shared(shared_bytes),
        shadow(shared_bytes, options.check_races, options.check_initialized) {}
};

struct Cluster {
  Grid* grid;
  uint32_t number;
  std::vector<std::unique_ptr<Block>> blocks;
  Agents agents;
  std::vector<View> views;  // [agents]
  Barrier barrier;
  int live_warps = 0;

  int add_agent(std::string name);
  void wake();  // every blocked warp looks at its condition again
  std::string agent_name(int agent) const { return agents.name(agent); }
};

struct Grid {
  const Kernel& kernel;
  Module& module;
  const LaunchConfig& config;
  const Options& options;
  Profile* profile;
  std::vector<uint8_t> parameters;
  std::vector<Allocation> allocations;  // sorted by address
  std::vector<uint64_t> last_byte;      // greatest end of allocations [0, i]
  size_t last_found = 0;
  GlobalOrder order;
  std::mt19937_64 random;
  std::vector<PendingPointer> pending;
  uint64_t turn = 0;
  uint64_t executed = 0;
  uint64_t last_progress = 0;  // instruction count at the last event that others can see
  std::list<std::unique_ptr<Cluster>> resident;
  uint32_t next_cluster = 0;
  uint32_t clusters = 0;

  Grid(const Kernel&, Module&, const LaunchConfig&, void* const* parameters,
       const std::vector<Allocation>&, const Options&, Profile*);
  void run();

  uint32_t threads_per_block() const { return config.block[0] * config.block[1] * config.block[2]; }
  // Starts asynchronous work: it completes now, later at random, or as late as possible.
  PendingPointer start(std::string what, std::function<void()> complete);
  void finish(Pending& pending);
  void progress() { last_progress = executed; }
  // "b_scale float32 [56, 16] + 128 bytes", or the tensor next to the address.
  std::string describe(uint64_t address) const;
  bool contains(uint64_t address, uint64_t bytes);

 private:
  void admit();
  void start_warp(Warp& warp, int index);
  Warp* choose();
  void run_warp(Warp& warp, uint64_t quantum);
  void step(Warp& warp);
  void retire(Warp& warp);
  void complete_due();
  bool complete_one();
  [[noreturn]] void report_deadlock();
  std::vector<Warp*> runnable_;
  bool stale_ = true;  // runnable_ has to be made anew

  friend struct Cluster;
};

// Lowest active lane.
inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

std::string hexadecimal(uint64_t value);

// Where an address leads. `data` points to the bytes; `offset` is that in the block's shared
// window.
struct Target {
  uint8_t* data;
  Space space;
  Block* block;  // of shared memory
  uint32_t offset;
};

// Checks bounds and alignment (memory.cpp). Throws Failure.
Target translate(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes, Space space,
                 const char* what);
// The block and the offset of a 32-bit shared address; checks bounds and alignment.
Target translate_shared(Warp&, const Instruction&, int lane, uint32_t address, uint32_t bytes,
                        const char* what);

// Checks one access against the shadow; throws Failure that names both accesses.
enum class Touch { READ, WRITE, ATOMIC };
void touch_shared(Warp& warp, const Instruction& instruction, int lane, Block& block,
                  uint32_t offset, uint32_t bytes, Touch touch, int agent, Clock clock, Proxy proxy,
                  const View& view, const uint8_t* value = nullptr);
void touch_global(Warp& warp, const Instruction& instruction, int lane, uint64_t address,
                  uint32_t bytes, Touch touch, int agent, Clock clock, Proxy proxy,
                  const View& view, const uint8_t* value = nullptr);
// An access by the warp itself. Compilers let several warps store the same value at one place: a
// store of `value` does not race with a store of the same bytes.
void touch_shared(Warp& warp, const Instruction& instruction, int lane, Block& block,
                  uint32_t offset, uint32_t bytes, Touch touch, const uint8_t* value = nullptr);
void touch_global(Warp& warp, const Instruction& instruction, int lane, uint64_t address,
                  uint32_t bytes, Touch touch, const uint8_t* value = nullptr);

// mbarrier.cpp: `count` arrivals at an mbarrier, or bytes that a copy has brought.
void arrive(Warp& warp, const Instruction& instruction, int lane, const Target& target,
            int64_t count, const View& view);
void complete_bytes(Block& block, uint32_t offset, int64_t bytes);
// The mbarrier at an address; fails if there is none.
Mbarrier& find_mbarrier(Warp& warp, const Instruction& instruction, int lane, const Target& target);

// async.cpp: the agent of one kind of asynchronous work of a warp, made at its first use.
int agent_of(Warp& warp, int& agent, const char* what);
void commit_group(Groups& groups);
// Waits until at most `left` committed groups are in flight.
void wait_groups(Warp& warp, Groups& groups, size_t left);
// Makes accesses of `agent` up to `clock` part of the warp's view.
void see(Warp& warp, int agent, Clock clock);

// tcgen05.cpp: fails if the block has not freed its tensor memory.
void check_tensor_memory_is_free(Warp& warp, const Instruction& instruction);

}  // namespace deepkern::ptx
