// Which accesses of memory are ordered, and races between those that are not.
//
// An agent is anything that touches memory on its own: a warp, the copies that complete on one
// mbarrier, the cp.async groups of one warp, the wgmma groups of one warp. Each has a clock. A View
// tells, for each agent of the cluster, up to which clock its accesses happen before what the owner
// of the view does next (a vector clock). Synchronization joins views. The shadow of a memory keeps
// the last write and the reads since, each with agent and clock; an access races with an earlier
// one of another agent that its view does not cover.
//
// A view has two clocks for each agent, because generic stores become visible to the async proxy
// (bulk copies, wgmma, tcgen05) only behind a fence.proxy.async somewhere between the two.
// Source: PTX ISA, memory consistency model; FastTrack (Flanagan and Freund, 2009).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace deepkern::ptx {

using Clock = uint32_t;

enum class Proxy : uint8_t { GENERIC, ASYNC };

struct Clocks {
  std::vector<Clock> generic;  // [agents]; agents added later count as 0
  std::vector<Clock> async;    // the same, for what the async proxy may see

  void join(const Clocks& other);
  void fence_proxy();  // async = max(async, generic)
};

struct View : Clocks {
  std::map<uint32_t, Clocks> foreign;  // other cluster -> what was acquired of its releases

  void join(const View& other);
  void fence_proxy();
};

struct Access {
  uint16_t agent;
  Proxy proxy;
  uint8_t lane;  // 255: not by one lane
  Clock clock;
  int32_t instruction;  // index in Kernel::instructions, for the report
};

// Two accesses that race, or a read of bytes that were never written.
struct Conflict {
  bool found = false;
  bool uninitialized = false;
  bool previous_is_write = false;
  bool proxy_fence_is_missing = false;  // ordered, except for a fence.proxy.async
  uint64_t address = 0;                 // first byte concerned
  Access previous = {};
};

// The agents of one cluster and their clocks.
class Agents {
 public:
  int add(std::string name);
  const std::string& name(int agent) const { return names_[agent]; }
  Clock now(int agent) const { return clocks_[agent]; }
  Clock tick(int agent) { return ++clocks_[agent]; }  // starts at 1

 private:
  std::vector<std::string> names_;
  std::vector<Clock> clocks_;
};

// Shadow of one block's shared memory (or tensor memory, with 4-byte cells as "bytes").
class Shadow {
 public:
  Shadow(uint32_t bytes, bool check_races, bool check_initialized);
  ~Shadow();
  // `view` is that of the access's agent where it was issued: it must cover earlier accesses. An
  // agent's own earlier accesses are covered, except that lanes of one warp that touch the same
  // bytes from different instructions without a bar.warp.sync (or a block barrier) between them
  // race too: `warp_epoch` counts a warp's synchronizations; previous accesses of the same warp
  // with the same epoch and another lane race. Lanes 255 are exempt.
  Conflict read(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                Clock warp_epoch);
  Conflict write(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                 Clock warp_epoch);
  // Atomics order themselves: they race with plain accesses only.
  Conflict atomic(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                  Clock warp_epoch);
  void forget(uint32_t begin, uint32_t bytes);  // as if never accessed

 private:
  struct Cells;
  std::unique_ptr<Cells> cells_;
};

// Races of whole clusters in global memory, and publication through release and acquire.
class GlobalOrder {
 public:
  GlobalOrder(bool check_races, bool communicates);
  ~GlobalOrder();
  void add_memory(uint64_t address, uint64_t bytes);
  // `cluster` is the accessor's number; `view` decides, through view.foreign, whether another
  // cluster's access was published to it; accesses inside a cluster are ordered by view.generic.
  Conflict read(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access&, const View& view);
  Conflict write(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access&, const View& view);
  Conflict atomic(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access&, const View&);
  // A release at an address publishes the view; an acquire there joins all that was published.
  // Release sequences: an atomic read-modify-write keeps what earlier releases published there.
  void release(uint64_t address, uint32_t cluster, const View& view);
  void store_relaxed(uint64_t address);  // ends the release sequence of an address
  void acquire(uint64_t address, uint32_t cluster, View& view);
  uint32_t previous_cluster(const Conflict&) const;  // of the last conflict that was found

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace deepkern::ptx
