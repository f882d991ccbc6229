#include "primitives.h"

#include <algorithm>

using emulator::Block;
using emulator::Cluster;
using emulator::current;
using emulator::fail;
using emulator::Machine;
using emulator::Mbarrier;
using emulator::Thread;
using emulator::Touch;

namespace {

Machine& machine() { return *current().block->machine; }
Cluster& cluster() { return *current().block->cluster; }

// Block `rank` of the cluster.
Block& neighbour(int rank, const char* what) {
  if (rank < 0 || rank >= static_cast<int>(cluster().blocks.size())) {
    fail(std::string(what) + ": no block of rank " + std::to_string(rank));
  }
  const Thread& t = current();
  if (rank != t.block->rank && !t.met_cluster) {
    fail(std::string(what) + ": this thread has waited for no barrier of the cluster before");
  }
  return *cluster().blocks[rank];
}

std::string text(const Mbarrier& b, uint32_t at, uint32_t parity) {
  return "barrier at offset " + std::to_string(at) + ", parity " + std::to_string(parity) + " (" +
         std::to_string(b.pending) + " of " + std::to_string(b.expected) +
         " arrivals and " + std::to_string(b.bytes) + " bytes to come, phase " +
         std::to_string(b.phase) + ")";
}

// Completes the phase if nothing is left to come.
void settle(Machine& m, Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.expected;
    m.wake(b.channel);
  }
}

void arrive(Block& block, Mbarrier& b, int64_t bytes) {
  if (b.pending == 0) fail("a barrier gets more arrivals than it was initialised for");
  if (block.running == 0) fail("arrives at a barrier of a block that has ended");
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("a barrier waits for more than 2^20 - 1 bytes");
  --b.pending;
  settle(*block.machine, b);
}

void bytes_came(Block& block, uint32_t at, uint32_t bytes) {
  const auto found = block.mbarriers.find(at);
  if (found == block.mbarriers.end()) fail("a copy completes on a barrier not initialised");
  if (block.running == 0) fail("a copy arrives at a block that has ended");
  found->second.bytes -= bytes;
  settle(*block.machine, found->second);
}

// A 16-byte chunk's place in a tile of 128-byte rows: TMA and WGMMA spread them over the banks by
// the address itself, so tiles start at multiples of 1024.
uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// All of a warp (or the `size` threads from `who` on) hand in a value and get those of the others.
std::vector<uint64_t> meet(int kind, int who, int size, int mine, uint64_t value, const char* what) {
  Thread& t = current();
  Block& block = *t.block;
  const uint64_t call = t.collectives[kind]++;
  const auto key = std::make_pair(kind * 1024 + who, call);
  auto& r = block.rendezvous[key];
  r.values.resize(size);
  r.values[mine] = value;
  if (++r.arrived == size) {
    machine().wake(r.channel);
  } else {
    machine().wait(r.channel, [&] { return std::string(what) + " by all lanes"; },
                   [&] { return r.arrived == size; });
  }
  const std::vector<uint64_t> values = r.values;
  if (++r.left == size) block.rendezvous.erase(key);
  return values;
}

std::vector<uint64_t> warp_meet(int kind, uint64_t value, const char* what) {
  Thread& t = current();
  return meet(kind, t.warp(), emulator::WARP, t.lane(), value, what);
}

enum Kind { SYNC, SHUFFLE, ELECT, MATRIX, REGISTERS };

// Nothing but barrier operations may touch a barrier.
void check_no_barrier(const Block& block, uint32_t at, uint32_t bytes, const char* what) {
  const auto next = block.mbarriers.lower_bound(at < 7 ? 0 : at - 7);
  if (next != block.mbarriers.end() && next->first < at + bytes) {
    fail(std::string(what) + " over the barrier at offset " + std::to_string(next->first));
  }
}

void check_read(Block& block, uint32_t at, uint32_t bytes, const char* what) {
  for (uint32_t i = at; i < at + bytes; ++i) {
    if (block.dirty[i]) {
      fail(std::string(what) + " reads shared memory at offset " + std::to_string(i) +
           ", which thread " + std::to_string(block.dirty[i] - 1) +
           " wrote and no fence_async_proxy followed");
    }
  }
}

// The part of a box's row that lies inside the matrix; the rest of it is zeros.
struct Inside {
  char* memory;
  int64_t skipped, bytes;  // of the box's row: before it, and of it

  Inside(const emulator::TensorMap& map, int64_t column, int64_t row) {
    const auto columns = static_cast<int64_t>(map.columns), wide = int64_t{map.box_columns};
    const int64_t first = std::clamp<int64_t>(column, 0, columns);
    const int64_t last = std::clamp<int64_t>(column + wide, first, columns);
    const bool there = row >= 0 && row < static_cast<int64_t>(map.rows);
    memory = map.base + row * map.row_bytes + first * map.element_bytes;
    skipped = (first - column) * map.element_bytes;
    bytes = there ? (last - first) * map.element_bytes : 0;
  }
};

// What cuTensorMapEncodeTiled and the copies ask of a map, a box and its place.
void check_box(const emulator::TensorMap& map, uint32_t at, bool write, const char* what) {
  const uint32_t row = map.box_columns * map.element_bytes;
  if (map.swizzle && row != 128) fail(std::string(what) + ": swizzled rows have 128 bytes");
  if (at % (map.swizzle ? 1024 : 128)) fail(std::string(what) + ": tile is not aligned");
  if (row % 16 || map.row_bytes % 16 || reinterpret_cast<uintptr_t>(map.base) % 16) {
    fail(std::string(what) + ": rows are not multiples of 16 bytes");
  }
  if (map.box_rows > 256 || map.box_columns > 256) fail(std::string(what) + ": box is too large");
  if (map.rows == 0 || map.columns == 0 || map.rows >> 32 || map.columns >> 32 ||
      map.row_bytes >> 40 || map.row_bytes < map.columns * map.element_bytes) {
    fail(std::string(what) + ": no tensor map has such a shape");
  }
  for (const uint64_t row_inside : {uint64_t{0}, map.rows - 1}) {
    emulator::memory().check(map.base + row_inside * map.row_bytes,
                             static_cast<int64_t>(map.columns * map.element_bytes), write, what);
  }
}

void load_box(Block& block, uint32_t at, uint32_t barrier, const emulator::TensorMap& map,
              int column, int row) {
  const uint32_t width = map.box_columns * map.element_bytes;
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    std::vector<char> line(width, 0);
    const Inside part(map, column, static_cast<int64_t>(row) + r);
    if (part.bytes) {
      block.machine->touch(Touch::constant, part.memory, part.bytes, "tma_load");
      std::memcpy(&line[part.skipped], part.memory, part.bytes);
    }
    for (uint32_t c = 0; c < width; c += 16) {
      const uint32_t to = at + r * width + c;
      check_no_barrier(block, to, 16, "tma_load");
      std::memcpy(block.shared + (map.swizzle ? swizzled(to) : to), &line[c], 16);
    }
  }
  bytes_came(block, barrier, map.box_bytes());
}

}  // namespace

namespace sm90 {

bool elect_one() {
  Thread& t = current();
  warp_meet(ELECT, 0, "elect_one");
  return t.lane() == t.block->elected[t.warp()];
}

char* shared_memory() { return current().block->shared; }

uint32_t shared_address(const void* p) { return current().block->offset(p, 0, "shared_address"); }

void note_shared_store(const void* p, uint32_t bytes) {
  Thread& t = current();
  const uint32_t at = t.block->offset(p, bytes, "store_shared");
  if (at % bytes) fail("store_shared: not aligned");
  check_no_barrier(*t.block, at, bytes, "store_shared");
  std::fill_n(t.block->dirty.begin() + at, bytes, static_cast<uint16_t>(t.index + 1));
  t.dirty.emplace_back(at, bytes);
}

Floats load_shared_at(const void* p, int rank) {
  const uint32_t at = current().block->offset(p, sizeof(Floats), "load_shared_at");
  if (at % sizeof(Floats)) fail("load_shared_at: not aligned");
  const Block& block = neighbour(rank, "load_shared_at");
  machine().pause(4);
  if (block.running == 0) fail("load_shared_at: reads the memory of a block that has ended");
  Floats x;
  std::memcpy(&x, block.shared + at, sizeof(Floats));
  return x;
}

void store_matrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // Lane l names the row l % 8 of matrix l / 8, and holds of each matrix two values: those at
  // row l / 4, columns 2 (l % 4) and the next.
  Thread& t = current();
  const uint32_t parts[4] = {a, b, c, d};
  t.block->offset(row, 16, "store_matrix_x4");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("store_matrix_x4: row is not aligned");
  const auto rows = warp_meet(MATRIX, reinterpret_cast<uint64_t>(row), "store_matrix_x4");
  for (int m = 0; m < 4; ++m) {
    char* to = reinterpret_cast<char*>(rows[m * 8 + t.lane() / 4]) + t.lane() % 4 * 4;
    note_shared_store(to, 4);
    std::memcpy(to, &parts[m], 4);
  }
}

void fence_async_proxy() {
  Thread& t = current();
  machine().pause(8);
  for (const auto& [at, bytes] : t.dirty) {
    for (uint32_t i = at; i < at + bytes; ++i) {
      if (t.block->dirty[i] == t.index + 1) t.block->dirty[i] = 0;
    }
  }
  t.dirty.clear();
}

void barrier_init(Barrier* barrier, int count) {
  Thread& t = current();
  const uint32_t at = t.block->offset(barrier, 8, "barrier_init");
  if (at % 8) fail("barrier_init: not aligned");
  if (count < 1 || count >= 1 << 20) fail("barrier_init: count " + std::to_string(count));
  if (t.block->mbarriers.count(at)) fail("barrier_init: initialised twice");
  Mbarrier& b = t.block->mbarriers[at];
  b.expected = b.pending = count;
  b.owner = t.index;
}

void barrier_init_fence() {
  Thread& t = current();
  for (auto& [at, b] : t.block->mbarriers) {
    (void)at;
    if (b.owner == t.index) b.fenced = true;
  }
}

void barrier_arrive(Barrier* barrier) {
  machine().pause(8);
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive"), 0);
}

void barrier_arrive_at(Barrier* barrier, int rank) {
  Block& mine = *current().block;
  const uint32_t at = mine.offset(barrier, 8, "barrier_arrive_at");
  Block& block = neighbour(rank, "barrier_arrive_at");
  Mbarrier& b = block.mbarrier(block.shared + at, "barrier_arrive_at");
  if (!b.fenced) fail("barrier_arrive_at: no barrier_init_fence after barrier_init");
  arrive(block, b, 0);
}

void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive_expect"), bytes);
}

void barrier_wait(Barrier* barrier, uint32_t parity) {
  Block& block = *current().block;
  Mbarrier& b = block.mbarrier(barrier, "barrier_wait");
  if (parity > 1) fail("barrier_wait: parity " + std::to_string(parity));
  machine().pause(8);
  if ((b.phase & 1) != parity) return;
  const uint32_t at = block.offset(barrier, 8, "barrier_wait");
  machine().wait(b.channel, [&] { return text(b, at, parity); },
                 [&] { return (b.phase & 1) != parity; });
}

namespace {

emulator::NamedBarrier& named_arrival(int id, int threads) {
  Block& block = *current().block;
  if (id < 0 || id > 15) fail("named barrier " + std::to_string(id) + ": there are 1 to 15");
  if (threads % emulator::WARP || threads < emulator::WARP || threads > 1024) {
    fail("named barrier: " + std::to_string(threads) + " threads");
  }
  auto& b = block.named[id];
  if (b.arrived && b.threads != threads) {
    fail("named barrier " + std::to_string(id) + ": " + std::to_string(threads) +
         " threads here, " + std::to_string(b.threads) + " elsewhere");
  }
  b.threads = threads;
  if (!b.who.insert(current().index).second) {
    fail("named barrier " + std::to_string(id) + ": arrives again before it is complete");
  }
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.who.clear();
    ++b.generation;
    machine().wake(b.channel);
  }
  return b;
}

void sync(int id, int threads, const std::string& name) {
  const uint64_t before = current().block->named[id].generation;
  auto& b = named_arrival(id, threads);
  machine().wait(b.channel, [&] { return name; }, [&] { return b.generation != before; });
}

void check_not_of_block(int id) {
  if (id == 0) fail("named barrier 0 is that of block_sync");
}

}  // namespace

void named_barrier_sync(int id, int threads) {
  check_not_of_block(id);
  sync(id, threads, "named barrier " + std::to_string(id));
}

void named_barrier_arrive(int id, int threads) {
  check_not_of_block(id);
  named_arrival(id, threads);
}

void block_sync() { sync(0, current().block->launch().threads, "block_sync"); }

void warp_sync() { warp_meet(SYNC, 0, "warp_sync"); }

void cluster_arrive() {
  Cluster& c = cluster();
  if (current().cluster_arrivals++ != 0) fail("cluster_arrive: twice without cluster_wait");
  if (++c.arrived == c.grid->launch.threads * c.grid->launch.cluster) {
    c.arrived = 0;
    ++c.generation;
    for (auto& block : c.blocks) {
      for (auto& t : block->threads) t->cluster_arrivals = -t->cluster_arrivals;
    }
    machine().wake(c.channel);
  }
}

void cluster_wait() {
  Thread& t = current();
  if (t.cluster_arrivals == 0) fail("cluster_wait: no cluster_arrive before");
  machine().wait(cluster().channel, [] { return "the cluster's other threads"; },
                 [&] { return t.cluster_arrivals < 0; });
  t.cluster_arrivals = 0;
  t.met_cluster = true;
}

void tma_load(void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  tma_load_multicast(to, map, barrier, column, row,
                     static_cast<uint16_t>(1 << current().block->rank));
}

void tma_load_multicast(void* to, const TensorMap* map, Barrier* barrier, int column, int row,
                        uint16_t ranks) {
  Block& mine = *current().block;
  const uint32_t at = mine.offset(to, map->box_bytes(), "tma_load");
  check_box(*map, at, false, "tma_load");
  const Mbarrier& own = mine.mbarrier(barrier, "tma_load");
  if (!own.fenced) fail("tma_load: no barrier_init_fence after barrier_init");
  const uint32_t barrier_at = mine.offset(barrier, 8, "tma_load");
  for (int rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block* block = &neighbour(rank, "tma_load_multicast");
    cluster().add([=, map = *map] { load_box(*block, at, barrier_at, map, column, row); });
  }
}

void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  Block* block = current().block;
  const uint32_t at = block->offset(to, bytes, "bulk_load");
  if (at % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("bulk_load: addresses and size are multiples of 16 bytes");
  }
  if (!block->mbarrier(barrier, "bulk_load").fenced) {
    fail("bulk_load: no barrier_init_fence after barrier_init");
  }
  const uint32_t barrier_at = block->offset(barrier, 8, "bulk_load");
  emulator::memory().check(from, bytes, false, "bulk_load");
  cluster().add([=] {
    check_no_barrier(*block, at, bytes, "bulk_load");
    block->machine->touch(Touch::constant, from, bytes, "bulk_load");
    std::memcpy(block->shared + at, from, bytes);
    bytes_came(*block, barrier_at, bytes);
  });
}

void tma_store(const TensorMap* map, const void* from, int column, int row) {
  Thread* t = &current();
  Block* block = t->block;
  const uint32_t at = block->offset(from, map->box_bytes(), "tma_store");
  check_box(*map, at, true, "tma_store");
  check_read(*block, at, map->box_bytes(), "tma_store");
  auto group = t->open_stores;
  ++group->reads, ++group->writes;
  ++block->stores_reading;
  Machine* m = &machine();
  Cluster* c = &cluster();
  c->add([=, map = *map] {
    std::vector<char> box(map.box_bytes());
    check_read(*block, at, map.box_bytes(), "tma_store");
    for (uint32_t i = 0; i < box.size(); i += 16) {
      const uint32_t here = map.swizzle ? swizzled(at + i) : at + i;
      std::memcpy(&box[i], block->shared + here, 16);
    }
    --group->reads;
    --block->stores_reading;
    m->wake(t->stores_done);
    c->add([=, box = std::move(box)] {
      const uint32_t width = map.box_columns * map.element_bytes;
      for (uint32_t r = 0; r < map.box_rows; ++r) {
        const Inside part(map, column, static_cast<int64_t>(row) + r);
        if (!part.bytes) continue;
        const char* values = &box[r * width + part.skipped];
        m->touch(Touch::write, part.memory, part.bytes, "tma_store", values);
        std::memcpy(part.memory, values, part.bytes);
      }
      --group->writes;
      m->wake(t->stores_done);
    });
  });
}

void tma_store_commit() {
  Thread& t = current();
  t.stores.push_back(t.open_stores);
  t.open_stores = std::make_shared<emulator::StoreGroup>();
}

void tma_store_wait_groups(int left, bool reads_only) {
  Thread& t = current();
  const int count = static_cast<int>(t.stores.size()) - left;
  const auto done = [&] {
    for (int i = 0; i < count; ++i) {
      if (t.stores[i]->reads || (!reads_only && t.stores[i]->writes)) return false;
    }
    return true;
  };
  machine().wait(t.stores_done, [] { return "its TMA stores"; }, done);
  if (!reads_only && count > 0) t.stores.erase(t.stores.begin(), t.stores.begin() + count);
}

void set_registers(int count, bool increase) {
  Thread& t = current();
  Block& block = *t.block;
  auto& group = block.groups[t.group()];
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: " + std::to_string(count));
  if (increase ? count < group.registers : count > group.registers) {
    fail("setmaxnreg: from " + std::to_string(group.registers) + " to " + std::to_string(count));
  }
  const auto enough = [&] {
    int all = 0;
    for (const auto& other : block.groups) {
      all += emulator::WARPGROUP * (&other == &group ? count : other.registers);
    }
    return all <= block.registers;
  };
  meet(REGISTERS, t.group(), emulator::WARPGROUP, t.index % emulator::WARPGROUP, 0, "setmaxnreg");
  machine().wait(block.registers_freed,
                 [&] { return "registers, to have " + std::to_string(count); }, enough);
  group.registers = count;
  machine().wake(block.registers_freed);
}

float shuffle_xor(float x, int lanes) {
  if (lanes < 0 || lanes >= emulator::WARP) fail("shuffle_xor: a warp has 32 lanes");
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = static_cast<uint32_t>(warp_meet(SHUFFLE, bits, "shuffle_xor")[current().lane() ^ lanes]);
  std::memcpy(&x, &bits, 4);
  return x;
}

int shuffle_from(int x, int lane) {
  if (lane < 0 || lane >= emulator::WARP) fail("shuffle_from: a warp has 32 lanes");
  return static_cast<int>(warp_meet(SHUFFLE, static_cast<uint32_t>(x), "shuffle_from")[lane]);
}

// What the grid before does until it ends is seen after this, and by nobody sooner.
void grid_dependency_wait() {
  Thread& t = current();
  const int number = t.block->cluster->grid->number;
  if (number > 0) {
    auto& before = *machine().grids[number - 1];
    machine().wait(before.finished, [] { return "the end of the grid before"; },
                   [&] { return before.unfinished == 0; });
  }
  t.waited = true;
}

void grid_dependency_launch() { machine().release(*current().block); }

}  // namespace sm90
