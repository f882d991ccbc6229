// Races in global memory, between the clusters of a grid and inside a cluster.
//
// A cell of 4 bytes names the last plain write and the reads and atomics since. Accesses are
// interned as events, because all cells that one warp instruction touches name the same event, and
// lists of events as well: a cell has 8 bytes. Cells are allocated in pages of 64 KiB of memory. A
// cell that was accessed in part is split into four cells of one byte while their state differs.
// Source: PTX ISA 9.0, memory consistency model; FastTrack (Flanagan and Freund, PLDI 2009).
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <new>
#include <unordered_map>
#include <utility>

#include "happens_before.h"

namespace deepkern::ptx {
namespace {

constexpr int PAGE_SHIFT = 16;
constexpr uint64_t PAGE_BYTES = 1ull << PAGE_SHIFT;
constexpr uint32_t FLAG = 1u << 31;        // Cell::write: split; Cell::since: a list
constexpr uint32_t HAS_ATOMIC = 1u << 30;  // Cell::since: an event or a list with an atomic
constexpr uint32_t INDEX = HAS_ATOMIC - 1;
constexpr int MAX_LIST = 16;  // a list of more accesses ignores new ones: they cost time and memory
constexpr size_t CACHE = 4096;  // entries of a direct-mapped cache

enum class Kind { READ, WRITE, ATOMIC };

struct Event {
  uint32_t cluster;
  Clock clock;
  int32_t instruction;
  uint16_t agent;
  Proxy proxy;
  Kind kind;

  bool operator==(const Event& o) const {
    return cluster == o.cluster && clock == o.clock && instruction == o.instruction &&
           agent == o.agent && proxy == o.proxy && kind == o.kind;
  }
};

// Both are 0 without an access; the bits of each word are those of FLAG, HAS_ATOMIC and INDEX.
struct Cell {
  uint32_t write;
  uint32_t since;

  bool operator==(const Cell& o) const { return write == o.write && since == o.since; }
};

struct Node {
  uint32_t event;
  uint32_t next;  // index of a node; 0: the last one

  bool operator==(const Node& o) const { return event == o.event && next == o.next; }
};

// Values named by an index from 1 on. Equal values have one index, as long as the cache keeps them.
template <class T>
class Interned {
 public:
  Interned() : values_(1), cache_(CACHE, 0) {}
  const T& operator[](uint32_t index) const { return values_[index]; }
  uint32_t intern(const T& value, size_t hash) {
    uint32_t& cached = cache_[(hash * 0x9E3779B97F4A7C15ull >> 32) % CACHE];
    if (cached != 0 && values_[cached] == value) return cached;
    if (values_.size() > INDEX) throw std::bad_alloc();
    values_.push_back(value);
    return cached = uint32_t(values_.size() - 1);
  }

 private:
  std::vector<T> values_;
  std::vector<uint32_t> cache_;
};

// Zeroed cells of one page of memory. The kernel supplies them when they are first touched.
class Page {
 public:
  static constexpr size_t BYTES = PAGE_BYTES / 4 * sizeof(Cell);
  Page() {
    constexpr int ACCESS = PROT_READ | PROT_WRITE, FLAGS = MAP_PRIVATE | MAP_ANONYMOUS;
    cells_ = mmap(nullptr, BYTES, ACCESS, FLAGS, -1, 0);
    if (cells_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Page() { munmap(cells_, BYTES); }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  Cell* cells() { return static_cast<Cell*>(cells_); }

 private:
  void* cells_;
};

bool covers(const std::vector<Clock>& clocks, const Event& e) {
  return e.agent < clocks.size() && clocks[e.agent] >= e.clock;
}

// The access that is checked.
struct Now {
  const Event& event;
  uint32_t index;
  const View* view;
};

enum class Order { ORDERED, NEEDS_FENCE, RACES };

}  // namespace

struct GlobalOrder::State {
  template <Kind KIND>
  Conflict access(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access& access,
                  const View& view);
  template <Kind KIND>
  void visit_cells(Cell* cells, uint64_t begin, uint64_t end, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void visit(Cell& cell, uint64_t address, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void visit_bytes(Cell& cell, uint64_t begin, uint64_t end, const Now& now, Conflict& conflict);
  void check(uint32_t index, uint64_t address, const Now& now, Conflict& conflict);
  template <Kind KIND>
  void check_since(const Cell& cell, uint64_t address, const Now& now, Conflict& conflict);
  Order order(const Event& previous, const Now& now) const;
  bool is_replaced(const Event& previous, const Now& now) const;
  void record_since(Cell& cell, const Now& now);
  uint32_t add_to_list(uint32_t since, const Now& now);
  uint32_t prepend(uint32_t event, uint32_t list);
  Cell* find_page(uint64_t number);
  bool is_registered(uint64_t number) const;

  bool check_races, communicates;
  uint32_t last_cluster = 0;                            // of the last conflict
  std::vector<std::pair<uint64_t, uint64_t>> memories;  // first and last page number
  std::unordered_map<uint64_t, Page> pages;
  struct Recent {
    uint64_t number = ~0ull;
    Cell* cells = nullptr;
  };
  std::array<Recent, 256> recent_pages;
  Interned<Event> events;
  Event last_event = {};
  uint32_t last_index = 0;  // of last_event; 0: none yet
  // The last cell visited without a conflict: cells in the same state get the same new state.
  struct Repeated {
    Cell before, after;
    uint32_t event = 0;
  } repeated;
  Interned<Node> nodes;
  // Results of add_to_list. The view of one event only grows: an old result stays valid.
  struct Step {
    uint32_t since, event, result;
  };
  std::vector<Step> steps = std::vector<Step>(CACHE);
  std::vector<std::array<Cell, 4>> splits;
  std::vector<uint32_t> free_splits;
  std::unordered_map<uint64_t, std::map<uint32_t, Clocks>> published;  // address -> cluster -> view
};

Order GlobalOrder::State::order(const Event& previous, const Now& now) const {
  const Clocks* clocks = now.view;
  if (previous.cluster == now.event.cluster) {
    if (previous.agent == now.event.agent) return Order::ORDERED;
  } else {
    if (!communicates) return Order::RACES;
    auto acquired = now.view->foreign.find(previous.cluster);
    if (acquired == now.view->foreign.end()) return Order::RACES;
    clocks = &acquired->second;
  }
  if (!covers(clocks->generic, previous)) return Order::RACES;
  bool needs_fence = now.event.proxy == Proxy::ASYNC && previous.proxy == Proxy::GENERIC &&
                     previous.kind != Kind::READ;
  return needs_fence && !covers(clocks->async, previous) ? Order::NEEDS_FENCE : Order::ORDERED;
}

inline void GlobalOrder::State::check(uint32_t index, uint64_t address, const Now& now,
                                      Conflict& conflict) {
  const Event& previous = events[index];
  Order result = order(previous, now);
  if (result == Order::ORDERED || conflict.found) return;
  conflict.found = true;
  conflict.previous_is_write = previous.kind != Kind::READ;
  conflict.proxy_fence_is_missing = result == Order::NEEDS_FENCE;
  conflict.address = address;
  conflict.previous = {previous.agent, previous.proxy, 255, previous.clock, previous.instruction};
  last_cluster = previous.cluster;
}

// A plain write conflicts with all, a read with atomics, an atomic with reads.
template <Kind KIND>
inline void GlobalOrder::State::check_since(const Cell& cell, uint64_t address, const Now& now,
                                            Conflict& conflict) {
  if (cell.since == 0 || (KIND == Kind::READ && !(cell.since & HAS_ATOMIC))) return;
  auto check_one = [&](uint32_t index) {
    bool is_atomic = events[index].kind == Kind::ATOMIC;
    if (KIND == Kind::WRITE || is_atomic != (KIND == Kind::ATOMIC))
      check(index, address, now, conflict);
  };
  if (!(cell.since & FLAG)) return check_one(cell.since & INDEX);
  for (uint32_t i = cell.since & INDEX; i != 0; i = nodes[i].next) check_one(nodes[i].event);
}

// An access replaces an earlier one of its kind that it is ordered after, the proxy included.
bool GlobalOrder::State::is_replaced(const Event& previous, const Now& now) const {
  return previous.kind == now.event.kind && order(previous, now) == Order::ORDERED;
}

uint32_t GlobalOrder::State::prepend(uint32_t event, uint32_t list) {
  return nodes.intern({event, list}, size_t(list) << 30 ^ event);
}

// The new Cell::since for an access that is not ordered after all of `since`.
uint32_t GlobalOrder::State::add_to_list(uint32_t since, const Now& now) {
  uint32_t old[MAX_LIST];
  int count = 0;
  if (since & FLAG) {
    for (uint32_t i = since & INDEX; i != 0; i = nodes[i].next) old[count++] = nodes[i].event;
  } else {
    old[count++] = since & INDEX;
  }
  uint32_t other_cluster = 0, kept[MAX_LIST];
  int kept_count = 0, clusters = 1;
  for (int i = 0; i < count; i++) {
    const Event& e = events[old[i]];
    bool is_own = e.cluster == now.event.cluster && e.agent == now.event.agent;
    if (is_own && e.kind == now.event.kind && e.clock == now.event.clock) return since;
    if (e.cluster != now.event.cluster) other_cluster = old[i];
    if (e.cluster != events[old[0]].cluster) clusters = 2;
    if (!is_replaced(e, now)) kept[kept_count++] = old[i];
  }
  // Without communication reads of two clusters conflict with any write: no third one is needed.
  bool only_reads = !(since & HAS_ATOMIC) && now.event.kind == Kind::READ;
  if (!communicates && only_reads && other_cluster != 0) {
    if (clusters == 2) return since;
    kept[0] = other_cluster;
    kept_count = 1;
  }
  if (kept_count == MAX_LIST) return since;
  uint32_t list = 0, flags = now.event.kind == Kind::ATOMIC ? HAS_ATOMIC : 0;
  for (int i = kept_count - 1; i >= 0; i--) {
    if (events[kept[i]].kind == Kind::ATOMIC) flags |= HAS_ATOMIC;
    list = prepend(kept[i], list);
  }
  return kept_count == 0 ? flags | now.index : FLAG | flags | prepend(now.index, list);
}

inline void GlobalOrder::State::record_since(Cell& cell, const Now& now) {
  uint32_t own = now.index | (now.event.kind == Kind::ATOMIC ? HAS_ATOMIC : 0);
  if (cell.since == 0 || cell.since == own) {
    cell.since = own;
    return;
  }
  size_t hash = (size_t(cell.since) << 30 ^ now.index) * 0x9E3779B97F4A7C15ull >> 32;
  Step& step = steps[hash % CACHE];
  if (step.since != cell.since || step.event != now.index)
    step = {cell.since, now.index, add_to_list(cell.since, now)};
  cell.since = step.result;
}

template <Kind KIND>
inline void GlobalOrder::State::visit(Cell& cell, uint64_t address, const Now& now,
                                      Conflict& conflict) {
  Cell before = cell;
  if (cell.write != 0) check(cell.write, address, now, conflict);
  check_since<KIND>(cell, address, now, conflict);
  if (KIND == Kind::WRITE)
    cell = {now.index, 0};
  else
    record_since(cell, now);
  repeated = {before, cell, conflict.found ? 0 : now.index};
}

// Bytes of one cell that is split, or that the access does not cover.
template <Kind KIND>
void GlobalOrder::State::visit_bytes(Cell& cell, uint64_t begin, uint64_t end, const Now& now,
                                     Conflict& conflict) {
  if (!(cell.write & FLAG)) {
    uint32_t index = uint32_t(splits.size());
    if (free_splits.empty()) {
      splits.emplace_back();
    } else {
      index = free_splits.back();
      free_splits.pop_back();
    }
    splits[index].fill(cell);
    cell = {FLAG | index, 0};
  }
  uint32_t index = cell.write & INDEX;
  std::array<Cell, 4>& four = splits[index];
  for (uint64_t i = begin; i < end; i++) visit<KIND>(four[i & 3], i, now, conflict);
  if (!(four[0] == four[1] && four[0] == four[2] && four[0] == four[3])) return;
  cell = four[0];
  free_splits.push_back(index);
}

template <Kind KIND>
inline void GlobalOrder::State::visit_cells(Cell* cells, uint64_t begin, uint64_t end,
                                            const Now& now, Conflict& conflict) {
  while (begin < end) {
    uint64_t stop = std::min<uint64_t>(end, (begin & ~3ull) + 4);
    Cell& cell = cells[(begin & (PAGE_BYTES - 1)) / 4];
    if (stop - begin == 4 && cell == repeated.before && now.index == repeated.event)
      cell = repeated.after;
    else if (stop - begin == 4 && !(cell.write & FLAG))
      visit<KIND>(cell, begin, now, conflict);
    else
      visit_bytes<KIND>(cell, begin, stop, now, conflict);
    begin = stop;
  }
}

bool GlobalOrder::State::is_registered(uint64_t number) const {
  for (const auto& [first, last] : memories)
    if (first <= number && number <= last) return true;
  return false;
}

// The cells of a page, or null outside registered memory.
Cell* GlobalOrder::State::find_page(uint64_t number) {
  Recent& recent = recent_pages[number % recent_pages.size()];
  if (recent.number == number) return recent.cells;
  auto found = pages.find(number);
  if (found == pages.end()) {
    if (!is_registered(number)) return nullptr;
    found = pages.try_emplace(number).first;
  }
  recent = {number, found->second.cells()};
  return recent.cells;
}

template <Kind KIND>
Conflict GlobalOrder::State::access(uint64_t begin, uint32_t bytes, uint32_t cluster,
                                    const Access& access, const View& view) {
  Conflict conflict;
  if (!check_races) return conflict;
  Event event = {cluster, access.clock, access.instruction, access.agent, access.proxy, KIND};
  if (last_index == 0 || !(event == last_event)) {
    size_t hash = (size_t(cluster) << 40) ^ (size_t(uint32_t(access.instruction)) << 18) ^
                  (size_t(access.agent) << 2) ^ size_t(KIND);
    last_index = events.intern(event, hash);
    last_event = event;
  }
  // Copies of one agent may be issued by warps with different views.
  if (access.proxy == Proxy::ASYNC) repeated.event = 0;
  Now now = {event, last_index, &view};
  uint64_t end = begin + bytes;
  while (begin < end) {
    uint64_t stop = std::min(end, (begin & ~(PAGE_BYTES - 1)) + PAGE_BYTES);
    if (Cell* cells = find_page(begin >> PAGE_SHIFT))
      visit_cells<KIND>(cells, begin, stop, now, conflict);
    begin = stop;
  }
  return conflict;
}

GlobalOrder::GlobalOrder(bool check_races, bool communicates) : state_(std::make_unique<State>()) {
  state_->check_races = check_races;
  state_->communicates = communicates;
}

GlobalOrder::~GlobalOrder() = default;

void GlobalOrder::add_memory(uint64_t address, uint64_t bytes) {
  if (bytes == 0) return;
  uint64_t first = address >> PAGE_SHIFT, last = (address + bytes - 1) >> PAGE_SHIFT;
  for (auto& memory : state_->memories) {
    if (memory.first > last || first > memory.second) continue;
    memory = {std::min(memory.first, first), std::max(memory.second, last)};
    return;
  }
  state_->memories.emplace_back(first, last);
}

Conflict GlobalOrder::read(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access& access,
                           const View& view) {
  return state_->access<Kind::READ>(begin, bytes, cluster, access, view);
}

Conflict GlobalOrder::write(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access& access,
                            const View& view) {
  return state_->access<Kind::WRITE>(begin, bytes, cluster, access, view);
}

Conflict GlobalOrder::atomic(uint64_t begin, uint32_t bytes, uint32_t cluster, const Access& access,
                             const View& view) {
  return state_->access<Kind::ATOMIC>(begin, bytes, cluster, access, view);
}

// What the view acquired of other clusters is published with it: release is transitive.
void GlobalOrder::release(uint64_t address, uint32_t cluster, const View& view) {
  if (!state_->check_races) return;
  std::map<uint32_t, Clocks>& published = state_->published[address];
  published[cluster].join(view);
  for (const auto& [other, clocks] : view.foreign) published[other].join(clocks);
}

void GlobalOrder::store_relaxed(uint64_t address) { state_->published.erase(address); }

void GlobalOrder::acquire(uint64_t address, uint32_t cluster, View& view) {
  auto found = state_->published.find(address);
  if (found == state_->published.end()) return;
  for (const auto& [other, clocks] : found->second) {
    if (other == cluster)
      view.Clocks::join(clocks);
    else
      view.foreign[other].join(clocks);
  }
}

uint32_t GlobalOrder::previous_cluster(const Conflict&) const { return state_->last_cluster; }

}  // namespace deepkern::ptx
