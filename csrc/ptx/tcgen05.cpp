// tcgen05: tensor memory, its loads and stores, and MMAs of one block (cta_group::1).
//
// An MMA is computed between its issue and the arrival of the next tcgen05.commit; MMAs of a block
// complete in order. Loads and stores of tensor memory move their data at once, but their registers
// and cells may be used only behind tcgen05.wait.
// An MMA may not read unwritten cells. A tcgen05.ld of them gives NaN and is no error: a
// loop that Triton pipelined loads a result before it looks whether the MMA was issued.
// Source: PTX ISA 9.0, section 9.7.17 (tcgen05).
#include <algorithm>

#include "machine.h"
#include "profile.h"
#include "tcgen05_layout.h"

namespace deepkern::ptx {

constexpr uint32_t UNWRITTEN = 0xffbadbad;  // a NaN in float32, and twice in bf16

struct BlockTensorMemory {
  std::vector<uint32_t> cells;
  Shadow shadow;
  bool allocated[TENSOR_COLUMNS / 32] = {};
  bool permit = true;  // false after tcgen05.relinquish_alloc_permit
  int agent;           // of the MMAs
  Clock issued = 1;    // clock of the MMAs since the last commit
  PendingPointer last;

  BlockTensorMemory(const Options& options, int mma_agent)
      : cells(TENSOR_LANES * TENSOR_COLUMNS, UNWRITTEN),
        shadow(TENSOR_LANES * TENSOR_COLUMNS, options.check_races, options.check_initialized),
        agent(mma_agent) {}
};

namespace {

BlockTensorMemory& memory_of(Warp& warp) {
  auto& memory = warp.block->tensor_memory;
  if (!memory) {
    int agent = warp.block->cluster->add_agent("a tcgen05.mma");
    memory = std::make_shared<BlockTensorMemory>(warp.grid->options, agent);
  }
  return *memory;
}

void check_warp(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u) warp.fail(i, -1, "is not executed by the whole warp");
}

// Columns are allocated in units of 32. The first fit starts at a random unit: a kernel must not
// rely on an address.
Status allocate(Warp& warp, const Instruction& i, uint32_t mask) {
  check_warp(warp, i, mask);
  BlockTensorMemory& memory = memory_of(warp);
  uint32_t columns = warp.u32(i.b)[0];
  if (columns < 32 || columns > TENSOR_COLUMNS || (columns & (columns - 1)))
    warp.fail(
        i, -1,
        "allocates " + std::to_string(columns) + " columns, expected 32 to 512, a power of 2");
  if (!memory.permit) warp.fail(i, -1, "allocates after tcgen05.relinquish_alloc_permit");
  int units = static_cast<int>(columns / 32), all = TENSOR_COLUMNS / 32;
  int shift = static_cast<int>(warp.grid->random() % all), found = -1;
  for (int k = 0; k < all && found < 0; k++) {
    int first = (k + shift) % all;
    if (first % units || first + units > all) continue;
    if (std::none_of(memory.allocated + first, memory.allocated + first + units,
                     [](bool used) { return used; }))
      found = first;
  }
  if (found < 0)
    warp.fail(i, -1, "allocates " + std::to_string(columns) + " columns: too few are free");
  std::fill(memory.allocated + found, memory.allocated + found + units, true);
  for (int lane = 0; lane < TENSOR_LANES; lane++) {
    uint32_t begin = lane * TENSOR_COLUMNS + found * 32;
    memory.shadow.forget(begin, columns);
    std::fill_n(memory.cells.begin() + begin, columns, UNWRITTEN);
  }
  Target t = translate_shared(warp, i, 0, warp.u32(i.a)[0] + static_cast<uint32_t>(i.immediate), 4,
                              "writes an address to");
  // PTX names no proxy for this write. Triton gives the place to bulk copies behind a barrier, with
  // no fence.proxy.async: the async proxy sees the write as the generic proxy does.
  touch_shared(warp, i, -1, *t.block, t.offset, 4, Touch::WRITE);
  touch_shared(warp, i, -1, *t.block, t.offset, 4, Touch::WRITE, warp.agent,
               warp.block->cluster->agents.now(warp.agent), Proxy::ASYNC, warp.view());
  uint32_t address = found * 32;
  std::memcpy(t.data, &address, 4);
  return Status::NEXT;
}

Status relinquish(Warp& warp, const Instruction& i, uint32_t mask) {
  check_warp(warp, i, mask);
  memory_of(warp).permit = false;
  return Status::NEXT;
}

void touch_cells(Warp& warp, const Instruction& i, int lane, int column, int columns, bool write,
                 int agent, Clock clock) {
  BlockTensorMemory& memory = memory_of(warp);
  for (int c = column; c < column + columns; c++)
    if (c >= TENSOR_COLUMNS || !memory.allocated[c / 32])
      warp.fail(i, -1, "column " + std::to_string(c) + " of tensor memory is not allocated");
  Access access{static_cast<uint16_t>(agent), Proxy::GENERIC, NO_LANE, clock, i.statement};
  uint32_t begin = lane * TENSOR_COLUMNS + column;
  Conflict c = write ? memory.shadow.write(begin, columns, access, warp.view(), warp.epoch)
                     : memory.shadow.read(begin, columns, access, warp.view(), warp.epoch);
  bool is_mma = agent == memory.agent;
  if (!c.found || (c.uninitialized && !is_mma)) return;
  std::string cell = "lane " + std::to_string(c.address / TENSOR_COLUMNS) + ", column " +
                     std::to_string(c.address % TENSOR_COLUMNS) + " of tensor memory";
  if (c.uninitialized) warp.fail(i, -1, "reads " + cell + ", which nothing wrote");
  const Statement& s = warp.kernel->statements[c.previous.instruction];
  warp.fail(i, -1,
            std::string("race: ") + (write ? "writes " : "reads ") + cell + ", which " +
                warp.block->cluster->agent_name(c.previous.agent) +
                (c.previous_is_write ? " wrote" : " read") + " at PTX line " +
                std::to_string(s.line) + "; nothing orders the two");
}

Status deallocate(Warp& warp, const Instruction& i, uint32_t mask) {
  check_warp(warp, i, mask);
  BlockTensorMemory& memory = memory_of(warp);
  int first = column_of(warp.u32(i.a)[0]) / 32, units = static_cast<int>(warp.u32(i.b)[0] / 32);
  if (first + units > TENSOR_COLUMNS / 32) warp.fail(i, -1, "frees columns that do not exist");
  for (int k = first; k < first + units; k++)
    if (!memory.allocated[k]) warp.fail(i, -1, "frees tensor memory that is not allocated");
  // Accesses of the columns have to happen before.
  for (int lane = 0; lane < TENSOR_LANES; lane++)
    touch_cells(warp, i, lane, first * 32, units * 32, true, warp.agent,
                warp.block->cluster->agents.now(warp.agent));
  std::fill(memory.allocated + first, memory.allocated + first + units, false);
  return Status::NEXT;
}

struct TensorMove {
  TensorShape shape;
  int number, half_offset;
};

// a: address; list: registers.
Status move_cells(Warp& warp, const Instruction& i, uint32_t mask, bool loads) {
  check_warp(warp, i, mask);
  const auto& move = *static_cast<const TensorMove*>(i.extra.get());
  BlockTensorMemory& memory = memory_of(warp);
  uint32_t address = warp.u32(i.a)[0] + static_cast<uint32_t>(i.immediate);
  int quarter = warp.index % 4 * 32;
  if (lane_of(address) < quarter || lane_of(address) >= quarter + 32)
    warp.fail(i, -1,
              "warp " + std::to_string(warp.index) + " accesses lane " +
                  std::to_string(lane_of(address)) + " of tensor memory, expected " +
                  std::to_string(quarter) + " to " + std::to_string(quarter + 31));
  int agent = loads ? warp.agent : agent_of(warp, warp.tensor_store_agent, "a tcgen05.st");
  Clock clock = loads ? warp.block->cluster->agents.now(agent) : warp.tensor_stores + 1;
  for (size_t r = 0; r < i.list.size(); r++)
    for (int lane = 0; lane < LANES; lane++) {
      TensorCell cell = tensor_cell(move.shape, lane, static_cast<int>(r), move.half_offset);
      int row = lane_of(address) + cell.lane, column = column_of(address) + cell.column;
      touch_cells(warp, i, row, column, 1, !loads, agent, clock);
      uint32_t& value = memory.cells[row * TENSOR_COLUMNS + column];
      if (loads)
        warp.u32(i.list[r])[lane] = value;
      else
        value = warp.u32(i.list[r])[lane];
    }
  if (!loads) return Status::NEXT;
  for (int32_t slot : i.list) {
    warp.in_flight_count += warp.in_flight[slot] == 0;
    warp.in_flight[slot] = 3;
    warp.tensor_loads.push_back(slot);
  }
  return Status::NEXT;
}

Status load_cells(Warp& warp, const Instruction& i, uint32_t mask) {
  return move_cells(warp, i, mask, true);
}

Status store_cells(Warp& warp, const Instruction& i, uint32_t mask) {
  return move_cells(warp, i, mask, false);
}

Status wait_loads(Warp& warp, const Instruction& i, uint32_t mask) {
  check_warp(warp, i, mask);
  for (int32_t slot : warp.tensor_loads) {
    warp.in_flight_count -= warp.in_flight[slot] != 0;
    warp.in_flight[slot] = 0;
  }
  warp.tensor_loads.clear();
  warp.publish();  // its loads come before its next tcgen05.st
  return Status::NEXT;
}

Status wait_stores(Warp& warp, const Instruction& i, uint32_t mask) {
  check_warp(warp, i, mask);
  see(warp, warp.tensor_store_agent, ++warp.tensor_stores);
  return Status::NEXT;
}

struct TensorMma {
  TensorKind kind;
  bool a_in_tensor_memory;
  Sums sums;
};

struct TensorToucher {
  Warp* warp;
  const Instruction* instruction;
};

void touch_operand(void* context, uint32_t address, uint32_t bytes) {
  auto& t = *static_cast<TensorToucher*>(context);
  BlockTensorMemory& memory = memory_of(*t.warp);
  touch_shared(*t.warp, *t.instruction, -1, *t.warp->block, address, bytes, Touch::READ,
               memory.agent, memory.issued, Proxy::ASYNC, t.warp->view());
}

void touch_rows(void* context, int lane, int lanes, int column, int columns, bool write) {
  auto& t = *static_cast<TensorToucher*>(context);
  BlockTensorMemory& memory = memory_of(*t.warp);
  for (int row = lane; row < lane + lanes; row++)
    touch_cells(*t.warp, *t.instruction, row, column, columns, write, memory.agent, memory.issued);
}

// d: address of D; a: descriptor or address of A; b: descriptor of B; c: instruction descriptor;
// e: predicate that enables the accumulators as input.
void issue_mma(Warp& warp, const Instruction& i, int lane) {
  const auto& m = *static_cast<const TensorMma*>(i.extra.get());
  BlockTensorMemory& memory = memory_of(warp);
  uint32_t d = warp.u32(i.d)[lane] + static_cast<uint32_t>(i.immediate);
  uint64_t a =
      m.a_in_tensor_memory ? warp.u32(i.a)[lane] + i.second_immediate : warp.u64(i.a)[lane];
  uint64_t b = warp.u64(i.b)[lane];
  bool accumulate = warp.predicates[i.e] >> lane & 1;
  TensorInstruction instruction;
  Block* block = warp.block;
  auto reader = [block] {
    return SharedReader{block->shared.data(), static_cast<uint32_t>(block->shared.size())};
  };
  TensorToucher toucher{&warp, &i};
  try {
    instruction = read_instruction_descriptor(warp.u32(i.c)[lane], m.kind);
    SharedReader shared = reader();
    shared.touch = touch_operand;
    shared.context = &toucher;
    touch_tcgen05_mma(instruction, d, m.a_in_tensor_memory, a, b, accumulate, shared,
                      TensorMemory{memory.cells.data(), touch_rows, &toucher});
  } catch (const OperandError& error) {
    warp.fail(i, lane, error.what());
  }
  PendingPointer before = memory.last;
  Grid* grid = warp.grid;
  Sums sums = grid->options.hardware_sums ? m.sums : FLOAT32;
  bool in_tensor_memory = m.a_in_tensor_memory;
  memory.last = grid->start("tcgen05.mma", [=] {
    if (before) grid->finish(*before);
    tcgen05_mma(instruction, d, in_tensor_memory, a, b, accumulate, reader(),
                TensorMemory{block->tensor_memory->cells.data()}, sums);
  });
  if (grid->profile) {
    Counts& c = grid->profile->statements[i.statement];
    c.flops += 2ull * instruction.M * instruction.N * instruction.K;
    // 32 bytes of each row of A, unless it is in tensor memory, and of B.
    c.bytes += 32ull * ((in_tensor_memory ? 0 : instruction.M) + instruction.N);
  }
}

Status issue_mmas(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) issue_mma(warp, i, first_lane(rest));
  return Status::NEXT;
}

// a: mbarrier.
Status commit(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    BlockTensorMemory& memory = memory_of(warp);
    uint32_t address = i.mode ? static_cast<uint32_t>(warp.u64(i.a)[lane]) : warp.u32(i.a)[lane];
    Target t = translate_shared(warp, i, lane, address + static_cast<uint32_t>(i.immediate), 8,
                                "arrives at an mbarrier at");
    find_mbarrier(warp, i, lane, t);
    View view = warp.publish();
    for (std::vector<Clock>* clocks : {&view.generic, &view.async}) {
      if (clocks->size() <= size_t(memory.agent)) clocks->resize(memory.agent + 1);
      (*clocks)[memory.agent] = memory.issued;
    }
    memory.issued++;
    PendingPointer before = memory.last;
    Warp* owner = &warp;
    const Instruction* instruction = &i;
    memory.last = warp.grid->start("tcgen05.commit", [=] {
      if (before) owner->grid->finish(*before);
      arrive(*owner, *instruction, lane, t, 1, view);
    });
  }
  return Status::NEXT;
}

// The order that tcgen05.fence gives comes from the barriers between its two halves.
Status nothing(Warp&, const Instruction&, uint32_t) { return Status::NEXT; }

TensorShape read_shape(Binder& b) {
  static const std::pair<const char*, TensorShape> NAMES[] = {{"32x32b", TensorShape::T32x32b},
                                                              {"16x64b", TensorShape::T16x64b},
                                                              {"16x128b", TensorShape::T16x128b},
                                                              {"16x256b", TensorShape::T16x256b},
                                                              {"16x32bx2", TensorShape::T16x32bx2}};
  for (auto& [name, shape] : NAMES)
    if (b.has(name)) return shape;
  b.fail("unknown shape");
}

void bind_tensor_move(Binder& b, bool loads) {
  Instruction& i = b.instruction;
  i.kind = Class::MATRIX_MOVE;
  auto move = std::make_shared<TensorMove>();
  move->shape = read_shape(b);
  for (const std::string& part : b.statement.opcode)
    if (part[0] == 'x') move->number = std::atoi(part.c_str() + 1);
  if (b.has("pack::16b") || b.has("unpack::16b") || b.has("red")) b.fail("unknown modifier");
  bool halves = move->shape == TensorShape::T16x32bx2;
  size_t address = loads ? 1 : 0, list = loads ? 0 : halves ? 2 : 1;
  move->half_offset = halves ? static_cast<int>(b.immediate(loads ? 2 : 1)) : 0;
  i.a = b.address(address, 32, i.immediate);
  i.list = loads ? b.destinations(list, 32) : b.sources(list, 32);
  if (static_cast<int>(i.list.size()) != tensor_registers(move->shape, move->number))
    b.fail("wrong number of registers");
  i.extra = move;
  i.run = loads ? load_cells : store_cells;
}

void bind_tensor_mma(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::TENSOR_CORE;
  auto m = std::make_shared<TensorMma>();
  if (b.count() != 5 || b.statement.opcode.size() != 4) b.fail("unknown modifier");
  const std::string& kind = b.statement.opcode[3];
  if (kind == "kind::f16")
    m->kind = TensorKind::F16;
  else if (kind == "kind::tf32")
    m->kind = TensorKind::TF32;
  else if (kind == "kind::f8f6f4")
    m->kind = TensorKind::F8F6F4;
  else
    b.fail("unknown " + kind);
  i.d = b.address(0, 32, i.immediate);
  m->a_in_tensor_memory = b.statement.operands[1].kind == OperandText::ADDRESS;
  i.a = m->a_in_tensor_memory ? b.address(1, 32, i.second_immediate) : b.source(1, 64);
  i.b = b.source(2, 64);
  i.c = b.source(3, 32);
  i.e = b.predicate(4);
  Element element = m->kind == TensorKind::F16    ? Element::BF16
                    : m->kind == TensorKind::TF32 ? Element::TF32
                                                  : Element::E4M3;
  m->sums = FLOAT32;
  try {
    m->sums = hardware_sums(b.target(), Unit::TCGEN05, element);
  } catch (const InvalidProgram&) {
  }
  i.extra = m;
  i.run = issue_mmas;
}

}  // namespace

void check_tensor_memory_is_free(Warp& warp, const Instruction& i) {
  for (bool used : warp.block->tensor_memory->allocated)
    if (used) warp.fail(i, -1, "exits without tcgen05.dealloc of its tensor memory");
}

bool bind_tcgen05(Binder& b) {
  const auto& op = b.statement.opcode;
  if (op[0] != "tcgen05") return false;
  Instruction& i = b.instruction;
  i.kind = Class::BARRIER;
  if (b.has("cta_group::2")) b.fail("cta_group::2 is not supported");
  const std::string& operation = op.at(1);
  if (operation == "alloc") {
    i.a = b.address(0, 32, i.immediate);
    i.b = b.source(1, 32);
    i.run = allocate;
  } else if (operation == "dealloc") {
    i.a = b.source(0, 32);
    i.b = b.source(1, 32);
    i.run = deallocate;
  } else if (operation == "relinquish_alloc_permit") {
    i.run = relinquish;
  } else if (operation == "ld" || operation == "st") {
    bind_tensor_move(b, operation == "ld");
  } else if (operation == "wait::ld" || operation == "wait::st") {
    i.run = operation == "wait::ld" ? wait_loads : wait_stores;
  } else if (operation == "mma") {
    bind_tensor_mma(b);
  } else if (operation == "commit") {
    if (b.has("multicast::cluster")) b.fail("unknown modifier .multicast::cluster");
    i.mode = b.width(b.statement.operands.at(0)) == 64;
    i.a = b.address(0, i.mode ? 64 : 32, i.immediate);
    i.run = commit;
  } else if (operation.rfind("fence::", 0) == 0) {
    i.run = nothing;
  } else {
    b.fail("unknown operation");
  }
  return true;
}

}  // namespace deepkern::ptx
