// mbarrier: arrivals, transactions and waits.
// Source: PTX ISA 9.0, section 9.7.13.15 (mbarrier).
#include <algorithm>

#include "async.h"

namespace deepkern::ptx {

namespace {

constexpr int64_t MOST = (1 << 20) - 1;  // arrivals and bytes that the object can count

enum Mode : uint32_t { PARITY = 1, EXPECT = 2, TRY = 4, REMOTE = 8 };

std::string place(const Target& target) {
  return "the mbarrier at byte " + std::to_string(target.offset - SHARED_BASE) +
         " of shared memory";
}

Target barrier_address(Warp& warp, const Instruction& i, int lane, const char* what) {
  uint64_t address = (i.mode & REMOTE ? warp.u64(i.a)[lane] : warp.u32(i.a)[lane]) + i.immediate;
  return translate(warp, i, lane, address, 8, Space::SHARED, what);
}

void complete_phase(Mbarrier& barrier, Cluster& cluster) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  View& view = barrier.completed;
  view.join(barrier.arriving);
  barrier.arriving = View();
  for (std::vector<Clock>* clocks : {&view.generic, &view.async}) {
    if (clocks->size() <= size_t(barrier.agent)) clocks->resize(barrier.agent + 1);
    (*clocks)[barrier.agent] = static_cast<Clock>(barrier.phase);
  }
  cluster.wake();
  cluster.grid->progress();
}

void touch_barrier(Warp& warp, const Instruction& i, int lane, const Target& t, Touch touch) {
  Clock clock = warp.block->cluster->agents.now(warp.agent);
  touch_shared(warp, i, lane, *t.block, t.offset, 8, touch, warp.agent, clock, Proxy::GENERIC,
               warp.view());
}

Status init(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "initializes an mbarrier at");
    uint32_t count = warp.u32(i.b)[lane];
    if (count < 1 || count > MOST)
      warp.fail(i, lane, "initializes " + place(t) + " for " + std::to_string(count) + " arrivals");
    if (t.block->mbarriers.count(t.offset))
      warp.fail(i, lane, "initializes " + place(t) + " again without mbarrier.inval");
    touch_barrier(warp, i, lane, t, Touch::WRITE);
    Cluster& cluster = *warp.block->cluster;
    int agent = cluster.add_agent("a copy on " + place(t));
    Mbarrier barrier{};
    barrier.expected = count;
    barrier.pending = count;
    barrier.agent = agent;
    t.block->mbarriers.emplace(t.offset, std::move(barrier));
    t.block->mbarrier_begin = std::min(t.block->mbarrier_begin, t.offset);
    t.block->mbarrier_end = std::max(t.block->mbarrier_end, t.offset + 8);
  }
  return Status::NEXT;
}

Status invalidate(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "invalidates an mbarrier at");
    Mbarrier& barrier = find_mbarrier(warp, i, lane, t);
    if (barrier.bytes != 0)
      warp.fail(i, lane, "invalidates " + place(t) + " while copies are in flight");
    // The place may be used for anything else behind a barrier: its next writer may be a bulk copy,
    // with no fence.proxy.async, since mbarrier.inval leaves no value that could arrive late.
    touch_barrier(warp, i, lane, t, Touch::WRITE);
    touch_shared(warp, i, lane, *t.block, t.offset, 8, Touch::WRITE, warp.agent,
                 warp.block->cluster->agents.now(warp.agent), Proxy::ASYNC, warp.view());
    t.block->mbarriers.erase(t.offset);
  }
  return Status::NEXT;
}

void expect_bytes(Warp& warp, const Instruction& i, int lane, const Target& t, int64_t bytes) {
  Mbarrier& barrier = find_mbarrier(warp, i, lane, t);
  barrier.bytes += bytes;
  if (barrier.bytes > MOST)
    warp.fail(
        i, lane,
        place(t) + " expects " + std::to_string(barrier.bytes) + " bytes, more than 2^20 - 1");
}

// d: the state, or -1; b: the count or the bytes, or -1.
Status arrive_lanes(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "arrives at an mbarrier at");
    touch_barrier(warp, i, lane, t, Touch::ATOMIC);
    if (i.d >= 0) warp.u64(i.d)[lane] = find_mbarrier(warp, i, lane, t).phase;
    int64_t number = i.b >= 0 ? warp.u32(i.b)[lane] : 1;
    if (i.mode & EXPECT) expect_bytes(warp, i, lane, t, number);
    arrive(warp, i, lane, t, i.mode & EXPECT ? 1 : number, warp.publish());
  }
  return Status::NEXT;
}

Status expect_lanes(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "expects bytes at an mbarrier at");
    touch_barrier(warp, i, lane, t, Touch::ATOMIC);
    expect_bytes(warp, i, lane, t, warp.u32(i.b)[lane]);
  }
  return Status::NEXT;
}

// d: predicate; b: the parity or the state.
Status wait(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t complete = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "waits at an mbarrier at");
    touch_barrier(warp, i, lane, t, Touch::ATOMIC);
    Mbarrier& barrier = find_mbarrier(warp, i, lane, t);
    bool done = i.mode & PARITY ? (barrier.phase & 1) != (warp.u32(i.b)[lane] & 1)
                                : barrier.phase != warp.u64(i.b)[lane];
    if (!done) continue;
    complete |= 1u << lane;
    warp.view().join(barrier.completed);
  }
  // try_wait may give up after a time that the target chooses. It does not in a profile, whose
  // counts do not depend on the order.
  bool gives_up = warp.grid->options.order == Options::RANDOM && !warp.grid->profile &&
                  warp.grid->random() % 8 == 0;
  if (!complete && i.mode & TRY && !gives_up) {
    int lane = first_lane(mask);
    Target t = barrier_address(warp, i, lane, "waits at an mbarrier at");
    Mbarrier& b = find_mbarrier(warp, i, lane, t);
    return warp.wait(place(t) + ", phase " + std::to_string(b.phase) + ", which misses " +
                     std::to_string(b.pending) + " of " + std::to_string(b.expected) +
                     " arrivals and " + std::to_string(b.bytes) + " bytes");
  }
  uint32_t& predicate = warp.predicates[i.d];
  predicate = (predicate & ~mask) | complete;
  if (complete) warp.epoch++;
  return Status::NEXT;
}

}  // namespace

// The arrivals of the lanes, when all copies that the warp has started are done. They publish these
// copies and nothing else of the warp.
Status arrive_after_copies(Warp& warp, const Instruction& i, uint32_t mask) {
  Grid& grid = *warp.grid;
  const int agent = agent_of(warp, warp.copies.agent, "a cp.async");
  commit_group(warp.copies);
  std::vector<PendingPointer> copies;
  for (auto& group : warp.copies.committed) copies.insert(copies.end(), group.begin(), group.end());
  warp.copies.committed.clear();
  warp.copies_arrive = true;
  View view;
  view.generic.resize(agent + 1);
  view.generic[agent] = warp.copies.count;
  std::vector<std::pair<int, Target>> arrivals;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    Target t = barrier_address(warp, i, lane, "arrives at an mbarrier at");
    touch_barrier(warp, i, lane, t, Touch::ATOMIC);
    find_mbarrier(warp, i, lane, t);
    arrivals.push_back({lane, t});
  }
  grid.start("arrival of cp.async", [&warp, &grid, &i, copies, arrivals, view] {
    for (auto& work : copies) grid.finish(*work);
    for (auto& [lane, t] : arrivals) arrive(warp, i, lane, t, 1, view);
    warp.block->cluster->wake();  // a warp that goes on waiting reports what is missing now
  });
  return Status::NEXT;
}

Mbarrier& find_mbarrier(Warp& warp, const Instruction& i, int lane, const Target& t) {
  auto found = t.block->mbarriers.find(t.offset);
  if (found == t.block->mbarriers.end()) warp.fail(i, lane, place(t) + " was not initialized");
  return found->second;
}

void arrive(Warp& warp, const Instruction& i, int lane, const Target& t, int64_t count,
            const View& view) {
  Mbarrier& barrier = find_mbarrier(warp, i, lane, t);
  if (count > barrier.pending)
    warp.fail(i, lane,
              place(t) + " gets more than its " + std::to_string(barrier.expected) +
                  " arrivals in phase " + std::to_string(barrier.phase));
  barrier.arriving.join(view);
  barrier.pending -= count;
  complete_phase(barrier, *t.block->cluster);
}

void complete_bytes(Block& block, uint32_t offset, int64_t bytes) {
  auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) return;  // invalidated: reported there
  found->second.bytes -= bytes;
  block.cluster->wake();  // a warp that goes on waiting reports the new number of bytes
  complete_phase(found->second, *block.cluster);
}

bool bind_mbarrier(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::BARRIER;
  const std::string operation = b.statement.opcode.at(1);
  bool waits = operation == "test_wait" || operation == "try_wait";
  size_t k = operation == "arrive" || waits ? 1 : 0;  // operand number of the address
  if (b.has("parity")) i.mode |= PARITY;
  if (b.has("expect_tx")) i.mode |= EXPECT;
  if (operation == "try_wait") i.mode |= TRY;
  int width = b.width(b.statement.operands.at(k));
  if (width == 64) i.mode |= REMOTE;
  i.a = b.address(k, width == 64 ? 64 : 32, i.immediate);
  if (operation == "init") {
    i.run = init;
    i.b = b.source(1, 32);
  } else if (operation == "inval") {
    i.run = invalidate;
  } else if (operation == "arrive") {
    if (b.has("noComplete")) b.fail("unknown modifier .noComplete");
    i.run = arrive_lanes;
    i.d = b.destination(0, 64);
    if (b.count() > 2) i.b = b.source(2, 32);
  } else if (operation == "expect_tx") {
    i.run = expect_lanes;
    i.b = b.source(1, 32);
  } else if (waits) {
    i.run = wait;
    i.d = b.predicate(0);
    i.b = b.source(2, i.mode & PARITY ? 32 : 64);
  } else {
    b.fail("unknown operation");
  }
  return true;
}

}  // namespace deepkern::ptx
