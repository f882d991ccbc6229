// Loads, stores, atomics and fences.
//
// Every access is checked for bounds, alignment, initialization and races; see happens_before.h.
// Source: PTX ISA 9.0, sections 8 (memory consistency model) and 9.7.9 (data movement).
#include "memory.h"

#include <algorithm>

#include "profile.h"

namespace deepkern::ptx {

namespace {

const char* space_name(Space space) {
  switch (space) {
    case Space::SHARED:
      return "shared memory";
    case Space::LOCAL:
      return "local memory";
    case Space::PARAM:
      return "kernel parameters";
    default:
      return "global memory";
  }
}

Space resolve(uint64_t address) {
  if (address >> 32 == GENERIC_SHARED_BASE >> 32) return Space::SHARED;
  if (address >> 32 == PARAMETER_BASE >> 32) return Space::PARAM;
  if (address >> 32 == LOCAL_BASE >> 32) return Space::LOCAL;
  return Space::GLOBAL;
}

[[noreturn]] void fail_at(Warp& warp, const Instruction& i, int lane, const std::string& what,
                          const std::string& place) {
  warp.fail(i, lane, what + " " + place);
}

}  // namespace

Target translate_shared(Warp& warp, const Instruction& i, int lane, uint32_t address,
                        uint32_t bytes, const char* what) {
  Cluster& cluster = *warp.block->cluster;
  uint32_t rank = address >> RANK_SHIFT;
  uint32_t offset = address & ((1u << RANK_SHIFT) - 1);
  if (rank >= cluster.blocks.size())
    fail_at(warp, i, lane, what,
            "shared address " + hexadecimal(address) + " of block " + std::to_string(rank) +
                " of a cluster of " + std::to_string(cluster.blocks.size()));
  Block& block = *cluster.blocks[rank];
  if (offset < SHARED_BASE || offset + uint64_t(bytes) > block.shared.size())
    fail_at(warp, i, lane, what,
            std::to_string(bytes) + " bytes out of bounds of shared memory: byte " +
                std::to_string(int64_t(offset) - SHARED_BASE) + " of " +
                std::to_string(block.shared.size() - SHARED_BASE));
  if (&block != warp.block && block.live_warps == 0)
    fail_at(warp, i, lane, what,
            "shared memory of block " + std::to_string(rank) + " of the cluster, which has exited");
  return {block.shared.data() + offset, Space::SHARED, &block, offset};
}

Target translate(Warp& warp, const Instruction& i, int lane, uint64_t address, uint32_t bytes,
                 Space space, const char* what) {
  if (space == Space::GENERIC) space = resolve(address);
  if (address % bytes != 0 && (bytes & (bytes - 1)) == 0)
    fail_at(warp, i, lane, what,
            std::to_string(bytes) + " bytes misaligned, at " + hexadecimal(address) + " in " +
                space_name(space));
  if (space == Space::SHARED)
    return translate_shared(warp, i, lane, static_cast<uint32_t>(address), bytes, what);
  Grid& grid = *warp.grid;
  if (space == Space::GLOBAL) {
    if (!grid.contains(address, bytes))
      fail_at(warp, i, lane, what,
              std::to_string(bytes) + " bytes out of bounds: " + grid.describe(address));
    return {reinterpret_cast<uint8_t*>(address), space, nullptr, 0};
  }
  uint64_t base = space == Space::PARAM ? PARAMETER_BASE : LOCAL_BASE;
  uint64_t size = space == Space::PARAM ? grid.parameters.size() : warp.kernel->local_bytes;
  uint64_t offset = address - base;
  if (offset + bytes > size)
    fail_at(warp, i, lane, what,
            std::to_string(bytes) + " bytes out of bounds of " + space_name(space) + ": byte " +
                std::to_string(offset) + " of " + std::to_string(size));
  uint8_t* data = space == Space::PARAM ? grid.parameters.data() + offset
                                        : warp.local.data() + lane * size + offset;
  return {data, space, nullptr, 0};
}

namespace {

const char* verb(Touch touch) {
  return touch == Touch::READ ? "reads" : touch == Touch::WRITE ? "writes" : "updates";
}

std::string place_of(const Kernel& kernel, int32_t instruction) {
  const Statement& s = kernel.statements[instruction];
  std::string place = s.location >= 0 ? kernel.locations[s.location].text : "no source line";
  return place + " (PTX line " + std::to_string(s.line) + ": " + s.text() + ")";
}

[[noreturn]] void fail_conflict(Warp& warp, const Instruction& i, int lane, const Conflict& c,
                                Touch touch, uint32_t bytes, const std::string& where,
                                const std::string& who) {
  std::string text = std::string(verb(touch)) + " " + std::to_string(bytes) + " bytes at " + where;
  if (c.uninitialized) warp.fail(i, lane, text + ", which nothing wrote");
  text = "race: " + text + ", which " + who + (c.previous_is_write ? " wrote" : " read") + " at " +
         place_of(*warp.kernel, c.previous.instruction) +
         (c.proxy_fence_is_missing ? "; there is no fence.proxy.async between the two"
                                   : "; nothing orders the two");
  warp.fail(i, lane, text);
}

bool is_same_store(const Conflict& c, const uint8_t* present, uint32_t bytes,
                   const uint8_t* value) {
  return value && !c.uninitialized && c.previous_is_write &&
         std::memcmp(present, value, bytes) == 0;
}

uint8_t shadow_lane(int lane) { return lane < 0 ? NO_LANE : static_cast<uint8_t>(lane); }

}  // namespace

void touch_shared(Warp& warp, const Instruction& i, int lane, Block& block, uint32_t offset,
                  uint32_t bytes, Touch touch, int agent, Clock clock, Proxy proxy,
                  const View& view, const uint8_t* value) {
  Access access{static_cast<uint16_t>(agent), proxy, shadow_lane(lane), clock, i.statement};
  Conflict c = touch == Touch::READ ? block.shadow.read(offset, bytes, access, view, warp.epoch)
               : touch == Touch::WRITE
                   ? block.shadow.write(offset, bytes, access, view, warp.epoch)
                   : block.shadow.atomic(offset, bytes, access, view, warp.epoch);
  if (!c.found || is_same_store(c, block.shared.data() + offset, bytes, value)) return;
  std::string where = "byte " + std::to_string(c.address - SHARED_BASE) + " of shared memory";
  std::string who = block.cluster->agent_name(c.previous.agent);
  if (c.previous.agent == agent)
    who = "lane " + std::to_string(c.previous.lane) + " of the same warp";
  fail_conflict(warp, i, lane, c, touch, bytes, where, who);
}

void touch_shared(Warp& warp, const Instruction& i, int lane, Block& block, uint32_t offset,
                  uint32_t bytes, Touch touch, const uint8_t* value) {
  if (offset < block.mbarrier_end && offset + bytes > block.mbarrier_begin)
    for (uint32_t at = offset & ~7u; at < offset + bytes; at += 8)
      if (block.mbarriers.count(at))
        warp.fail(i, lane,
                  std::string(verb(touch)) + " the mbarrier at byte " +
                      std::to_string(at - SHARED_BASE) + " of shared memory by an ordinary access");
  Clock clock = block.cluster->agents.now(warp.agent);
  touch_shared(warp, i, lane, block, offset, bytes, touch, warp.agent, clock, Proxy::GENERIC,
               warp.view(), value);
}

void touch_global(Warp& warp, const Instruction& i, int lane, uint64_t address, uint32_t bytes,
                  Touch touch, int agent, Clock clock, Proxy proxy, const View& view,
                  const uint8_t* value) {
  Grid& grid = *warp.grid;
  uint32_t cluster = warp.block->cluster->number;
  Access access{static_cast<uint16_t>(agent), proxy, shadow_lane(lane), clock, i.statement};
  Conflict c = touch == Touch::READ    ? grid.order.read(address, bytes, cluster, access, view)
               : touch == Touch::WRITE ? grid.order.write(address, bytes, cluster, access, view)
                                       : grid.order.atomic(address, bytes, cluster, access, view);
  if (!c.found || is_same_store(c, reinterpret_cast<uint8_t*>(address), bytes, value)) return;
  uint32_t other = grid.order.previous_cluster(c);
  bool clusters = warp.block->cluster->blocks.size() > 1;
  std::string who = other != cluster
                        ? (clusters ? "cluster " : "block ") + std::to_string(other)
                        : warp.block->cluster->agent_name(c.previous.agent) + " of the same block";
  fail_conflict(warp, i, lane, c, touch, bytes, grid.describe(c.address), who);
}

void touch_global(Warp& warp, const Instruction& i, int lane, uint64_t address, uint32_t bytes,
                  Touch touch, const uint8_t* value) {
  Clock clock = warp.block->cluster->agents.now(warp.agent);
  touch_global(warp, i, lane, address, bytes, touch, warp.agent, clock, Proxy::GENERIC, warp.view(),
               value);
}

uint64_t address_of(Warp& warp, const Instruction& i, const MemoryAccess& m, int lane) {
  return (m.address_bits == 64 ? warp.u64(i.a)[lane] : warp.u32(i.a)[lane]) + i.immediate;
}

// Distinct sectors of global memory, or passes over the banks of shared memory.
void count_access(Warp& warp, const Instruction& i, const MemoryAccess& m, uint32_t mask) {
  if (!warp.grid->profile) return;
  uint32_t bytes = m.bytes();
  std::vector<uint64_t> addresses;
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    addresses.push_back(address_of(warp, i, m, first_lane(rest)));
  Space space = m.space == Space::GENERIC ? resolve(addresses[0]) : m.space;
  if (space == Space::GLOBAL) warp.grid->profile->count_global(i, addresses, bytes);
  if (space == Space::SHARED) warp.grid->profile->count_shared(i, addresses, bytes);
}

namespace {

void touch(Warp& warp, const Instruction& i, int lane, const Target& target, uint32_t bytes,
           Touch kind, const uint8_t* value = nullptr) {
  if (target.space == Space::SHARED)
    touch_shared(warp, i, lane, *target.block, target.offset, bytes, kind, value);
  else if (target.space == Space::GLOBAL)
    touch_global(warp, i, lane, reinterpret_cast<uint64_t>(target.data), bytes, kind, value);
}

// After a load at an address that other blocks may have released.
void after_read(Warp& warp, const MemoryAccess& m, uint64_t address) {
  if (m.acquire)
    warp.grid->order.acquire(address, warp.block->cluster->number, warp.view());
  else if (m.relaxed)
    warp.relaxed_reads.insert(address);
}

// Before a store or a read-modify-write at an address that other blocks may acquire.
void before_write(Warp& warp, const MemoryAccess& m, uint64_t address, bool keeps) {
  GlobalOrder& order = warp.grid->order;
  uint32_t cluster = warp.block->cluster->number;
  if (!keeps) order.store_relaxed(address);
  if (m.release)
    order.release(address, cluster, warp.publish());
  else if (warp.has_fenced)
    order.release(address, cluster, warp.fenced);
}

void write_register(Warp& warp, int slot, int lane, const MemoryAccess& m, const uint8_t* data) {
  uint64_t value = 0;
  std::memcpy(&value, data, m.element_bytes);
  if (m.sign_extend) {
    int shift = 64 - 8 * m.element_bytes;
    value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
  }
  if (m.register_bits == 64)
    warp.u64(slot)[lane] = value;
  else
    warp.u32(slot)[lane] = m.register_bits == 16 ? value & 0xffff : static_cast<uint32_t>(value);
}

uint64_t read_register(Warp& warp, int slot, int lane, const MemoryAccess& m) {
  return m.register_bits == 64 ? warp.u64(slot)[lane] : warp.u32(slot)[lane];
}

Status load(Warp& warp, const Instruction& i, uint32_t mask) {
  const MemoryAccess& m = memory_access(i);
  uint32_t bytes = m.bytes();
  count_access(warp, i, m, mask);
  Touch kind = m.relaxed || m.acquire ? Touch::ATOMIC : Touch::READ;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint64_t address = address_of(warp, i, m, lane);
    Target target = translate(warp, i, lane, address, bytes, m.space, "loads");
    touch(warp, i, lane, target, bytes, kind);
    for (int e = 0; e < m.count; e++)
      if (i.list[e] >= 0)
        write_register(warp, i.list[e], lane, m, target.data + e * m.element_bytes);
    if (kind == Touch::ATOMIC) after_read(warp, m, reinterpret_cast<uint64_t>(target.data));
  }
  return Status::NEXT;
}

Status store(Warp& warp, const Instruction& i, uint32_t mask) {
  const MemoryAccess& m = memory_access(i);
  uint32_t bytes = m.bytes();
  count_access(warp, i, m, mask);
  bool strong = m.relaxed || m.release;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint64_t address = address_of(warp, i, m, lane);
    Target target = translate(warp, i, lane, address, bytes, m.space, "stores");
    if (target.space == Space::PARAM) warp.fail(i, lane, "stores to a kernel parameter");
    uint8_t value[64];
    for (int e = 0; e < m.count; e++) {
      uint64_t element = read_register(warp, i.list[e], lane, m);
      std::memcpy(value + e * m.element_bytes, &element, m.element_bytes);
    }
    touch(warp, i, lane, target, bytes, strong ? Touch::ATOMIC : Touch::WRITE, value);
    if (strong) before_write(warp, m, reinterpret_cast<uint64_t>(target.data), false);
    std::memcpy(target.data, value, bytes);
  }
  if (strong) warp.grid->progress();
  return Status::NEXT;
}

template <class T>
T combine(Atomic operation, T old, T value) {
  switch (operation) {
    case Atomic::ADD:
      return old + value;
    case Atomic::MIN:
      return value < old ? value : old;
    case Atomic::MAX:
      return old < value ? value : old;
    case Atomic::INC:
      return old >= value ? T(0) : T(old + 1);
    case Atomic::DEC:
      return old == T(0) || value < old ? value : T(old - 1);
    default:
      return value;
  }
}

uint64_t logic(Atomic operation, uint64_t old, uint64_t value) {
  switch (operation) {
    case Atomic::AND:
      return old & value;
    case Atomic::OR:
      return old | value;
    case Atomic::XOR:
      return old ^ value;
    default:
      return value;
  }
}

template <class T>
uint64_t combine_bits(Atomic operation, uint64_t old, uint64_t value) {
  T a, b;
  std::memcpy(&a, &old, sizeof(T));
  std::memcpy(&b, &value, sizeof(T));
  T result = combine(operation, a, b);
  uint64_t bits = 0;
  std::memcpy(&bits, &result, sizeof(T));
  return bits;
}

uint64_t update(const MemoryAccess& m, uint64_t old, uint64_t value, uint64_t other) {
  if (m.atomic == Atomic::CAS) return old == value ? other : old;
  if (m.atomic == Atomic::EXCH || m.atomic >= Atomic::AND) return logic(m.atomic, old, value);
  switch (m.number) {
    case Number::F32:
      return combine_bits<float>(m.atomic, old, value);
    case Number::F64:
      return combine_bits<double>(m.atomic, old, value);
    case Number::SIGNED:
      return m.element_bytes == 8 ? combine_bits<int64_t>(m.atomic, old, value)
                                  : combine_bits<int32_t>(m.atomic, old, value);
    default:
      return m.element_bytes == 8 ? combine<uint64_t>(m.atomic, old, value)
                                  : combine<uint32_t>(m.atomic, old, value);
  }
}

Status atomic(Warp& warp, const Instruction& i, uint32_t mask) {
  const MemoryAccess& m = memory_access(i);
  uint32_t bytes = m.bytes();
  count_access(warp, i, m, mask);
  // The order of the lanes is not defined: start at a random one.
  int first = static_cast<int>(warp.grid->random() % LANES);
  for (int k = 0; k < LANES; k++) {
    int lane = (first + k) % LANES;
    if (!(mask >> lane & 1)) continue;
    uint64_t address = address_of(warp, i, m, lane);
    Target target = translate(warp, i, lane, address, bytes, m.space, "updates");
    touch(warp, i, lane, target, bytes, Touch::ATOMIC);
    uint64_t place = reinterpret_cast<uint64_t>(target.data);
    before_write(warp, m, place, true);
    uint64_t old = 0;
    std::memcpy(&old, target.data, bytes);
    uint64_t value = read_register(warp, i.b, lane, m);
    uint64_t other = i.c >= 0 ? read_register(warp, i.c, lane, m) : 0;
    uint64_t result = update(m, old, value, other);
    std::memcpy(target.data, &result, bytes);
    if (i.d >= 0) write_register(warp, i.d, lane, m, reinterpret_cast<uint8_t*>(&old));
    after_read(warp, m, place);
    if (result != old) warp.grid->progress();
  }
  return Status::NEXT;
}

Status fence(Warp& warp, const Instruction&, uint32_t) {
  for (uint64_t address : warp.relaxed_reads)
    warp.grid->order.acquire(address, warp.block->cluster->number, warp.view());
  warp.relaxed_reads.clear();
  warp.fenced = warp.publish();
  warp.has_fenced = true;
  return Status::NEXT;
}

Status fence_proxy(Warp& warp, const Instruction&, uint32_t) {
  warp.publish().fence_proxy();
  return Status::NEXT;
}

// mbarrier.init becomes visible to the cluster and to the async proxy; see Mbarrier.
Status no_effect(Warp&, const Instruction&, uint32_t) { return Status::NEXT; }

bool bind_fence(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::BARRIER;
  if (b.has("tensormap::generic")) return bind_tensor_map(b);
  if (b.has("proxy")) {
    if (!b.has("async") && !b.has("async::generic") &&
        b.statement.text().find("proxy.async") == std::string::npos)
      b.fail("only fence.proxy.async is supported");
    i.run = fence_proxy;
  } else if (b.has("mbarrier_init")) {
    i.run = no_effect;
  } else {
    i.run = fence;
    b.kernel().communicates = true;
  }
  return true;
}

}  // namespace

bool bind_memory(Binder& b) {
  Instruction& i = b.instruction;
  const std::string& name = b.statement.opcode[0];
  if (name == "tensormap") return bind_tensor_map(b);
  if (name == "fence" || name == "membar") return bind_fence(b);
  if (name == "ld" || name == "ldu") {
    bind_access(b, 1, 0);
    i.run = load;
  } else if (name == "st") {
    bind_access(b, 0, 1);
    i.run = store;
  } else if (name == "atom" || name == "red") {
    bind_atomic(b);
    i.run = atomic;
  } else {
    return false;
  }
  return true;
}

}  // namespace deepkern::ptx
