// Copies that complete on their own: groups, and cp.async. bulk_copy.cpp has the bulk copies.
//
// A copy is checked where it is issued, with the view of the warp that issues it, and its accesses
// belong to an agent of their own until a wait makes them part of a view. The data move when the
// scheduler says so, between the issue and the wait.
// Source: PTX ISA 9.0, sections 9.7.9.25 (asynchronous copy) and 5.5 (tensors and swizzling).
#include "async.h"

#include <algorithm>

#include "profile.h"

namespace deepkern::ptx {

int agent_of(Warp& warp, int& agent, const char* what) {
  if (agent < 0)
    agent = warp.block->cluster->add_agent(std::string(what) + " of warp " +
                                           std::to_string(warp.index));
  return agent;
}

void see(Warp& warp, int agent, Clock clock) {
  if (agent < 0) return;
  std::vector<Clock>& clocks = warp.view().generic;
  if (clocks.size() <= size_t(agent)) clocks.resize(agent + 1);
  clocks[agent] = std::max(clocks[agent], clock);
}

void commit_group(Groups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
  groups.count++;
}

void wait_groups(Warp& warp, Groups& groups, size_t left) {
  while (groups.committed.size() > left) {
    for (auto& work : groups.committed.front()) warp.grid->finish(*work);
    groups.committed.pop_front();
  }
  if (groups.count >= left) see(warp, groups.agent, groups.count - static_cast<Clock>(left));
}

namespace {

// cp.async: a: shared address, b: global address, c: bytes that are read, -1 for all.
Status copy(Warp& warp, const Instruction& i, uint32_t mask) {
  Grid& grid = *warp.grid;
  Block& block = *warp.block;
  int agent = agent_of(warp, warp.copies.agent, "a cp.async");
  uint32_t bytes = i.mode;
  std::vector<std::pair<uint8_t*, std::pair<const uint8_t*, uint32_t>>> moves;
  std::vector<uint64_t> sources;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint32_t read = i.c >= 0 ? warp.u32(i.c)[lane] : bytes;
    if (read > bytes)
      warp.fail(i, lane,
                "copies " + std::to_string(read) + " of " + std::to_string(bytes) + " bytes");
    uint64_t to = warp.u32(i.a)[lane] + i.immediate,
             from = warp.u64(i.b)[lane] + i.second_immediate;
    Target target = translate(warp, i, lane, to, bytes, Space::SHARED, "copies to");
    const uint8_t* data = nullptr;
    if (read > 0) {
      if (from % bytes)
        warp.fail(i, lane,
                  "copies " + std::to_string(bytes) + " bytes from a misaligned address " +
                      hexadecimal(from));
      data = translate(warp, i, lane, from, 1, Space::GLOBAL, "copies from").data;
      translate(warp, i, lane, from + read - 1, 1, Space::GLOBAL, "copies from");
      touch_global(warp, i, lane, from, read, Touch::READ, agent, warp.copies.clock(),
                   Proxy::GENERIC, warp.view());
      sources.push_back(from);
    }
    touch_shared(warp, i, -1, block, target.offset, bytes, Touch::WRITE, agent, warp.copies.clock(),
                 Proxy::GENERIC, warp.view());
    moves.push_back({target.data, {data, read}});
  }
  if (grid.profile && !sources.empty()) grid.profile->count_global(i, sources, bytes);
  auto work = grid.start("cp.async", [moves, bytes] {
    for (auto& [to, from] : moves) {
      std::memset(to, 0, bytes);
      if (from.second) std::memcpy(to, from.first, from.second);
    }
  });
  warp.copies.open.push_back(work);
  return Status::NEXT;
}

Status commit_copies(Warp& warp, const Instruction&, uint32_t) {
  agent_of(warp, warp.copies.agent, "a cp.async");
  commit_group(warp.copies);
  return Status::NEXT;
}

Status wait_copies(Warp& warp, const Instruction& i, uint32_t) {
  if (warp.copies_arrive)
    warp.fail(i, -1,
              "waits for cp.async groups of which some arrive at an mbarrier: not supported");
  if (i.mode) commit_copies(warp, i, 0);  // wait_all
  wait_groups(warp, warp.copies, i.immediate);
  return Status::NEXT;
}

Status map_rank(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint32_t rank = warp.u32(i.b)[lane];
    if (rank >= warp.block->cluster->blocks.size())
      warp.fail(i, lane,
                "mapa to block " + std::to_string(rank) + " of a cluster of " +
                    std::to_string(warp.block->cluster->blocks.size()));
    uint32_t offset = (i.mode ? static_cast<uint32_t>(warp.u64(i.a)[lane]) : warp.u32(i.a)[lane]) &
                      ((1u << RANK_SHIFT) - 1);
    uint32_t address = rank << RANK_SHIFT | offset;
    if (i.mode)
      warp.u64(i.d)[lane] = GENERIC_SHARED_BASE + address;
    else
      warp.u32(i.d)[lane] = address;
  }
  return Status::NEXT;
}

void bind_copy(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::ASYNC_COPY;
  if (b.has("mbarrier")) {
    if (b.statement.text() != "cp.async.mbarrier.arrive.noinc.shared::cta.b64")
      b.fail("unknown modifier");
    i.run = arrive_after_copies;
    i.a = b.address(0, 32, i.immediate);
  } else if (b.has("commit_group")) {
    i.run = commit_copies;
  } else if (b.has("wait_group") || b.has("wait_all")) {
    i.run = wait_copies;
    i.mode = b.has("wait_all");
    i.immediate = i.mode ? 0 : b.immediate(0);
  } else if ((b.has("ca") || b.has("cg")) && b.has("global")) {
    i.run = copy;
    i.b = b.address(1, 64, i.second_immediate);
    i.a = b.address(0, 32, i.immediate);
    i.mode = static_cast<uint32_t>(b.immediate(2));
    if (i.mode != 4 && i.mode != 8 && i.mode != 16) b.fail("expected 4, 8 or 16 bytes");
    if (b.has("cg") && i.mode != 16) b.fail(".cg copies 16 bytes");
    if (b.count() > 3) i.c = b.source(3, 32);
  } else {
    b.fail("unknown modifier");
  }
}

}  // namespace

bool bind_async(Binder& b) {
  const auto& op = b.statement.opcode;
  Instruction& i = b.instruction;
  if (op[0] == "mbarrier") return bind_mbarrier(b);
  if (op[0] == "mapa") {
    i.mode = b.has("u64");
    if (b.statement.text() != (i.mode ? "mapa.u64" : "mapa.shared::cluster.u32"))
      b.fail("unknown modifier");
    int bits = i.mode ? 64 : 32;
    i.d = b.destination(0, bits);
    i.a = b.source(1, bits);
    i.b = b.source(2, 32);
    i.run = map_rank;
    i.kind = Class::MOVE;
    return true;
  }
  if (op[0] != "cp") return false;
  if (b.has("bulk"))
    bind_bulk(b);
  else
    bind_copy(b);
  return true;
}

}  // namespace deepkern::ptx
