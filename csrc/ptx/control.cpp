// Instructions that decide which lanes and warps go on: branches, exits, barriers.
// Source: PTX ISA 9.0, sections 9.7.12 (control flow) and 9.7.13 (synchronization).
#include <algorithm>

#include "machine.h"

namespace deepkern::ptx {

namespace {

Status branch(Warp& warp, const Instruction& i, uint32_t mask) {
  Path& path = warp.paths.back();
  uint32_t rest = path.mask & ~mask;
  if (rest == 0) {
    path.pc = i.target;
    return Status::JUMPED;
  }
  if (i.mode) warp.fail(i, first_lane(rest), "bra.uni is not taken by every active lane");
  int32_t next = path.pc + 1;
  if (i.reconverge < 0) {
    warp.paths.pop_back();
  } else {
    path.pc = i.reconverge;
  }
  Path taken{i.target, i.reconverge, mask}, other{next, i.reconverge, rest};
  // Either order is allowed; the hardware's choice is not documented.
  if (warp.grid->random() & 1) std::swap(taken, other);
  warp.paths.push_back(taken);
  warp.paths.push_back(other);
  return Status::JUMPED;
}

Status exit_lanes(Warp& warp, const Instruction&, uint32_t mask) {
  warp.live &= ~mask;
  bool whole = warp.paths.back().mask == mask;
  for (Path& path : warp.paths) path.mask &= ~mask;
  if (whole) {
    warp.paths.pop_back();
    if (warp.paths.empty()) warp.live = 0;
    return Status::JUMPED;
  }
  return Status::NEXT;
}

Status trap(Warp& warp, const Instruction& i, uint32_t mask) {
  warp.fail(i, first_lane(mask), "trap");
}

Status nothing(Warp&, const Instruction&, uint32_t) { return Status::NEXT; }

void check_converged(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask == warp.live) return;
  warp.fail(i, first_lane(warp.live & ~mask),
            "lanes " + hexadecimal(warp.live & ~mask) +
                " of the warp do not reach this aligned "
                "instruction together with lanes " +
                hexadecimal(mask));
}

// A barrier is complete: whoever arrived goes on.
void release(Warp& warp, Barrier& barrier) {
  barrier.released = barrier.view;
  barrier.view = View();
  barrier.arrived = barrier.expected = 0;
  barrier.generation++;
  warp.block->cluster->wake();
  warp.grid->progress();
}

// Threads of the block that have not exited, without those of a warp that waits.
int threads_that_can_arrive(const Block& block) {
  int lanes = -LANES;
  for (const Warp& warp : block.warps) lanes += warp.live ? LANES : 0;
  return lanes;
}

// d: the barrier's number, a: the number of threads or -1.
int prepare_barrier(Warp& warp, const Instruction& i, uint32_t mask) {
  check_converged(warp, i, mask);
  int lane = first_lane(mask);
  uint32_t number = warp.u32(i.d)[lane];
  if (number >= 16) warp.fail(i, lane, "barrier " + std::to_string(number) + ", expected 0 to 15");
  return static_cast<int>(number);
}

void arrive_at(Warp& warp, const Instruction& i, uint32_t mask, Barrier& barrier, int number) {
  int all = static_cast<int>(warp.block->warps.size()) * LANES;
  int expected = i.a >= 0 ? static_cast<int>(warp.u32(i.a)[first_lane(mask)]) : all;
  if (expected % LANES || expected <= 0 || expected > all)
    warp.fail(i, -1,
              "barrier " + std::to_string(number) + " for " + std::to_string(expected) +
                  " threads, expected a multiple of 32 up to " + std::to_string(all));
  if (barrier.expected && barrier.expected != expected)
    warp.fail(i, -1,
              "barrier " + std::to_string(number) + " is used for " +
                  std::to_string(barrier.expected) + " and for " + std::to_string(expected) +
                  " threads at once");
  barrier.expected = expected;
  barrier.arrived += LANES;
  barrier.view.join(warp.publish());
  warp.epoch++;
}

Status bar_sync(Warp& warp, const Instruction& i, uint32_t mask) {
  int number = prepare_barrier(warp, i, mask);
  Barrier& barrier = warp.block->barriers[number];
  if (warp.ticket < 0) {
    arrive_at(warp, i, mask, barrier, number);
    warp.ticket = barrier.generation;
    if (barrier.arrived >= barrier.expected) release(warp, barrier);
  }
  if (warp.ticket == barrier.generation) {
    std::string text = "barrier " + std::to_string(number) + ", which " +
                       std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
                       " threads reached";
    if (threads_that_can_arrive(*warp.block) < barrier.expected - barrier.arrived)
      warp.fail(i, -1, "waits for " + text + "; the other threads have exited");
    return warp.wait(text);
  }
  warp.ticket = -1;
  warp.view().join(barrier.released);
  return Status::NEXT;
}

Status bar_arrive(Warp& warp, const Instruction& i, uint32_t mask) {
  int number = prepare_barrier(warp, i, mask);
  Barrier& barrier = warp.block->barriers[number];
  arrive_at(warp, i, mask, barrier, number);
  if (barrier.arrived >= barrier.expected) release(warp, barrier);
  return Status::NEXT;
}

Status bar_warp_sync(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t members = warp.u32(i.a)[first_lane(mask)];
  if ((members & warp.live) != mask)
    warp.fail(i, first_lane(mask),
              "bar.warp.sync with member mask " + hexadecimal(members) + " is executed by lanes " +
                  hexadecimal(mask));
  warp.epoch++;
  return Status::NEXT;
}

Status cluster_arrive(Warp& warp, const Instruction& i, uint32_t mask) {
  if (i.mode & 1) check_converged(warp, i, mask);
  Cluster& cluster = *warp.block->cluster;
  if (warp.cluster_ticket >= 0)
    warp.fail(i, -1, "arrives twice at the cluster barrier without a wait");
  warp.cluster_ticket = cluster.barrier.generation;
  if (!(i.mode & 2)) cluster.barrier.view.join(warp.publish());
  warp.epoch++;
  if (++cluster.barrier.arrived >= cluster.live_warps) release(warp, cluster.barrier);
  return Status::NEXT;
}

Status cluster_wait(Warp& warp, const Instruction& i, uint32_t mask) {
  if (i.mode & 1) check_converged(warp, i, mask);
  Cluster& cluster = *warp.block->cluster;
  if (warp.cluster_ticket < 0) warp.fail(i, -1, "waits at the cluster barrier without an arrival");
  if (warp.cluster_ticket == cluster.barrier.generation) {
    if (cluster.barrier.arrived >= cluster.live_warps) {
      release(warp, cluster.barrier);  // the missing warps have exited
    } else {
      return warp.wait("the cluster barrier, which " + std::to_string(cluster.barrier.arrived) +
                       " of " + std::to_string(cluster.live_warps) + " warps reached");
    }
  }
  warp.cluster_ticket = -1;
  warp.view().join(cluster.barrier.released);
  return Status::NEXT;
}

void bind_barrier(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::BARRIER;
  const std::vector<std::string>& op = b.statement.opcode;
  if (op[1] == "cluster") {
    i.run = b.has("arrive") ? cluster_arrive : b.has("wait") ? cluster_wait : nullptr;
    i.mode = (b.has("aligned") ? 1 : 0) | (b.has("relaxed") ? 2 : 0);
  } else if (op[1] == "warp") {
    i.run = bar_warp_sync;
    i.a = b.source(0, 32);
  } else {
    size_t k = op[1] == "cta" ? 2 : 1;
    i.run = op[k] == "sync" ? bar_sync : op[k] == "arrive" ? bar_arrive : nullptr;
    if (op[k] == "red") b.fail("barrier reductions are not supported");
    i.d = b.source(0, 32);
    if (b.count() > 1) i.a = b.source(1, 32);
  }
  if (!i.run) b.fail("unknown modifier");
}

void bind_branch(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::BRANCH;
  i.run = branch;
  i.mode = b.has("uni");
  auto found = b.kernel().labels.find(b.statement.operands.at(0).name);
  if (found == b.kernel().labels.end()) b.fail("unknown label");
  i.target = found->second;
}

}  // namespace

bool bind_control(Binder& b) {
  Instruction& i = b.instruction;
  const std::string& name = b.statement.opcode[0];
  if (name == "bra") {
    bind_branch(b);
  } else if (name == "ret" || name == "exit") {
    i.run = exit_lanes;
    i.kind = Class::BRANCH;
  } else if (name == "trap") {
    i.run = trap;
  } else if (name == "bar" || name == "barrier") {
    bind_barrier(b);
  } else if (name == "griddepcontrol") {
    i.run = nothing;  // grids run one after another
  } else if (name == "setmaxnreg") {
    i.run = nothing;
    int64_t registers = b.immediate(0);
    if (registers < 24 || registers > 256 || registers % 8)
      b.fail("setmaxnreg " + std::to_string(registers) + ", expected a multiple of 8, 24 to 256");
  } else if (name == "nanosleep" || name == "pmevent" || name == "prefetch" ||
             name == "prefetchu" || name == "applypriority" || name == "discard") {
    i.run = nothing;
  } else {
    return false;
  }
  return true;
}

}  // namespace deepkern::ptx
