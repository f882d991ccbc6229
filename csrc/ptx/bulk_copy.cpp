// Bulk copies and tensor copies (TMA) between global and shared memory.
//
// A load completes on an mbarrier, a store in a bulk group of its warp. A store reads shared memory
// and writes global memory at two times: wait_group.read waits for the first only.
// Source: PTX ISA 9.0, sections 9.7.9.25 (asynchronous copy) and 5.5 (tensors and swizzling).
#include <algorithm>

#include "async.h"
#include "profile.h"
#include "tensor_map.h"

namespace deepkern::ptx {

namespace {

void count_bytes(Warp& warp, const Instruction& i, uint64_t bytes) {
  if (warp.grid->profile) warp.grid->profile->statements[i.statement].bytes += bytes;
}

void count_sectors(Warp& warp, const Instruction& i, uint64_t address, uint64_t bytes) {
  if (warp.grid->profile) warp.grid->profile->count_copy(i, address, bytes);
}

Status commit_bulk(Warp& warp, const Instruction&, uint32_t) {
  agent_of(warp, warp.bulk.agent, "a bulk copy");
  agent_of(warp, warp.bulk_write_agent, "a bulk copy");
  commit_group(warp.bulk);
  return Status::NEXT;
}

Status wait_bulk(Warp& warp, const Instruction& i, uint32_t) {
  size_t left = i.immediate;
  wait_groups(warp, warp.bulk, left);
  if (i.mode) return Status::NEXT;  // .read: the writes may still be in flight
  if (left == 0) {
    for (auto& work : warp.bulk_writes) warp.grid->finish(*work);
    warp.bulk_writes.clear();
  }
  if (warp.bulk.count >= left)
    see(warp, warp.bulk_write_agent, warp.bulk.count - static_cast<Clock>(left));
  return Status::NEXT;
}

const TensorMap& read_map(Warp& warp, const Instruction& i, int lane, uint64_t address) {
  if (address % 64) warp.fail(i, lane, "a tensor map at an address that 64 does not divide");
  translate(warp, i, lane, address + 64, 64, Space::GENERIC, "reads a tensor map of");
  Target target = translate(warp, i, lane, address, 64, Space::GENERIC, "reads a tensor map of");
  const auto& map = *reinterpret_cast<const TensorMap*>(target.data);
  if (map.magic != TensorMap::MAGIC)
    warp.fail(i, lane, "the bytes at " + hexadecimal(address) + " are no tensor map");
  return map;
}

}  // namespace

uint32_t swizzled(uint32_t offset, int swizzle) {
  uint32_t rows = swizzle == 3 ? 7 : swizzle == 2 ? 3 : swizzle == 1 ? 1 : 0;
  return offset ^ ((offset >> 7 & rows) << 4);
}

std::vector<Row> rows_of_box(const TensorMap& map, const int32_t* coordinates, uint32_t offset) {
  std::vector<Row> rows;
  uint32_t row_bytes = map.box[0] * map.element_bytes;
  uint64_t count = 1;
  for (int d = 1; d < map.rank; d++) count *= map.box[d];
  for (uint64_t r = 0; r < count; r++) {
    uint64_t rest = r, address = map.address;
    bool inside = true;
    for (int d = 1; d < map.rank; d++) {
      int64_t at = int64_t(coordinates[d]) + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside = inside && at >= 0 && at <= int64_t(map.size_minus_1[d]);
      address += at * map.stride[d - 1];
    }
    int64_t size = int64_t(map.size_minus_1[0]) + 1, first = coordinates[0];
    int64_t begin = std::clamp<int64_t>(-first, 0, map.box[0]);
    int64_t end = std::clamp<int64_t>(size - first, begin, map.box[0]);
    if (!inside) end = begin;
    Row row;
    row.address = address + (first + begin) * map.element_bytes;
    row.shared = offset + static_cast<uint32_t>(r) * row_bytes;
    row.skip = static_cast<uint32_t>(begin) * map.element_bytes;
    row.bytes = static_cast<uint32_t>(end - begin) * map.element_bytes;
    rows.push_back(row);
  }
  return rows;
}

void check_map(Warp& warp, const Instruction& i, int lane, const TensorMap& map, int rank,
               uint32_t offset) {
  if (map.rank != rank)
    warp.fail(
        i, lane,
        "a tensor map of rank " + std::to_string(map.rank) + ", expected " + std::to_string(rank));
  if (map.interleave || map.swizzle > 3)
    warp.fail(i, lane, "an interleaved tensor map or a swizzle of atoms is not supported");
  for (int d = 0; d < rank; d++)
    if (map.element_stride[d] != 1)
      warp.fail(i, lane, "a tensor map with element strides is not supported");
  if (offset % 128)
    warp.fail(
        i, lane,
        "a tensor copy at shared address " + hexadecimal(offset) + ", which 128 does not divide");
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; d++) bytes *= map.box[d];
  return bytes;
}

namespace {

void check_no_mbarrier(Warp& warp, const Instruction& i, int lane, Block& block, uint32_t offset,
                       uint32_t bytes) {
  for (auto& [at, barrier] : block.mbarriers)
    if (at + 8 > offset && at < offset + bytes)
      warp.fail(i, lane,
                "a copy writes over the mbarrier at byte " + std::to_string(at - SHARED_BASE) +
                    " of shared memory");
}

// The bytes of a NaN of the element type, for parts of a box outside the tensor.
void fill(uint8_t* to, uint32_t bytes, const TensorMap& map) {
  if (!map.fill_nan) {
    std::memset(to, 0, bytes);
    return;
  }
  for (uint32_t k = 0; k < bytes; k++)
    to[k] = k % map.element_bytes == map.element_bytes - 1u ? 0x7f : 0xff;
}

void load_row(uint8_t* shared, const Row& row, uint32_t row_bytes, const TensorMap& map) {
  for (uint32_t at = 0; at < row_bytes; at += 16) {
    uint8_t chunk[16];
    fill(chunk, 16, map);
    uint32_t begin = std::max(at, row.skip), end = std::min(at + 16, row.skip + row.bytes);
    if (begin < end)
      std::memcpy(chunk + begin - at,
                  reinterpret_cast<const uint8_t*>(row.address) + begin - row.skip, end - begin);
    std::memcpy(shared + swizzled(row.shared + at, map.swizzle), chunk, 16);
  }
}

// One box into the shared memory of one block. Bytes outside the tensor count as brought. A
// multicast reads the sectors of global memory once, for its first block.
void load_box(Warp& warp, const Instruction& i, int lane, const TensorMap& map,
              const int32_t* coordinates, Block& block, uint32_t offset, uint32_t barrier_offset,
              bool first) {
  Target barrier_target{block.shared.data() + barrier_offset, Space::SHARED, &block,
                        barrier_offset};
  Mbarrier& barrier = find_mbarrier(warp, i, lane, barrier_target);
  uint32_t total = box_bytes(map);
  if (offset + uint64_t(total) > block.shared.size())
    warp.fail(i, lane, "copies " + std::to_string(total) + " bytes out of bounds of shared memory");
  check_no_mbarrier(warp, i, lane, block, offset, total);
  Clock clock = static_cast<Clock>(barrier.phase + 1);
  auto rows = rows_of_box(map, coordinates, offset);
  for (const Row& row : rows) {
    if (!row.bytes) continue;
    translate(warp, i, lane, row.address, 1, Space::GLOBAL, "copies from");
    translate(warp, i, lane, row.address + row.bytes - 1, 1, Space::GLOBAL, "copies from");
    touch_global(warp, i, -1, row.address, row.bytes, Touch::READ, barrier.agent, clock,
                 Proxy::ASYNC, warp.view());
    if (first) count_sectors(warp, i, row.address, row.bytes);
  }
  touch_shared(warp, i, -1, block, offset, total, Touch::WRITE, barrier.agent, clock, Proxy::ASYNC,
               warp.view());
  count_bytes(warp, i, total);
  TensorMap copy = map;
  Block* to = &block;
  warp.grid->start("tensor copy", [rows, copy, to, barrier_offset, total] {
    for (const Row& row : rows)
      load_row(to->shared.data(), row, copy.box[0] * copy.element_bytes, copy);
    complete_bytes(*to, barrier_offset, total);
  });
}

void read_coordinates(Warp& warp, const Instruction& i, int lane, int32_t* coordinates) {
  for (size_t d = 0; d < i.list.size(); d++) coordinates[d] = warp.s32(i.list[d])[lane];
}

// a: shared address, b: tensor map, c: mbarrier, d: mask of blocks or -1, list: coordinates.
Status load_tensor(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    const TensorMap& map = read_map(warp, i, lane, warp.u64(i.b)[lane]);
    int32_t coordinates[5] = {};
    read_coordinates(warp, i, lane, coordinates);
    Target to = translate_shared(warp, i, lane, warp.u32(i.a)[lane], 1, "copies to");
    Target barrier = translate_shared(warp, i, lane, warp.u32(i.c)[lane], 8, "completes on");
    check_map(warp, i, lane, map, static_cast<int>(i.list.size()), to.offset);
    if (i.e < 0) {
      if (to.block != barrier.block)
        warp.fail(i, lane, "a copy to one block with the mbarrier of another");
      load_box(warp, i, lane, map, coordinates, *to.block, to.offset, barrier.offset, true);
      continue;
    }
    auto& blocks = warp.block->cluster->blocks;
    uint32_t members = warp.u32(i.e)[lane] & 0xffff;
    if (members >> blocks.size()) warp.fail(i, lane, "a multicast to blocks outside the cluster");
    for (size_t rank = 0; rank < blocks.size(); rank++)
      if (members >> rank & 1)
        load_box(warp, i, lane, map, coordinates, *blocks[rank], to.offset, barrier.offset,
                 rank == size_t(__builtin_ctz(members)));
  }
  return Status::NEXT;
}

void store_rows(const std::vector<Row>& rows, const std::vector<uint8_t>& bytes, int reduction) {
  const uint8_t* from = bytes.data();
  for (const Row& row : rows) {
    auto* to = reinterpret_cast<uint8_t*>(row.address);
    if (reduction == 0) {
      std::memcpy(to, from, row.bytes);
    } else {
      for (uint32_t k = 0; k < row.bytes; k += 4) {
        float a, b;
        std::memcpy(&a, to + k, 4);
        std::memcpy(&b, from + k, 4);
        a += b;
        std::memcpy(to + k, &a, 4);
      }
    }
    from += row.bytes;
  }
}

// Reads shared memory, then writes global memory: two pieces of work.
void start_store(Warp& warp, const std::vector<Row>& rows, Block& block, int swizzle,
                 int reduction) {
  auto bytes = std::make_shared<std::vector<uint8_t>>();
  Block* from = &block;
  auto read = warp.grid->start("bulk read", [rows, bytes, from, swizzle] {
    for (const Row& row : rows)
      for (uint32_t k = 0; k < row.bytes; k++)
        bytes->push_back(from->shared[swizzled(row.shared + row.skip + k, swizzle)]);
  });
  Grid* grid = warp.grid;
  auto write = grid->start("bulk write", [rows, bytes, read, grid, reduction] {
    grid->finish(*read);
    store_rows(rows, *bytes, reduction);
  });
  warp.bulk.open.push_back(read);
  warp.bulk_writes.push_back(write);
}

void touch_store(Warp& warp, const Instruction& i, int lane, const std::vector<Row>& rows,
                 Block& block, uint32_t offset, uint32_t total, int reduction) {
  int reads = agent_of(warp, warp.bulk.agent, "a bulk copy");
  int writes = agent_of(warp, warp.bulk_write_agent, "a bulk copy");
  Clock clock = warp.bulk.clock();
  for (const Row& row : rows) {
    if (!row.bytes) continue;
    translate(warp, i, lane, row.address, 1, Space::GLOBAL, "copies to");
    translate(warp, i, lane, row.address + row.bytes - 1, 1, Space::GLOBAL, "copies to");
    touch_global(warp, i, -1, row.address, row.bytes, reduction ? Touch::ATOMIC : Touch::WRITE,
                 writes, clock, Proxy::ASYNC, warp.view());
    count_sectors(warp, i, row.address, row.bytes);
  }
  touch_shared(warp, i, -1, block, offset, total, Touch::READ, reads, clock, Proxy::ASYNC,
               warp.view());
  count_bytes(warp, i, total);
}

// a: shared address, b: tensor map, list: coordinates, mode: 1 adds float32.
Status store_tensor(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    const TensorMap& map = read_map(warp, i, lane, warp.u64(i.b)[lane]);
    int32_t coordinates[5] = {};
    read_coordinates(warp, i, lane, coordinates);
    uint32_t total = box_bytes(map);
    Target from = translate_shared(warp, i, lane, warp.u32(i.a)[lane], total, "copies from");
    check_map(warp, i, lane, map, static_cast<int>(i.list.size()), from.offset);
    if (i.mode && map.type != 7)
      warp.fail(i, lane, "a reduction of anything but float32 is not supported");
    auto rows = rows_of_box(map, coordinates, from.offset);
    touch_store(warp, i, lane, rows, *from.block, from.offset, total, static_cast<int>(i.mode));
    start_store(warp, rows, *from.block, map.swizzle, static_cast<int>(i.mode));
  }
  return Status::NEXT;
}

void check_bulk(Warp& warp, const Instruction& i, int lane, uint64_t a, uint64_t b,
                uint32_t bytes) {
  if (a % 16 || b % 16 || bytes % 16)
    warp.fail(i, lane,
              "a bulk copy of " + std::to_string(bytes) + " bytes from " + hexadecimal(b) + " to " +
                  hexadecimal(a) + ": expected multiples of 16");
}

// a: shared address, b: global address, c: bytes, d: mbarrier.
Status load_bulk(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint32_t bytes = warp.u32(i.c)[lane];
    uint64_t from = warp.u64(i.b)[lane];
    Target to = translate_shared(warp, i, lane, warp.u32(i.a)[lane], bytes, "copies to");
    Target at = translate_shared(warp, i, lane, warp.u32(i.d)[lane], 8, "completes on");
    check_bulk(warp, i, lane, to.offset, from, bytes);
    translate(warp, i, lane, from, 1, Space::GLOBAL, "copies from");
    translate(warp, i, lane, from + bytes - 1, 1, Space::GLOBAL, "copies from");
    Mbarrier& barrier = find_mbarrier(warp, i, lane, at);
    check_no_mbarrier(warp, i, lane, *to.block, to.offset, bytes);
    Clock clock = static_cast<Clock>(barrier.phase + 1);
    touch_global(warp, i, -1, from, bytes, Touch::READ, barrier.agent, clock, Proxy::ASYNC,
                 warp.view());
    touch_shared(warp, i, -1, *to.block, to.offset, bytes, Touch::WRITE, barrier.agent, clock,
                 Proxy::ASYNC, warp.view());
    count_bytes(warp, i, bytes);
    count_sectors(warp, i, from, bytes);
    warp.grid->start("bulk copy", [to, at, from, bytes] {
      std::memcpy(to.data, reinterpret_cast<const uint8_t*>(from), bytes);
      complete_bytes(*at.block, at.offset, bytes);
    });
  }
  return Status::NEXT;
}

// a: shared address, b: global address, c: bytes.
Status store_bulk(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint32_t bytes = warp.u32(i.c)[lane];
    uint64_t to = warp.u64(i.b)[lane];
    Target from = translate_shared(warp, i, lane, warp.u32(i.a)[lane], bytes, "copies from");
    check_bulk(warp, i, lane, to, from.offset, bytes);
    std::vector<Row> rows{{to, from.offset, 0, bytes}};
    touch_store(warp, i, lane, rows, *from.block, from.offset, bytes, 0);
    start_store(warp, rows, *from.block, 0, 0);
  }
  return Status::NEXT;
}

// Slot of an address without an offset.
int plain_address(Binder& b, size_t operand, int bits) {
  int64_t offset;
  int slot = b.address(operand, bits, offset);
  if (offset) b.fail("an offset in an address of a bulk copy");
  return slot;
}

void bind_coordinates(Binder& b, size_t operand) {
  const auto& parts = b.statement.operands.at(operand).parts;
  if (parts.size() != 1) b.fail("expected [map, {coordinates}]");
  const OperandText& list = parts[0];
  if (list.kind != OperandText::LIST) b.instruction.list.push_back(b.source(list, 32));
  for (const OperandText& c : list.parts) b.instruction.list.push_back(b.source(c, 32));
  std::string rank = std::to_string(b.instruction.list.size()) + "d";
  if (!b.has(rank.c_str())) b.fail("a number of coordinates other than that of the dimensions");
}

void bind_tensor(Binder& b) {
  Instruction& i = b.instruction;
  if (b.has("im2col")) b.fail("im2col is not supported");
  if (b.has("global") && b.statement.text().find("global.shared::cta") != std::string::npos) {
    bind_coordinates(b, 0);
    i.b = plain_address(b, 0, 64);
    i.a = plain_address(b, 1, 32);
    i.mode = b.has("add");
    if (b.statement.opcode[1] == "reduce" && !i.mode) b.fail("only reductions by add");
    i.run = store_tensor;
    return;
  }
  i.a = plain_address(b, 0, 32);
  bind_coordinates(b, 1);
  i.b = plain_address(b, 1, 64);
  i.c = plain_address(b, 2, 32);
  if (b.has("multicast::cluster")) i.e = b.source(3, 16);
  i.run = load_tensor;
}

}  // namespace

void bind_bulk(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::ASYNC_COPY;
  if (b.has("commit_group")) {
    i.run = commit_bulk;
  } else if (b.has("wait_group")) {
    i.run = wait_bulk;
    i.mode = b.has("read");
    i.immediate = b.immediate(0);
  } else if (b.has("tensor")) {
    bind_tensor(b);
  } else if (b.has("bulk_group")) {
    i.b = plain_address(b, 0, 64);
    i.a = plain_address(b, 1, 32);
    i.c = b.source(2, 32);
    i.run = store_bulk;
  } else if (b.has("global")) {
    if (b.has("multicast::cluster")) b.fail("unknown modifier .multicast::cluster");
    i.a = plain_address(b, 0, 32);
    i.b = plain_address(b, 1, 64);
    i.c = b.source(2, 32);
    i.d = plain_address(b, 3, 32);
    i.run = load_bulk;
  } else {
    b.fail("unknown modifier");
  }
}

}  // namespace deepkern::ptx
