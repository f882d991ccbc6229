// The shadow of shared memory, which finds races and uninitialized reads.
//
// It has one cell for each 4 bytes: the last plain write, and the reads and atomics since.
// A cell that was accessed in part is split into four cells of one byte, until a write covers it.
// Source: PTX ISA 9.0, memory consistency model; FastTrack (Flanagan and Freund, PLDI 2009).
#include "happens_before.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "bits.h"

namespace deepkern::ptx {
namespace {

constexpr uint8_t NO_LANE = 255;
constexpr uint16_t NO_AGENT = 0xFFFF;  // no access
constexpr uint16_t SEVERAL = 0xFFFE;   // in Cell::since: `clock` is the index of a Node
constexpr uint16_t SPLIT = 0xFFFD;     // in Cell::write: `clock` is the index of four cells

enum class Kind { READ, WRITE, ATOMIC };

struct Epoch {
  Clock clock;
  Clock warp_epoch;
  int32_t instruction : 29;
  uint32_t is_async : 1;
  uint32_t is_atomic : 1;
  // In a write: before this instruction, `lane` accessed the bytes by another one in warp_epoch.
  uint32_t follows_own : 1;
  uint16_t agent;
  uint8_t lane;
  uint8_t other_lane;  // a second lane of the same warp_epoch; NO_LANE: only `lane`
};
static_assert(sizeof(Epoch) == 16, "two epochs fit half a cache line");

// An epoch in a vector register: a copy of fields that were just stored one by one would stall.
typedef uint64_t Words __attribute__((vector_size(16)));

Words pack(const Access& access, Clock warp_epoch, bool is_atomic) {
  uint64_t low = access.clock | uint64_t(warp_epoch) << 32;
  uint64_t flags = uint64_t(access.proxy == Proxy::ASYNC) << 29 | uint64_t(is_atomic) << 30;
  uint64_t high = (uint32_t(access.instruction) & ((1u << 29) - 1)) | flags |
                  uint64_t(access.agent) << 32 | uint64_t(access.lane) << 48 |
                  uint64_t(NO_LANE) << 56;
  return Words{low, high};
}

struct Cell {
  Epoch write;
  Epoch since;  // a read or an atomic, or SEVERAL
};

// The bits of a cell, to compare and copy it as a whole.
struct State {
  Words write, since;
};

State load(const Cell& cell) {
  State state;
  memcpy(&state, &cell, sizeof(state));
  return state;
}

bool is_same(const State& a, const State& b) {
  Words different = (a.write ^ b.write) | (a.since ^ b.since);
  return (different[0] | different[1]) == 0;
}

// An access in a list. Lists do not change: cells in the same state have the same list.
struct Node {
  Epoch epoch;
  uint32_t next;  // index of a node; NO_NODE: the last one
};

constexpr uint32_t NO_NODE = ~0u;
constexpr size_t MIN_NODES = 1 << 19;  // before unused ones are collected
constexpr Epoch EMPTY = {0, 0, 0, 0, 0, 0, NO_AGENT, NO_LANE, NO_LANE};
constexpr Cell EMPTY_CELL = {EMPTY, EMPTY};

// A vector clock without the indirection of std::vector.
struct Covered {
  const Clock* clocks;
  size_t count;

  explicit Covered(const std::vector<Clock>& v) : clocks(v.data()), count(v.size()) {}
  bool covers(const Epoch& e) const { return e.agent < count && clocks[e.agent] >= e.clock; }
};

// The access that is checked.
struct Now {
  Epoch epoch;
  Covered generic, async;

  // A generic write that the async proxy does not see yet.
  bool needs_fence(const Epoch& previous, bool is_write) const {
    return epoch.is_async && is_write && !previous.is_async && !async.covers(previous);
  }
  // True only for an access of another agent, or of another epoch of the same warp. SEVERAL and
  // SPLIT are larger than any agent.
  bool is_plainly_after(const Epoch& previous, bool is_write) const {
    if (previous.agent == NO_AGENT) return true;
    if (previous.agent == epoch.agent)
      return epoch.lane == NO_LANE || previous.warp_epoch != epoch.warp_epoch;
    return generic.covers(previous) && !needs_fence(previous, is_write);
  }
};

// Objects that are named by an index, and reused.
template <class T>
class Pool {
 public:
  T& operator[](uint32_t index) { return items_[index]; }
  uint32_t take() {
    if (free_.empty()) {
      items_.emplace_back();
      return uint32_t(items_.size() - 1);
    }
    uint32_t index = free_.back();
    free_.pop_back();
    return index;
  }
  void give_back(uint32_t index) { free_.push_back(index); }

 private:
  std::vector<T> items_;
  std::vector<uint32_t> free_;
};

bool is_same_warp_epoch(const Epoch& previous, const Epoch& now) {
  return previous.agent == now.agent && previous.warp_epoch == now.warp_epoch &&
         previous.lane != NO_LANE && now.lane != NO_LANE;
}

// Lanes that store by one instruction may write the same bytes: CUDA defines that one of them wins.
bool lanes_race(const Epoch& previous, const Epoch& now, bool both_write) {
  if (!is_same_warp_epoch(previous, now)) return false;
  if (previous.lane == now.lane && previous.other_lane == NO_LANE) return false;
  return !both_write || previous.instruction != now.instruction || previous.follows_own;
}

// Adds the lanes of an earlier access of the same agent and kind to `now`, which replaces it.
Epoch with_lanes_of(const Epoch& previous, Epoch now) {
  if (previous.agent != now.agent || previous.warp_epoch != now.warp_epoch) return now;
  if (previous.lane == NO_LANE) return now;
  now.other_lane = previous.other_lane;
  if (now.lane != NO_LANE && now.lane != previous.lane) now.other_lane = now.lane;
  now.lane = previous.lane;
  return now;
}

}  // namespace

struct Shadow::Cells {
  Cells(uint32_t bytes, bool races, bool initialized)
      : check_races(races),
        check_initialized(initialized),
        written(initialized ? bytes : 0),
        cells(races ? (size_t(bytes) + 3) / 4 : 0, EMPTY_CELL) {}

  template <Kind KIND>
  Conflict access(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                  Clock warp_epoch);
  template <Kind KIND>
  bool visit_plain(Cell& cell, const Now& now, Words epoch);
  template <Kind KIND>
  void visit(Cell& cell, uint32_t address, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void visit_cells(uint32_t begin, uint32_t end, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void visit_range(uint32_t begin, uint32_t end, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void visit_bytes(uint32_t begin, uint32_t end, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void check(const Epoch& previous, bool is_write, uint32_t address, const Now& now,
             Conflict& conflict) const;
  template <Kind KIND>
  void check_since(Cell& cell, uint32_t address, const Now& now, Conflict& conflict);
  void record_write(Cell& cell, const Now& now);
  void record_since(Cell& cell, const Now& now);
  void collect_nodes();
  template <class F>
  void for_each_since(const Cell& cell, F f) const;
  void split(Cell& cell);

  bool check_races, check_initialized;
  Bits written;
  std::vector<Cell> cells;
  std::vector<Node> nodes;
  size_t max_nodes = MIN_NODES;
  Pool<std::array<Cell, 4>> splits;
};

template <class F>
inline void Shadow::Cells::for_each_since(const Cell& cell, F f) const {
  if (cell.since.agent == NO_AGENT) return;
  if (cell.since.agent != SEVERAL) return f(cell.since);
  for (uint32_t i = cell.since.clock; i != NO_NODE; i = nodes[i].next) f(nodes[i].epoch);
}

// Reports `previous` if it conflicts with the access and is not ordered before it.
template <Kind KIND>
inline void Shadow::Cells::check(const Epoch& previous, bool is_write, uint32_t address,
                                 const Now& now, Conflict& conflict) const {
  bool needs_fence = false;
  if (previous.agent == now.epoch.agent) {
    bool both_write = KIND == Kind::WRITE && is_write && !previous.is_atomic;
    if (!lanes_race(previous, now.epoch, both_write)) return;
  } else if (now.generic.covers(previous)) {
    needs_fence = now.needs_fence(previous, is_write);
    if (!needs_fence) return;
  }
  if (conflict.found) return;
  bool names_other = previous.agent == now.epoch.agent && previous.lane == now.epoch.lane &&
                     previous.other_lane != NO_LANE;
  conflict.found = true;
  conflict.previous_is_write = is_write;
  conflict.proxy_fence_is_missing = needs_fence;
  conflict.address = address;
  conflict.previous = {previous.agent, previous.is_async ? Proxy::ASYNC : Proxy::GENERIC,
                       names_other ? previous.other_lane : previous.lane, previous.clock,
                       previous.instruction};
}

// A plain write conflicts with all, a read with atomics, an atomic with reads.
template <Kind KIND>
inline void Shadow::Cells::check_since(Cell& cell, uint32_t address, const Now& now,
                                       Conflict& conflict) {
  auto check_one = [&](const Epoch& e) {
    if (KIND == Kind::WRITE || e.is_atomic != (KIND == Kind::ATOMIC))
      check<KIND>(e, e.is_atomic, address, now, conflict);
  };
  for_each_since(cell, check_one);
}

// The write replaces all that was recorded: whoever is ordered after it is ordered after them.
inline void Shadow::Cells::record_write(Cell& cell, const Now& now) {
  Epoch epoch = now.epoch;
  if (epoch.lane != NO_LANE) {
    bool follows = false;
    if (is_same_warp_epoch(cell.write, epoch)) {
      follows = cell.write.follows_own || cell.write.instruction != epoch.instruction;
      epoch = with_lanes_of(cell.write, epoch);
    }
    for_each_since(cell, [&](const Epoch& e) { follows |= is_same_warp_epoch(e, epoch); });
    epoch.follows_own = follows;
  }
  cell = {epoch, EMPTY};
}

// An access replaces an earlier one of its kind that it is ordered after, the proxy included.
inline void Shadow::Cells::record_since(Cell& cell, const Now& now) {
  auto is_replaced = [&](const Epoch& e) {
    if (e.is_atomic != now.epoch.is_atomic) return false;
    if (e.agent == now.epoch.agent) return true;
    return now.generic.covers(e) && !now.needs_fence(e, e.is_atomic);
  };
  Epoch epoch = now.epoch;
  uint32_t list = NO_NODE;
  auto add = [&](const Epoch& e) {
    nodes.push_back({e, list});
    list = uint32_t(nodes.size() - 1);
  };
  auto keep = [&](const Epoch& e) {
    if (is_replaced(e))
      epoch = with_lanes_of(e, epoch);
    else
      add(Epoch(e));
  };
  if (cell.since.agent == SEVERAL) {
    // A node is copied before the vector grows.
    for (uint32_t i = cell.since.clock; i != NO_NODE; i = nodes[i].next) keep(nodes[i].epoch);
  } else if (cell.since.agent != NO_AGENT) {
    keep(cell.since);
  }
  cell.since = epoch;
  if (list == NO_NODE) return;
  add(epoch);
  cell.since.agent = SEVERAL;
  cell.since.clock = list;
}

// Keeps the nodes that cells use.
void Shadow::Cells::collect_nodes() {
  std::vector<Node> used;
  std::vector<uint32_t> moved(nodes.size(), NO_NODE);
  auto move = [&](Cell& cell) {
    if (cell.since.agent != SEVERAL) return;
    uint32_t first = NO_NODE, last = NO_NODE;
    for (uint32_t i = cell.since.clock; i != NO_NODE; i = nodes[i].next) {
      bool is_new = moved[i] == NO_NODE;
      if (is_new) {
        moved[i] = uint32_t(used.size());
        used.push_back({nodes[i].epoch, NO_NODE});
      }
      if (last != NO_NODE) used[last].next = moved[i];
      if (first == NO_NODE) first = moved[i];
      if (!is_new) break;
      last = moved[i];
    }
    cell.since.clock = first;
  };
  for (Cell& cell : cells) {
    if (cell.write.agent != SPLIT) {
      move(cell);
      continue;
    }
    for (Cell& byte : splits[cell.write.clock]) move(byte);
  }
  nodes = std::move(used);
  max_nodes = std::max(MIN_NODES, 2 * nodes.size());
}

// The usual case of visit(): no conflict, and what is recorded is the access alone.
template <Kind KIND>
inline bool Shadow::Cells::visit_plain(Cell& cell, const Now& now, Words epoch) {
  if (!now.is_plainly_after(cell.write, true)) return false;
  if (!now.is_plainly_after(cell.since, cell.since.is_atomic)) return false;
  if constexpr (KIND == Kind::WRITE) {
    memcpy(&cell.write, &epoch, sizeof(epoch));
    cell.since = EMPTY;
    return true;
  }
  if (cell.since.agent != NO_AGENT && cell.since.is_atomic != now.epoch.is_atomic) return false;
  if (cell.since.agent == now.epoch.agent && cell.since.warp_epoch == now.epoch.warp_epoch)
    return false;
  memcpy(&cell.since, &epoch, sizeof(epoch));
  return true;
}

template <Kind KIND>
void Shadow::Cells::visit(Cell& cell, uint32_t address, const Now& now, Conflict& conflict) {
  if (cell.write.agent != NO_AGENT) check<KIND>(cell.write, true, address, now, conflict);
  check_since<KIND>(cell, address, now, conflict);
  if (KIND == Kind::WRITE)
    record_write(cell, now);
  else
    record_since(cell, now);
}

void Shadow::Cells::split(Cell& cell) {
  if (cell.write.agent == SPLIT) return;
  uint32_t index = splits.take();
  std::array<Cell, 4>& four = splits[index];
  four.fill(cell);
  cell = EMPTY_CELL;
  cell.write.agent = SPLIT;
  cell.write.clock = index;
}

// Bytes of one cell that is split, or that the access does not cover.
template <Kind KIND>
void Shadow::Cells::visit_bytes(uint32_t begin, uint32_t end, const Now& now, Conflict& conflict) {
  Cell& cell = cells[begin / 4];
  split(cell);
  uint32_t index = cell.write.clock;
  Words epoch;
  memcpy(&epoch, &now.epoch, sizeof(epoch));
  for (uint32_t i = begin; i < end; i++) {
    Cell& byte = splits[index][i & 3];
    if (!visit_plain<KIND>(byte, now, epoch)) visit<KIND>(byte, i, now, conflict);
  }
  if (KIND != Kind::WRITE || end - begin < 4) return;
  // All four bytes have the same state only if the same lanes wrote them before.
  std::array<Cell, 4>& four = splits[index];
  for (int i = 1; i < 4; i++) {
    const Epoch &a = four[0].write, &b = four[i].write;
    if (a.lane != b.lane || a.other_lane != b.other_lane || a.follows_own != b.follows_own) return;
  }
  cell = four[0];
  splits.give_back(index);
}

template <Kind KIND>
__attribute__((noinline)) void Shadow::Cells::visit_range(uint32_t begin, uint32_t end,
                                                          const Now& now, Conflict& conflict) {
  while (begin < end) {
    uint32_t stop = std::min(end, (begin & ~3u) + 4);
    Cell& cell = cells[begin / 4];
    if (stop - begin == 4 && cell.write.agent != SPLIT)
      visit<KIND>(cell, begin, now, conflict);
    else
      visit_bytes<KIND>(begin, stop, now, conflict);
    begin = stop;
  }
}

// Whole cells. Cells in the same state get the same new state.
template <Kind KIND>
__attribute__((noinline)) void Shadow::Cells::visit_cells(uint32_t begin, uint32_t end,
                                                          const Now& now, Conflict& conflict) {
  State before = {}, after = {};
  bool repeats = false;
  for (uint32_t i = begin; i < end; i++) {
    State state = load(cells[i]);
    if (repeats && is_same(state, before)) {
      memcpy(&cells[i], &after, sizeof(after));
      continue;
    }
    before = state;
    repeats = !conflict.found && cells[i].write.agent != SPLIT;
    visit_range<KIND>(4 * i, 4 * i + 4, now, conflict);
    after = load(cells[i]);
    repeats &= !conflict.found;
  }
}

template <Kind KIND>
inline Conflict Shadow::Cells::access(uint32_t begin, uint32_t bytes, const Access& access,
                                      const View& view, Clock warp_epoch) {
  Conflict conflict;
  if (check_initialized) {
    if (KIND == Kind::READ) {
      uint32_t first = written.first_clear(begin, bytes);
      if (first != begin + bytes) {
        conflict.found = conflict.uninitialized = true;
        conflict.address = first;
      }
    } else {
      written.set(begin, bytes, true);
    }
  }
  if (!check_races) return conflict;
  const Words epoch = pack(access, warp_epoch, KIND == Kind::ATOMIC);
  Now now = {{}, Covered(view.generic), Covered(view.async)};
  memcpy(&now.epoch, &epoch, sizeof(epoch));
  if (nodes.size() > max_nodes) collect_nodes();
  if (((begin | bytes) & 3) != 0) {
    visit_range<KIND>(begin, begin + bytes, now, conflict);
    return conflict;
  }
  uint32_t i = begin / 4, end = (begin + bytes) / 4;
  while (i < end && visit_plain<KIND>(cells[i], now, epoch)) i++;
  if (i < end) visit_cells<KIND>(i, end, now, conflict);
  return conflict;
}

Shadow::Shadow(uint32_t bytes, bool check_races, bool check_initialized)
    : cells_(std::make_unique<Cells>(bytes, check_races, check_initialized)) {}

Shadow::~Shadow() = default;

Conflict Shadow::read(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                      Clock warp_epoch) {
  return cells_->access<Kind::READ>(begin, bytes, access, view, warp_epoch);
}

Conflict Shadow::write(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                       Clock warp_epoch) {
  return cells_->access<Kind::WRITE>(begin, bytes, access, view, warp_epoch);
}

Conflict Shadow::atomic(uint32_t begin, uint32_t bytes, const Access& access, const View& view,
                        Clock warp_epoch) {
  return cells_->access<Kind::ATOMIC>(begin, bytes, access, view, warp_epoch);
}

void Shadow::forget(uint32_t begin, uint32_t bytes) {
  Cells& c = *cells_;
  if (c.check_initialized) c.written.set(begin, bytes, false);
  if (!c.check_races) return;
  for (uint32_t i = begin; i < begin + bytes; i++) {
    Cell& cell = c.cells[i / 4];
    if (i % 4 == 0 && begin + bytes - i >= 4 && cell.write.agent != SPLIT) {
      cell = EMPTY_CELL;
      i += 3;
      continue;
    }
    c.split(cell);
    c.splits[cell.write.clock][i & 3] = EMPTY_CELL;
  }
}

}  // namespace deepkern::ptx
