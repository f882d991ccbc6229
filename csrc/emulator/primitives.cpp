// Primitives of csrc/sm90/primitives.cuh: shared memory, registers, shuffles, dependent grids.
//
// Each function checks its arguments and the state of the machine, then changes the state or
// schedules asynchronous work. Calls to maybe_yield() let other threads run at those points.
#include "primitives.h"

#include "calls.h"

using emulator::Block;
using emulator::cluster_block;
using emulator::current;
using emulator::fail;
using emulator::machine;
using emulator::Thread;
using emulator::warp_collect;

namespace sm90 {

bool elect_one() {
  Thread& t = current();
  warp_collect(emulator::ELECT, 0, "elect_one");
  return t.lane() == t.block->elected_lanes[t.warp()];
}

char* shared_memory() { return current().block->shared; }

uint32_t shared_address(const void* p) { return current().block->offset(p, 0, "shared_address"); }

void store_shared_bytes(void* p, const void* value, uint32_t bytes) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(p, bytes, "store_shared");
  if (offset % bytes) fail("store_shared: address is not aligned");
  emulator::check_no_barrier(*t.block, offset, bytes, "store_shared");
  t.block->records.store(offset, bytes, "store_shared");
  emulator::DelayedStore store{offset, bytes, {}};
  std::memcpy(store.data.data(), value, bytes);
  t.delayed_stores.push_back(store);
  const auto order = machine().order;
  const bool at_once = order == emulator::Order::earliest ||
                       (order == emulator::Order::random && machine().random() % 2);
  if (at_once) t.finish_stores();
}

void load_shared_bytes(const void* p, void* value, uint32_t bytes) {
  Thread& t = current();
  const uint32_t offset = t.block->offset(p, bytes, "load_shared");
  if (offset % bytes) fail("load_shared: address is not aligned");
  machine().maybe_yield(32);
  machine().maybe_lag();
  t.block->records.load(offset, bytes, "load_shared");
  for (const auto& store : t.delayed_stores) {
    if (store.offset < offset + bytes && offset < store.offset + store.bytes) {
      t.finish_stores();  // a thread sees its own stores
      break;
    }
  }
  std::memcpy(value, p, bytes);
}

Floats load_shared_at(const void* p, int rank) {
  const uint32_t offset = current().block->offset(p, sizeof(Floats), "load_shared_at");
  if (offset % sizeof(Floats)) fail("load_shared_at: address is not aligned");
  Block& block = cluster_block(rank, "load_shared_at");
  machine().maybe_yield(4);
  if (block.running_threads == 0) fail("load_shared_at: reads from a block that has ended");
  Thread& t = current();
  Floats x;
  if (&block == t.block) {
    load_shared_bytes(p, &x, sizeof(Floats));
    return x;
  }
  block.records.load_from(rank, t.clock, offset, sizeof(Floats), "load_shared_at");
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
  const auto rows =
      warp_collect(emulator::MATRIX, reinterpret_cast<uint64_t>(row), "store_matrix_x4");
  for (int m = 0; m < 4; ++m) {
    char* target = reinterpret_cast<char*>(rows[m * 8 + t.lane() / 4]) + t.lane() % 4 * 4;
    store_shared_bytes(target, &parts[m], 4);
  }
}

void fence_async_proxy() {
  machine().maybe_yield(8);
  current().finish_stores();
  current().block->records.fence_async_proxy();
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
  emulator::collect(emulator::REGISTERS, t.group(), emulator::WARPGROUP_SIZE,
                    t.index % emulator::WARPGROUP_SIZE, 0, "setmaxnreg");
  machine().wait(block.register_waiters,
                 [&] { return std::to_string(count) + " registers per thread"; }, enough);
  group.registers = count;
  machine().wake(block.register_waiters);
}

float shuffle_xor(float x, int lanes) {
  if (lanes < 0 || lanes >= emulator::WARP_SIZE) {
    fail("shuffle_xor: lane mask: expected 0 to 31, got " + std::to_string(lanes));
  }
  const auto values = warp_collect(emulator::SHUFFLE, float_bits(x), "shuffle_xor");
  return float_of(static_cast<uint32_t>(values[current().lane() ^ lanes]));
}

int shuffle_from(int x, int lane) {
  if (lane < 0 || lane >= emulator::WARP_SIZE) {
    fail("shuffle_from: lane: expected 0 to 31, got " + std::to_string(lane));
  }
  const auto values =
      warp_collect(emulator::SHUFFLE, static_cast<uint32_t>(x), "shuffle_from");
  return static_cast<int>(values[lane]);
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
