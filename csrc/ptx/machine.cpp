// Runs a grid: admits clusters, chooses warps, executes instructions, completes asynchronous work.
//
// One thread runs the whole grid, so that a run is repeatable: the seed decides which warp runs
// next and for how long, and when copies and MMAs complete. Lanes that diverge at a branch meet
// again at its immediate post-dominator.
// Source: PTX ISA 9.0, section 3 (programming model); Fung et al., Dynamic Warp Formation and
// Scheduling for Efficient GPU Control Flow, 2007 (stack of masks with post-dominators).
#include "machine.h"

#include <algorithm>

#include "profile.h"

namespace deepkern::ptx {

std::string hexadecimal(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

View& Warp::view() { return block->cluster->views[agent]; }

View& Warp::publish() {
  View& v = view();
  Agents& agents = block->cluster->agents;
  if (v.generic.size() <= size_t(agent)) v.generic.resize(agent + 1);
  v.generic[agent] = agents.now(agent);
  agents.tick(agent);
  return v;
}

Status Warp::wait(std::string what) {
  blocked = true;
  waits_for = std::move(what);
  return Status::BLOCKED;
}

void Warp::fail(const Instruction& instruction, int lane, const std::string& message) {
  const Statement& s = kernel->statements[instruction.statement];
  std::string text = kernel->name + ": " + message;
  std::string place = s.location >= 0 ? kernel->locations[s.location].text : "no source line";
  text += "\n  at " + place + " (PTX line " + std::to_string(s.line) + ": " + s.text() + ")";
  text += "\n  block (" + std::to_string(block->id[0]) + ", " + std::to_string(block->id[1]) +
          ", " + std::to_string(block->id[2]) + "), warp " + std::to_string(index);
  if (lane >= 0) text += ", lane " + std::to_string(lane);
  text += ", seed " + std::to_string(grid->options.seed);
  throw Failure(text);
}

int Cluster::add_agent(std::string name) {
  int agent = agents.add(std::move(name));
  agents.tick(agent);
  views.emplace_back();
  return agent;
}

void Cluster::wake() {
  for (auto& block : blocks)
    for (Warp& warp : block->warps)
      if (warp.blocked) warp.blocked = false, grid->stale_ = true;
}

Grid::Grid(const Kernel& kernel, Module& module, const LaunchConfig& config, void* const* values,
           const std::vector<Allocation>& memory, const Options& options, Profile* profile)
    : kernel(kernel),
      module(module),
      config(config),
      options(options),
      profile(profile),
      parameters(kernel.parameter_bytes),
      allocations(memory),
      order(options.check_races, kernel.communicates),
      random(options.seed) {
  for (size_t i = 0; i < kernel.parameters.size(); i++) {
    const Parameter& p = kernel.parameters[i];
    std::memcpy(parameters.data() + p.offset, values[i], p.bytes);
  }
  for (auto& [name, content] : module.globals)
    allocations.push_back(
        {reinterpret_cast<uint64_t>(content.data()), content.size(), "module variable " + name});
  std::sort(allocations.begin(), allocations.end(),
            [](const Allocation& a, const Allocation& b) { return a.address < b.address; });
  for (const Allocation& a : allocations) {
    order.add_memory(a.address, a.bytes);
    uint64_t end = a.address + a.bytes;
    last_byte.push_back(last_byte.empty() ? end : std::max(last_byte.back(), end));
  }
  uint32_t per_cluster = config.cluster[0] * config.cluster[1] * config.cluster[2];
  clusters = config.grid[0] * config.grid[1] * config.grid[2] / per_cluster;
}

bool Grid::contains(uint64_t address, uint64_t bytes) {
  auto inside = [&](const Allocation& a) {
    return address >= a.address && address + bytes <= a.address + a.bytes;
  };
  if (last_found < allocations.size() && inside(allocations[last_found])) return true;
  auto after = std::upper_bound(allocations.begin(), allocations.end(), address,
                                [](uint64_t v, const Allocation& a) { return v < a.address; });
  for (size_t i = after - allocations.begin(); i-- > 0 && last_byte[i] >= address + bytes;)
    if (inside(allocations[i])) return last_found = i, true;
  return false;
}

std::string Grid::describe(uint64_t address) const {
  const Allocation* nearest = nullptr;
  uint64_t least = UINT64_MAX;
  for (const Allocation& a : allocations) {
    uint64_t distance = address < a.address              ? a.address - address
                        : address >= a.address + a.bytes ? address - (a.address + a.bytes) + 1
                                                         : 0;
    if (distance < least) least = distance, nearest = &a;
  }
  std::string text = hexadecimal(address);
  if (!nearest) return text + " (no tensor was passed)";
  if (least == 0)
    return text + " (" + nearest->name + ", byte " + std::to_string(address - nearest->address) +
           ")";
  if (least > (1u << 20)) return text + " (far from every tensor; null pointer or wild address)";
  if (address < nearest->address)
    return text + " (" + std::to_string(least) + " bytes before " + nearest->name + ")";
  std::string behind = least == 1 ? "right" : std::to_string(least - 1) + " bytes";
  return text + " (" + behind + " past the end of " + nearest->name + ")";
}

PendingPointer Grid::start(std::string what, std::function<void()> complete) {
  auto work = std::make_shared<Pending>();
  work->complete = std::move(complete);
  work->what = std::move(what);
  if (options.order == Options::EARLIEST) {
    finish(*work);
    return work;
  }
  bool late = options.order == Options::LATEST || random() % 4 == 0;
  work->due = late ? UINT64_MAX : turn + random() % 64;
  pending.push_back(work);
  return work;
}

void Grid::finish(Pending& work) {
  if (work.done) return;
  work.done = true;
  work.complete();
  progress();
}

void Grid::complete_due() {
  if (pending.empty()) return;
  std::vector<PendingPointer> due;
  for (auto& work : pending)
    if (!work->done && work->due <= turn) due.push_back(work);
  for (auto& work : due) finish(*work);
  pending.erase(std::remove_if(pending.begin(), pending.end(), [](auto& w) { return w->done; }),
                pending.end());
}

bool Grid::complete_one() {
  pending.erase(std::remove_if(pending.begin(), pending.end(), [](auto& w) { return w->done; }),
                pending.end());
  if (pending.empty()) return false;
  PendingPointer work = pending[random() % pending.size()];
  finish(*work);
  return true;
}

namespace {

uint64_t special_value(const Grid& grid, const Warp& warp, const std::string& name, int lane) {
  const Block& block = *warp.block;
  const LaunchConfig& config = grid.config;
  uint32_t thread = warp.index * LANES + lane;
  uint32_t x = config.block[0], y = config.block[1];
  const uint32_t tid[3] = {thread % x, thread / x % y, thread / x / y};
  char axis = name.back();
  int i = axis - 'x';
  std::string stem = name.substr(0, name.size() - 2);
  if (name.rfind("shared+", 0) == 0)
    return (uint64_t(block.rank) << RANK_SHIFT) + SHARED_BASE + std::stoull(name.substr(7));
  if (name == "%laneid") return lane;
  if (name == "%warpid") return warp.index;
  if (name == "%nwarpid") return block.warps.size();
  if (name == "%cluster_ctarank") return block.rank;
  if (name == "%cluster_nctarank") return block.cluster->blocks.size();
  if (name == "%smid") return block.cluster->number % 132;
  if (name == "%nsmid") return 132;
  if (name == "%dynamic_smem_size") return config.dynamic_shared_bytes;
  if (name == "%total_smem_size") return block.shared.size() - SHARED_BASE;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  if (i >= 0 && i < 3) {
    if (stem == "%tid") return tid[i];
    if (stem == "%ntid") return config.block[i];
    if (stem == "%ctaid") return block.id[i];
    if (stem == "%nctaid") return config.grid[i];
    if (stem == "%clusterid") return block.id[i] / config.cluster[i];
    if (stem == "%nclusterid") return config.grid[i] / config.cluster[i];
    if (stem == "%cluster_ctaid") return block.id[i] % config.cluster[i];
    if (stem == "%cluster_nctaid") return config.cluster[i];
  }
  throw InvalidProgram(grid.kernel.name + ": unknown special register " + name);
}

}  // namespace

void Grid::start_warp(Warp& warp, int index) {
  warp.grid = this;
  warp.kernel = &kernel;
  warp.index = index;
  Cluster& cluster = *warp.block->cluster;
  std::string name = "warp " + std::to_string(index);
  if (cluster.blocks.size() > 1) name += " of block " + std::to_string(warp.block->rank);
  warp.agent = cluster.add_agent(name);
  int threads = static_cast<int>(threads_per_block()) - index * LANES;
  warp.live = threads >= LANES ? ~0u : (1u << threads) - 1;
  warp.paths.push_back({0, -1, warp.live});
  // Registers without a value hold a pattern that is a NaN as a float and no valid address.
  warp.registers.assign(size_t(kernel.slots) * LANES, 0xffbadbad);
  warp.predicates.assign(kernel.predicates, 0);
  warp.predicates[1] = ~0u;
  warp.in_flight.assign(kernel.slots, 0);
  if (kernel.has_wgmma) warp.written.assign(kernel.slots, {});
  warp.local.assign(size_t(kernel.local_bytes) * LANES, 0xff);
  for (const Constant& c : kernel.constants)
    for (int lane = 0; lane < LANES; lane++) {
      if (c.bits == 64)
        warp.u64(c.slot)[lane] = c.value;
      else
        warp.u32(c.slot)[lane] = static_cast<uint32_t>(c.value);
    }
  for (const SpecialUse& use : kernel.specials)
    for (int lane = 0; lane < LANES; lane++) {
      uint64_t value = special_value(*this, warp, use.name, lane);
      if (use.bits == 64)
        warp.u64(use.slot)[lane] = value;
      else
        warp.u32(use.slot)[lane] = static_cast<uint32_t>(value);
    }
}

// Starts the next cluster of the grid.
void Grid::admit() {
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = this;
  cluster->number = next_cluster;
  next_cluster += profile ? profile->every : 1;
  const uint32_t* c = config.cluster;
  uint32_t across[2] = {config.grid[0] / c[0], config.grid[1] / c[1]};
  uint32_t n = cluster->number;
  uint32_t first[3] = {n % across[0] * c[0], n / across[0] % across[1] * c[1],
                       n / across[0] / across[1] * c[2]};
  uint32_t shared_bytes = SHARED_BASE + kernel.dynamic_shared_offset + config.dynamic_shared_bytes;
  uint32_t warps = (threads_per_block() + LANES - 1) / LANES;
  for (uint32_t rank = 0; rank < c[0] * c[1] * c[2]; rank++) {
    auto block = std::make_unique<Block>(shared_bytes, options);
    block->grid = this;
    block->cluster = cluster.get();
    block->rank = rank;
    block->id[0] = first[0] + rank % c[0];
    block->id[1] = first[1] + rank / c[0] % c[1];
    block->id[2] = first[2] + rank / c[0] / c[1];
    block->number = block->id[0] + config.grid[0] * (block->id[1] + config.grid[1] * block->id[2]);
    std::fill(block->shared.begin(), block->shared.end(), 0xff);
    block->live_warps = static_cast<int>(warps);
    cluster->live_warps += static_cast<int>(warps);
    block->warps.resize(warps);
    cluster->blocks.push_back(std::move(block));
  }
  for (auto& block : cluster->blocks)
    for (uint32_t w = 0; w < warps; w++) {
      block->warps[w].block = block.get();
      start_warp(block->warps[w], static_cast<int>(w));
    }
  resident.push_back(std::move(cluster));
  stale_ = true;
  progress();
}

// The warp that runs next, or null if all are blocked. LATEST favours the youngest warps and
// EARLIEST the oldest, so that both orders of any two warps occur.
Warp* Grid::choose() {
  if (stale_) {
    runnable_.clear();
    for (auto& cluster : resident)
      for (auto& block : cluster->blocks)
        for (Warp& warp : block->warps)
          if (warp.live && !warp.blocked) runnable_.push_back(&warp);
    stale_ = false;
  }
  if (runnable_.empty()) return nullptr;
  bool extreme = options.order != Options::RANDOM && random() % 8 != 0;
  if (!extreme) return runnable_[random() % runnable_.size()];
  return options.order == Options::LATEST ? runnable_.back() : runnable_.front();
}

void Grid::run() {
  constexpr uint64_t PATIENCE = 200000;  // instructions without an event that others can see
  while (next_cluster < clusters || !resident.empty()) {
    while (next_cluster < clusters && resident.size() < size_t(options.resident_blocks)) admit();
    turn++;
    complete_due();
    Warp* warp = choose();
    bool stuck = !warp || executed - last_progress > PATIENCE * (1 + resident.size());
    if (stuck) {
      if (complete_one()) continue;
      if (next_cluster < clusters) {
        admit();
        continue;
      }
      report_deadlock();
    }
    uint64_t quantum = random() % 8 == 0 ? 1 + random() % 8 : 32 + random() % 512;
    run_warp(*warp, quantum);
    if (!warp->live) retire(*warp);
  }
  while (complete_one()) {
  }
}

void Grid::run_warp(Warp& warp, uint64_t quantum) {
  for (; quantum > 0 && warp.live && !warp.blocked; quantum--) step(warp);
  if (warp.blocked || !warp.live) stale_ = true;
}

namespace {

// LLVM moves copies of the registers of a tcgen05.ld above tcgen05.wait::ld, because it sees no
// dependency between the two. The copies may not be used before the wait either.
bool copies_tensor_load(Warp& warp, const Instruction& i) {
  if (warp.kernel->statements[i.statement].opcode[0] != "mov") return false;
  if (std::none_of(i.reads.begin(), i.reads.end(),
                   [&warp](int slot) { return warp.in_flight[slot] == 3; }))
    return false;
  for (int slot : i.writes) {
    warp.in_flight_count += warp.in_flight[slot] == 0;
    warp.in_flight[slot] = 3;
    warp.tensor_loads.push_back(slot);
  }
  return true;
}

void check_in_flight(Warp& warp, const Instruction& i) {
  if (warp.kernel->statements[i.statement].opcode[0] == "wgmma") return;
  if (copies_tensor_load(warp, i)) return;
  for (int slot : i.reads) {
    if (warp.in_flight[slot] == 1)
      warp.fail(i, -1, "reads an accumulator of a wgmma.mma_async before wgmma.wait_group");
    if (warp.in_flight[slot] == 3)
      warp.fail(i, -1, "reads a register of a tcgen05.ld before tcgen05.wait::ld");
  }
  for (int slot : i.writes)
    if (warp.in_flight[slot])
      warp.fail(i, -1,
                warp.in_flight[slot] == 3
                    ? "writes a register of a tcgen05.ld before tcgen05.wait::ld"
                    : "writes a register of a wgmma.mma_async before wgmma.wait_group");
}

}  // namespace

void Grid::step(Warp& warp) {
  Path& path = warp.paths.back();
  if (path.mask == 0 || path.pc == path.reconverge) {
    warp.paths.pop_back();
    if (warp.paths.empty()) warp.live = 0;
    return;
  }
  if (size_t(path.pc) >= kernel.instructions.size()) {
    const Instruction& last = kernel.instructions.back();
    warp.fail(last, -1, "the kernel has no ret at its end");
  }
  const Instruction& i = kernel.instructions[path.pc];
  uint32_t mask = path.mask;
  if (i.guard >= 0) mask &= i.guard_negated ? ~warp.predicates[i.guard] : warp.predicates[i.guard];
  executed++;
  warp.executed++;
  if (mask == 0) {
    if (profile) profile->count(i, mask, warp.block->number);
    path.pc++;
    return;
  }
  if (warp.in_flight_count) check_in_flight(warp, i);
  if (kernel.has_wgmma && i.kind != Class::TENSOR_CORE)
    for (int slot : i.writes) warp.written[slot] = {warp.executed, i.statement};
  Status status = i.run(warp, i, mask);
  if (status == Status::NEXT) warp.paths.back().pc++;
  if (profile && status != Status::BLOCKED) profile->count(i, mask, warp.block->number);
  if (options.max_instructions && executed > options.max_instructions)
    warp.fail(i, -1, "executed " + std::to_string(executed) + " instructions, more than the limit");
}

namespace {

void check_mbarriers(Warp& warp, Cluster& cluster) {
  const Instruction& last = warp.kernel->instructions.back();
  for (auto& block : cluster.blocks)
    for (auto& [offset, barrier] : block->mbarriers) {
      if (barrier.bytes == 0) continue;
      std::string text = "exits while the mbarrier at byte " +
                         std::to_string(offset - SHARED_BASE) + " of shared memory ";
      if (barrier.bytes > 0)
        text += "misses " + std::to_string(barrier.bytes) + " bytes of copies";
      else
        text +=
            "gets " + std::to_string(-barrier.bytes) + " bytes of copies that it did not expect";
      warp.fail(last, -1, text);
    }
}

}  // namespace

// A warp has exited: its block and cluster may be done.
void Grid::retire(Warp& warp) {
  const Instruction& last = kernel.instructions.back();
  for (Groups* groups : {&warp.copies, &warp.wgmma, &warp.bulk}) {
    bool open = groups->uncommitted();
    bool flying = !groups->committed.empty();
    const char* name = groups == &warp.copies ? "cp.async"
                       : groups == &warp.bulk ? "bulk copy"
                                              : "wgmma";
    if (open)
      warp.fail(last, -1, std::string("exits with a ") + name + " group that was never committed");
    if (flying) warp.fail(last, -1, std::string("exits with a ") + name + " group in flight");
  }
  stale_ = true;
  progress();
  Block& block = *warp.block;
  Cluster& cluster = *block.cluster;
  cluster.wake();
  block.live_warps--;
  if (--cluster.live_warps > 0) return;
  check_mbarriers(warp, cluster);
  for (auto& block : cluster.blocks)
    if (block->tensor_memory) check_tensor_memory_is_free(warp, last);
  for (auto& work : pending)
    if (!work->done) finish(*work);  // work refers to the cluster
  pending.clear();
  check_mbarriers(warp, cluster);  // copies that no mbarrier expected
  for (auto it = resident.begin(); it != resident.end(); ++it)
    if (it->get() == &cluster) {
      resident.erase(it);
      break;
    }
}

void Grid::report_deadlock() {
  std::string text =
      kernel.name + ": deadlock: no warp can go on, seed " + std::to_string(options.seed);
  int shown = 0, hidden = 0;
  for (auto& cluster : resident)
    for (auto& block : cluster->blocks)
      for (Warp& warp : block->warps) {
        if (!warp.live) continue;
        if (shown == 12) {
          hidden++;
          continue;
        }
        shown++;
        const Statement& s = kernel.statements[warp.current().statement];
        text += "\n  block " + std::to_string(block->number) + ", warp " +
                std::to_string(warp.index) + " waits for " +
                (warp.blocked ? warp.waits_for : "memory that no warp changes") + " at " +
                (s.location >= 0 ? kernel.locations[s.location].text : "?") + " (PTX line " +
                std::to_string(s.line) + ")";
      }
  if (hidden) text += "\n  and " + std::to_string(hidden) + " more warps";
  throw Failure(text);
}

void launch(const Kernel& kernel, Module& module, const LaunchConfig& config,
            void* const* parameters, const std::vector<Allocation>& allocations,
            const Options& options, Profile* profile) {
  if (kernel.instructions.empty()) throw InvalidProgram(kernel.name + " was not bound");
  Grid grid(kernel, module, config, parameters, allocations, options, profile);
  grid.run();
}

}  // namespace deepkern::ptx
