// The primitives of csrc/sm90/primitives.cuh without WGMMA: barriers, TMA, shared memory, shuffles.
//
// Each function checks its arguments and the state of the machine, then changes the state or
// schedules asynchronous work. Calls to maybe_yield() let other threads run at those points.
#include "primitives.h"

#include <algorithm>

using emulator::Access;
using emulator::Block;
using emulator::Cluster;
using emulator::current;
using emulator::fail;
using emulator::Machine;
using emulator::Mbarrier;
using emulator::Thread;

namespace {

Machine& machine() { return *current().block->machine; }
Cluster& cluster() { return *current().block->cluster; }

// Block `rank` of the current thread's cluster.
Block& cluster_block(int rank, const char* what) {
  if (rank < 0 || rank >= static_cast<int>(cluster().blocks.size())) {
    fail(std::string(what) + ": no block of rank " + std::to_string(rank));
  }
  const Thread& t = current();
  if (rank != t.block->rank && !t.passed_cluster_barrier) {
    fail(std::string(what) + ": this thread has not passed a cluster barrier");
  }
  return *cluster().blocks[rank];
}

std::string describe(const Mbarrier& b, uint32_t offset, uint32_t parity) {
  return "barrier at offset " + std::to_string(offset) + ", parity " + std::to_string(parity) +
         " (pending: " + std::to_string(b.pending_arrivals) + " of " +
         std::to_string(b.expected_arrivals) + " arrivals and " +
         std::to_string(b.pending_bytes) + " bytes, phase " + std::to_string(b.phase) + ")";
}

// Completes the phase if no arrivals and no bytes are pending.
void maybe_complete_phase(Machine& m, Mbarrier& b) {
  if (b.pending_arrivals == 0 && b.pending_bytes == 0) {
    ++b.phase;
    b.pending_arrivals = b.expected_arrivals;
    m.wake(b.waiters);
  }
}

void arrive(Block& block, Mbarrier& b, int64_t bytes) {
  if (b.pending_arrivals == 0) fail("a barrier gets more arrivals than its initial count");
  if (block.running_threads == 0) fail("arrival at a barrier of a block that has ended");
  b.pending_bytes += bytes;
  if (b.pending_bytes >= 1 << 20) fail("a barrier expects more than 2^20 - 1 bytes");
  --b.pending_arrivals;
  maybe_complete_phase(*block.machine, b);
}

// Counts the bytes of a completed copy on the barrier at an offset of shared memory.
void complete_bytes(Block& block, uint32_t barrier, uint32_t bytes) {
  const auto found = block.mbarriers.find(barrier);
  if (found == block.mbarriers.end()) fail("a copy completes on a barrier not initialized");
  if (block.running_threads == 0) fail("a copy writes to a block that has ended");
  found->second.pending_bytes -= bytes;
  maybe_complete_phase(*block.machine, found->second);
}

// The 128-byte swizzle: the offset of a 16-byte chunk of a tile of 128-byte rows. It depends on the
// address, so tiles are aligned to 1024 bytes.
uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// A collective operation of the `size` threads of warp or warpgroup `group`: thread `rank` of them
// contributes `value`. Returns the values of all.
std::vector<uint64_t> collect(int kind, int group, int size, int rank, uint64_t value,
                              const char* what) {
  Thread& t = current();
  Block& block = *t.block;
  const uint64_t call = t.collective_calls[kind]++;
  const auto key = std::make_pair(kind * 1024 + group, call);
  auto& c = block.collectives[key];
  c.values.resize(size);
  c.values[rank] = value;
  if (++c.arrived == size) {
    machine().wake(c.waiters);
  } else {
    machine().wait(c.waiters, [&] { return std::string(what) + " by all lanes"; },
                   [&] { return c.arrived == size; });
  }
  const std::vector<uint64_t> values = c.values;
  if (++c.returned == size) block.collectives.erase(key);
  return values;
}

std::vector<uint64_t> warp_collect(int kind, uint64_t value, const char* what) {
  Thread& t = current();
  return collect(kind, t.warp(), emulator::WARP_SIZE, t.lane(), value, what);
}

enum CollectiveKind { SYNC, SHUFFLE, ELECT, MATRIX, REGISTERS };

// Only barrier operations may access a barrier.
void check_no_barrier(const Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  const auto next = block.mbarriers.lower_bound(offset < 7 ? 0 : offset - 7);
  if (next != block.mbarriers.end() && next->first < offset + bytes) {
    fail(std::string(what) + " overwrites the barrier at offset " + std::to_string(next->first));
  }
}

void check_fenced(Block& block, uint32_t offset, uint32_t bytes, const char* what) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (block.unfenced_writer[i]) {
      fail(std::string(what) + " reads shared memory at offset " + std::to_string(i) +
           ", which thread " + std::to_string(block.unfenced_writer[i] - 1) +
           " wrote and no fence_async_proxy followed");
    }
  }
}

// The part of one row of a box that is inside the matrix. TMA loads zeros for the rest of the row
// and does not store it.
struct RowPart {
  char* memory;
  int64_t skipped, bytes;  // of the box's row: before the part, of the part

  RowPart(const emulator::TensorMap& map, int64_t column, int64_t row) {
    const auto columns = static_cast<int64_t>(map.columns);
    const int64_t first = std::clamp<int64_t>(column, 0, columns);
    const int64_t last = std::clamp<int64_t>(column + map.box_columns, first, columns);
    const bool valid = row >= 0 && row < static_cast<int64_t>(map.rows);
    memory = map.base + row * map.row_bytes + first * map.element_bytes;
    skipped = (first - column) * map.element_bytes;
    bytes = valid ? (last - first) * map.element_bytes : 0;
  }
};

// The requirements of cuTensorMapEncodeTiled and of TMA copies on a map, its box and the offset of
// the tile in shared memory.
void check_box(const emulator::TensorMap& map, uint32_t tile, bool write, const char* what) {
  const uint32_t row = map.box_columns * map.element_bytes;
  if (map.swizzle && row != 128) {
    fail(std::string(what) + ": rows of a swizzled box must have 128 bytes");
  }
  if (tile % (map.swizzle ? 1024 : 128)) fail(std::string(what) + ": tile is not aligned");
  if (row % 16 || map.row_bytes % 16 || reinterpret_cast<uintptr_t>(map.base) % 16) {
    fail(std::string(what) + ": rows are not multiples of 16 bytes");
  }
  if (map.box_rows > 256 || map.box_columns > 256) fail(std::string(what) + ": box is too large");
  if (map.rows == 0 || map.columns == 0 || map.rows >> 32 || map.columns >> 32 ||
      map.row_bytes >> 40 || map.row_bytes < map.columns * map.element_bytes) {
    fail(std::string(what) + ": unsupported shape or row stride of the tensor map");
  }
  for (const uint64_t edge_row : {uint64_t{0}, map.rows - 1}) {
    emulator::memory().check(map.base + edge_row * map.row_bytes,
                             static_cast<int64_t>(map.columns * map.element_bytes), write, what);
  }
}

void load_box(Block& block, uint32_t tile, uint32_t barrier, const emulator::TensorMap& map,
              int column, int row) {
  const uint32_t width = map.box_columns * map.element_bytes;
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    std::vector<char> line(width, 0);
    const RowPart part(map, column, static_cast<int64_t>(row) + r);
    if (part.bytes) {
      block.machine->record_access(Access::constant, part.memory, part.bytes, "tma_load");
      std::memcpy(&line[part.skipped], part.memory, part.bytes);
    }
    for (uint32_t c = 0; c < width; c += 16) {
      const uint32_t chunk = tile + r * width + c;
      check_no_barrier(block, chunk, 16, "tma_load");
      std::memcpy(block.shared + (map.swizzle ? swizzled(chunk) : chunk), &line[c], 16);
    }
  }
  complete_bytes(block, barrier, map.box_bytes());
}

}  // namespace

namespace sm90 {

bool elect_one() {
  Thread& t = current();
  warp_collect(ELECT, 0, "elect_one");
  return t.lane() == t.block->elected_lanes[t.warp()];
}

char* shared_memory() { return current().block->shared; }

uint32_t shared_address(const void* p) { return current().block->offset(p, 0, "shared_address"); }

void record_shared_store(const void* p, uint32_t bytes) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(p, bytes, "store_shared");
  if (offset % bytes) fail("store_shared: address is not aligned");
  check_no_barrier(*t.block, offset, bytes, "store_shared");
  const auto writer = static_cast<uint16_t>(t.index + 1);
  std::fill_n(t.block->unfenced_writer.begin() + offset, bytes, writer);
  t.unfenced_stores.emplace_back(offset, bytes);
}

Floats load_shared_at(const void* p, int rank) {
  const uint32_t offset = current().block->offset(p, sizeof(Floats), "load_shared_at");
  if (offset % sizeof(Floats)) fail("load_shared_at: address is not aligned");
  const Block& block = cluster_block(rank, "load_shared_at");
  machine().maybe_yield(4);
  if (block.running_threads == 0) fail("load_shared_at: reads from a block that has ended");
  Floats x;
  std::memcpy(&x, block.shared + offset, sizeof(Floats));
  return x;
}

void store_matrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // Lane l gives the address of row l % 8 of matrix l / 8. Of each matrix it has the two values at
  // row l / 4 and columns 2 (l % 4) and 2 (l % 4) + 1.
  Thread& t = current();
  const uint32_t parts[4] = {a, b, c, d};
  t.block->offset(row, 16, "store_matrix_x4");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("store_matrix_x4: address is not aligned");
  const auto rows = warp_collect(MATRIX, reinterpret_cast<uint64_t>(row), "store_matrix_x4");
  for (int m = 0; m < 4; ++m) {
    char* target = reinterpret_cast<char*>(rows[m * 8 + t.lane() / 4]) + t.lane() % 4 * 4;
    record_shared_store(target, 4);
    std::memcpy(target, &parts[m], 4);
  }
}

void fence_async_proxy() {
  Thread& t = current();
  machine().maybe_yield(8);
  auto& writer = t.block->unfenced_writer;
  for (const auto& [offset, bytes] : t.unfenced_stores) {
    for (uint32_t i = offset; i < offset + bytes; ++i) {
      if (writer[i] == t.index + 1) writer[i] = 0;
    }
  }
  t.unfenced_stores.clear();
}

void barrier_init(Barrier* barrier, int count) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(barrier, 8, "barrier_init");
  if (offset % 8) fail("barrier_init: address is not aligned");
  if (count < 1 || count >= 1 << 20) {
    fail("barrier_init: count: expected 1 to 2^20 - 1, got " + std::to_string(count));
  }
  if (t.block->mbarriers.count(offset)) fail("barrier_init: the barrier is initialized already");
  Mbarrier& b = t.block->mbarriers[offset];
  b.expected_arrivals = b.pending_arrivals = count;
  b.init_thread = t.index;
}

void barrier_init_fence() {
  Thread& t = current();
  for (auto& [offset, b] : t.block->mbarriers) {
    (void)offset;
    if (b.init_thread == t.index) b.init_fenced = true;
  }
}

void barrier_arrive(Barrier* barrier) {
  machine().maybe_yield(8);
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive"), 0);
}

void barrier_arrive_remote(Barrier* barrier, int rank) {
  const uint32_t offset = current().block->offset(barrier, 8, "barrier_arrive_remote");
  Block& block = cluster_block(rank, "barrier_arrive_remote");
  Mbarrier& b = block.mbarrier(block.shared + offset, "barrier_arrive_remote");
  if (!b.init_fenced) fail("barrier_arrive_remote: no barrier_init_fence after barrier_init");
  arrive(block, b, 0);
}

void barrier_arrive_release_cluster(Barrier* barrier, int rank) {
  barrier_arrive_remote(barrier, rank);
}

void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  Block& block = *current().block;
  arrive(block, block.mbarrier(barrier, "barrier_arrive_expect"), bytes);
}

void barrier_wait(Barrier* barrier, uint32_t parity) {
  Block& block = *current().block;
  Mbarrier& b = block.mbarrier(barrier, "barrier_wait");
  if (parity > 1) fail("barrier_wait: parity: expected 0 or 1, got " + std::to_string(parity));
  machine().maybe_yield(8);
  if ((b.phase & 1) != parity) return;
  const uint32_t offset = block.offset(barrier, 8, "barrier_wait");
  machine().wait(b.waiters, [&] { return describe(b, offset, parity); },
                 [&] { return (b.phase & 1) != parity; });
}

void barrier_wait_acquire_cluster(Barrier* barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
}

namespace {

emulator::NamedBarrier& named_arrival(int id, int threads) {
  Block& block = *current().block;
  if (id < 0 || id > 15) fail("named barrier: id: expected 1 to 15, got " + std::to_string(id));
  if (threads % emulator::WARP_SIZE || threads < emulator::WARP_SIZE || threads > 1024) {
    fail("named barrier: threads: expected a multiple of 32 up to 1024, got " +
         std::to_string(threads));
  }
  auto& b = block.named_barriers[id];
  if (b.arrived && b.threads != threads) {
    fail("named barrier " + std::to_string(id) + ": threads: expected " +
         std::to_string(b.threads) + " as in another call, got " + std::to_string(threads));
  }
  b.threads = threads;
  if (!b.arrived_threads.insert(current().index).second) {
    fail("named barrier " + std::to_string(id) + ": the thread arrives twice in one phase");
  }
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.arrived_threads.clear();
    ++b.generation;
    machine().wake(b.waiters);
  }
  return b;
}

void sync(int id, int threads, const std::string& name) {
  const uint64_t generation = current().block->named_barriers[id].generation;
  auto& b = named_arrival(id, threads);
  machine().wait(b.waiters, [&] { return name; }, [&] { return b.generation != generation; });
}

void check_not_block_sync(int id) {
  if (id == 0) fail("named barrier 0 is reserved for block_sync");
}

}  // namespace

void named_barrier_sync(int id, int threads) {
  check_not_block_sync(id);
  sync(id, threads, "named barrier " + std::to_string(id));
}

void named_barrier_arrive(int id, int threads) {
  check_not_block_sync(id);
  named_arrival(id, threads);
}

void block_sync() { sync(0, current().block->launch().threads, "block_sync"); }

void warp_sync() { warp_collect(SYNC, 0, "warp_sync"); }

void cluster_arrive() {
  Cluster& c = cluster();
  if (current().cluster_arrivals++ != 0) {
    fail("cluster_arrive: no cluster_wait since the last call");
  }
  if (++c.arrived_threads == c.grid->launch.threads * c.grid->launch.cluster) {
    c.arrived_threads = 0;
    ++c.generation;
    for (auto& block : c.blocks) {
      for (auto& t : block->threads) t->cluster_arrivals = -t->cluster_arrivals;
    }
    machine().wake(c.waiters);
  }
}

void cluster_wait() {
  Thread& t = current();
  if (t.cluster_arrivals == 0) fail("cluster_wait: no cluster_arrive since the last call");
  machine().wait(cluster().waiters, [] { return "the cluster barrier"; },
                 [&] { return t.cluster_arrivals < 0; });
  t.cluster_arrivals = 0;
  t.passed_cluster_barrier = true;
}

void tma_load(void* tile, const TensorMap* map, Barrier* barrier, int column, int row) {
  tma_load_multicast(tile, map, barrier, column, row,
                     static_cast<uint16_t>(1 << current().block->rank));
}

void tma_load_multicast(void* tile, const TensorMap* map, Barrier* barrier, int column, int row,
                        uint16_t ranks) {
  const Block& issuer = *current().block;
  const uint32_t tile_offset = issuer.offset(tile, map->box_bytes(), "tma_load");
  check_box(*map, tile_offset, false, "tma_load");
  if (!current().block->mbarrier(barrier, "tma_load").init_fenced) {
    fail("tma_load: no barrier_init_fence after barrier_init");
  }
  const uint32_t barrier_offset = issuer.offset(barrier, 8, "tma_load");
  for (int rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block* block = &cluster_block(rank, "tma_load_multicast");
    cluster().schedule(
        [=, map = *map] { load_box(*block, tile_offset, barrier_offset, map, column, row); });
  }
}

void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  Block* block = current().block;
  const uint32_t offset = block->offset(to, bytes, "bulk_load");
  if (offset % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("bulk_load: addresses and size must be multiples of 16 bytes");
  }
  if (!block->mbarrier(barrier, "bulk_load").init_fenced) {
    fail("bulk_load: no barrier_init_fence after barrier_init");
  }
  const uint32_t barrier_offset = block->offset(barrier, 8, "bulk_load");
  emulator::memory().check(from, bytes, false, "bulk_load");
  cluster().schedule([=] {
    check_no_barrier(*block, offset, bytes, "bulk_load");
    block->machine->record_access(Access::constant, from, bytes, "bulk_load");
    std::memcpy(block->shared + offset, from, bytes);
    complete_bytes(*block, barrier_offset, bytes);
  });
}

void tma_store(const TensorMap* map, const void* tile, int column, int row) {
  Thread* t = &current();
  Block* block = t->block;
  const uint32_t offset = block->offset(tile, map->box_bytes(), "tma_store");
  check_box(*map, offset, true, "tma_store");
  check_fenced(*block, offset, map->box_bytes(), "tma_store");
  auto group = t->open_store_group;
  ++group->pending_reads, ++group->pending_writes;
  ++block->stores_reading;
  Machine* m = &machine();
  Cluster* c = &cluster();
  c->schedule([=, map = *map] {
    std::vector<char> box(map.box_bytes());
    check_fenced(*block, offset, map.box_bytes(), "tma_store");
    for (uint32_t i = 0; i < box.size(); i += 16) {
      const uint32_t chunk = map.swizzle ? swizzled(offset + i) : offset + i;
      std::memcpy(&box[i], block->shared + chunk, 16);
    }
    --group->pending_reads;
    --block->stores_reading;
    m->wake(t->store_waiters);
    c->schedule([=, box = std::move(box)] {
      const uint32_t width = map.box_columns * map.element_bytes;
      for (uint32_t r = 0; r < map.box_rows; ++r) {
        const RowPart part(map, column, static_cast<int64_t>(row) + r);
        if (!part.bytes) continue;
        const char* values = &box[r * width + part.skipped];
        m->record_access(Access::write, part.memory, part.bytes, "tma_store", values);
        std::memcpy(part.memory, values, part.bytes);
      }
      --group->pending_writes;
      m->wake(t->store_waiters);
    });
  });
}

void tma_store_commit() {
  Thread& t = current();
  t.store_groups.push_back(t.open_store_group);
  t.open_store_group = std::make_shared<emulator::StoreGroup>();
}

void tma_store_wait_groups(int pending, bool reads_only) {
  Thread& t = current();
  const int count = static_cast<int>(t.store_groups.size()) - pending;
  const auto done = [&] {
    for (int i = 0; i < count; ++i) {
      const auto& group = *t.store_groups[i];
      if (group.pending_reads || (!reads_only && group.pending_writes)) return false;
    }
    return true;
  };
  machine().wait(t.store_waiters, [] { return "TMA stores"; }, done);
  if (!reads_only && count > 0) {
    t.store_groups.erase(t.store_groups.begin(), t.store_groups.begin() + count);
  }
}

void set_registers(int count, bool increase) {
  Thread& t = current();
  Block& block = *t.block;
  auto& group = block.groups[t.group()];
  if (count % 8 || count < 24 || count > 256) {
    fail("setmaxnreg: expected a multiple of 8 from 24 to 256, got " + std::to_string(count));
  }
  if (increase ? count < group.registers : count > group.registers) {
    fail(std::string("setmaxnreg: cannot ") + (increase ? "increase" : "decrease") + " from " +
         std::to_string(group.registers) + " to " + std::to_string(count) + " registers");
  }
  const auto enough = [&] {
    int sum = 0;
    for (const auto& other : block.groups) {
      sum += emulator::WARPGROUP_SIZE * (&other == &group ? count : other.registers);
    }
    return sum <= block.registers;
  };
  collect(REGISTERS, t.group(), emulator::WARPGROUP_SIZE, t.index % emulator::WARPGROUP_SIZE, 0,
          "setmaxnreg");
  machine().wait(block.register_waiters,
                 [&] { return std::to_string(count) + " registers per thread"; }, enough);
  group.registers = count;
  machine().wake(block.register_waiters);
}

float shuffle_xor(float x, int lanes) {
  if (lanes < 0 || lanes >= emulator::WARP_SIZE) {
    fail("shuffle_xor: lane mask: expected 0 to 31, got " + std::to_string(lanes));
  }
  const auto values = warp_collect(SHUFFLE, float_bits(x), "shuffle_xor");
  return float_of(static_cast<uint32_t>(values[current().lane() ^ lanes]));
}

int shuffle_from(int x, int lane) {
  if (lane < 0 || lane >= emulator::WARP_SIZE) {
    fail("shuffle_from: lane: expected 0 to 31, got " + std::to_string(lane));
  }
  return static_cast<int>(warp_collect(SHUFFLE, static_cast<uint32_t>(x), "shuffle_from")[lane]);
}

// Waits until the first grid has ended. Its writes are visible after this call.
void grid_dependency_wait() {
  Thread& t = current();
  const int index = t.block->cluster->grid->index;
  if (index > 0) {
    auto& previous = *machine().grids[index - 1];
    machine().wait(previous.finish_waiters, [] { return "the end of the previous grid"; },
                   [&] { return previous.unfinished_clusters == 0; });
  }
  t.waited_for_grid = true;
}

void grid_dependency_launch() { machine().release_dependents(*current().block); }

}  // namespace sm90
