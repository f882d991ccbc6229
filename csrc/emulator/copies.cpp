// TMA, bulk and cp.async copies of csrc/sm90/primitives.cuh: checked at the call, done later.
#include <algorithm>
#include <utility>

#include "calls.h"
#include "primitives.h"

using emulator::Access;
using emulator::Block;
using emulator::check_no_barrier;
using emulator::Cluster;
using emulator::cluster;
using emulator::cluster_block;
using emulator::CopyGroup;
using emulator::current;
using emulator::fail;
using emulator::Machine;
using emulator::machine;
using emulator::Mbarrier;
using emulator::swizzled;
using emulator::Thread;

namespace {

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
  Mbarrier& b = emulator::barrier_of_copy(block, barrier);
  block.records.async_store(tile, map.box_bytes(), b.number, b.phase, "tma_load");
  emulator::complete_bytes(block, b, map.box_bytes());
}

int most_copies_in_flight = 0;  // of a thread, since the last call of emulate_most_copies

void arrive(Block& block, const emulator::CopyArrival& arrival) {
  Mbarrier& b = emulator::barrier_of_copy(block, arrival.barrier);
  for (const uint32_t offset : arrival.offsets) {
    block.records.copy_arrived(offset, 16, b.number, b.phase);
  }
  emulator::complete_arrival(b);
}

// The copies of a group of the current thread are done together, at some time from here on.
void do_later(const std::shared_ptr<CopyGroup>& group) {
  Thread* t = &current();
  cluster().schedule([=] {
    Block& block = *t->block;
    for (const auto& [offset, from] : group->copies) {
      char* to = block.shared + offset;
      if (from) block.machine->record_access(Access::constant, from, 16, "copy_async");
      from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
    }
    group->done = true;
    t->copies_in_flight -= static_cast<int>(group->copies.size());
    block.machine->wake(t->copy_waiters);
    for (const auto& arrival : group->arrivals) {
      if (--arrival->groups == 0) arrive(block, *arrival);
    }
  });
}

}  // namespace

// The most cp.async copies of one thread that were in flight since the last call.
extern "C" int emulate_most_copies() { return std::exchange(most_copies_in_flight, 0); }

namespace sm90 {

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
    block->records.check_async_store(tile_offset, map->box_bytes(), "tma_load");
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
  block->records.check_async_store(offset, bytes, "bulk_load");
  cluster().schedule([=] {
    check_no_barrier(*block, offset, bytes, "bulk_load");
    block->machine->record_access(Access::constant, from, bytes, "bulk_load");
    std::memcpy(block->shared + offset, from, bytes);
    Mbarrier& b = emulator::barrier_of_copy(*block, barrier_offset);
    block->records.async_store(offset, bytes, b.number, b.phase, "bulk_load");
    emulator::complete_bytes(*block, b, bytes);
  });
}

void copy_async(void* to, const void* from, bool valid) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(to, 16, "copy_async");
  if (offset % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("copy_async: addresses must be multiples of 16 bytes");
  }
  check_no_barrier(*t.block, offset, 16, "copy_async");
  if (valid) emulator::memory().check(from, 16, false, "copy_async");
  t.block->records.copy_store(offset, 16, "copy_async");
  t.open_copy_group->copies.push_back({offset, valid ? from : nullptr});
  most_copies_in_flight = std::max(most_copies_in_flight, ++t.copies_in_flight);
}

void copy_async_commit() {
  Thread& t = current();
  t.copy_groups.push_back(t.open_copy_group);
  do_later(std::exchange(t.open_copy_group, std::make_shared<CopyGroup>()));
}

// The arrival takes the copies over: a later wait of the thread does not wait for them.
void barrier_arrive_after_copies(Barrier* barrier) {
  Thread& t = current();
  t.block->mbarrier(barrier, "barrier_arrive_after_copies");
  const uint32_t offset = t.block->offset(barrier, 8, "barrier_arrive_after_copies");
  const auto arrival = std::make_shared<emulator::CopyArrival>(emulator::CopyArrival{offset});
  const auto last = std::exchange(t.open_copy_group, std::make_shared<CopyGroup>());
  t.copy_groups.push_back(last);
  for (const auto& group : t.copy_groups) {
    for (const auto& copy : group->copies) arrival->offsets.push_back(copy.offset);
    if (group->done) continue;
    group->arrivals.push_back(arrival);
    ++arrival->groups;
  }
  t.copy_groups.clear();
  do_later(last);
}

void copy_async_wait_groups(int pending) {
  Thread& t = current();
  while (static_cast<int>(t.copy_groups.size()) > pending) {
    const auto group = t.copy_groups.front();
    machine().wait(t.copy_waiters, [] { return "asynchronous copies"; },
                   [&] { return group->done; });
    for (const auto& copy : group->copies) t.unfenced_stores.emplace_back(copy.offset, 16);
    t.copy_groups.pop_front();
  }
}

void tma_store(const TensorMap* map, const void* tile, int column, int row) {
  Thread* t = &current();
  Block* block = t->block;
  const uint32_t offset = block->offset(tile, map->box_bytes(), "tma_store");
  check_box(*map, offset, true, "tma_store");
  block->records.async_load(offset, map->box_bytes(), "tma_store");
  auto group = t->open_store_group;
  ++group->pending_reads, ++group->pending_writes;
  ++block->stores_reading;
  Machine* m = &machine();
  Cluster* c = &cluster();
  c->schedule([=, map = *map] {
    std::vector<char> box(map.box_bytes());
    block->records.async_load(offset, map.box_bytes(), "tma_store");
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

}  // namespace sm90
