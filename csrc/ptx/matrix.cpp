// Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma.
//
// The four warps of a warpgroup execute a wgmma one by one: warp w owns rows 16 w to 16 w + 15 of A
// and of the accumulators. The product is computed between the issue and wgmma.wait_group.
// Source: PTX ISA 9.0, sections 9.7.15 (mma) and 9.7.16 (wgmma).
#include <algorithm>

#include "machine.h"
#include "profile.h"
#include "tensor_core.h"

namespace deepkern::ptx {

namespace {

void check_whole_warp(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u)
    warp.fail(
        i, first_lane(~mask),
        "is executed by lanes " + hexadecimal(mask) + " only; the whole warp has to execute it");
}

void count_flops(Warp& warp, const Instruction& i, uint64_t flops) {
  if (warp.grid->profile) warp.grid->profile->statements[i.statement].flops += flops;
}

struct MatrixMove {
  int matrices;
  bool transposed;
};

// a: shared address; list: registers. Lane 8 k + r holds the address of row r of matrix k.
Status move_matrices(Warp& warp, const Instruction& i, uint32_t mask, bool loads) {
  check_whole_warp(warp, i, mask);
  const auto& move = *static_cast<const MatrixMove*>(i.extra.get());
  uint8_t* rows[LANES];
  uint32_t* registers[4];
  for (int k = 0; k < move.matrices; k++) registers[k] = warp.u32(i.list[k]);
  uint8_t stored[LANES][16];
  uint8_t* stored_rows[LANES];
  for (int lane = 0; lane < LANES; lane++) stored_rows[lane] = stored[lane];
  if (!loads) stmatrix(move.matrices, move.transposed, stored_rows, registers);
  std::vector<uint64_t> addresses;
  for (int lane = 0; lane < 8 * move.matrices; lane++) {
    uint64_t address = (i.mode ? warp.u64(i.a)[lane] : warp.u32(i.a)[lane]) + i.immediate;
    Target t = translate(warp, i, lane, address, 16, Space::SHARED, loads ? "loads" : "stores");
    touch_shared(warp, i, lane, *t.block, t.offset, 16, loads ? Touch::READ : Touch::WRITE,
                 loads ? nullptr : stored[lane]);
    if (!loads) std::memcpy(t.data, stored[lane], 16);
    rows[lane] = t.data;
    addresses.push_back(address);
  }
  if (warp.grid->profile) warp.grid->profile->count_shared(i, addresses, 16);
  if (loads) ldmatrix(move.matrices, move.transposed, rows, registers);
  return Status::NEXT;
}

Status load_matrices(Warp& warp, const Instruction& i, uint32_t mask) {
  return move_matrices(warp, i, mask, true);
}

Status store_matrices(Warp& warp, const Instruction& i, uint32_t mask) {
  return move_matrices(warp, i, mask, false);
}

struct Mma {
  MmaShape shape;
  Sums sums;  // of the hardware
};

std::vector<uint32_t*> pointers(Warp& warp, const int32_t* slots, size_t count) {
  std::vector<uint32_t*> result;
  for (size_t k = 0; k < count; k++) result.push_back(warp.u32(slots[k]));
  return result;
}

// list: a, then b; more: c, then d.
Status mma(Warp& warp, const Instruction& i, uint32_t mask) {
  check_whole_warp(warp, i, mask);
  const auto& m = *static_cast<const Mma*>(i.extra.get());
  size_t a_count = i.list.size() * 2 / 3, c_count = i.more.size() / 2;
  auto inputs = pointers(warp, i.list.data(), i.list.size());
  auto outputs = pointers(warp, i.more.data(), i.more.size());
  mma_sync(m.shape, inputs.data(), inputs.data() + a_count, outputs.data(),
           outputs.data() + c_count, warp.grid->options.hardware_sums ? m.sums : FLOAT32);
  count_flops(warp, i, 2ull * 16 * 8 * m.shape.K);
  return Status::NEXT;
}

struct Wgmma {
  WgmmaShape shape;
  Sums sums;
  bool a_in_registers;
};

struct Toucher {
  Warp* warp;
  const Instruction* instruction;
};

void touch_operand(void* context, uint32_t address, uint32_t bytes) {
  auto& t = *static_cast<Toucher*>(context);
  Warp& warp = *t.warp;
  touch_shared(warp, *t.instruction, -1, *warp.block, address, bytes, Touch::READ, warp.wgmma.agent,
               warp.wgmma.clock(), Proxy::ASYNC, warp.view());
}

uint64_t uniform(Warp& warp, const Instruction& i, int slot, const char* what) {
  const uint64_t* values = warp.u64(slot);
  for (int lane = 1; lane < LANES; lane++)
    if (values[lane] != values[0]) warp.fail(i, lane, std::string(what) + " differs between lanes");
  return values[0];
}

// Checks the operands in shared memory where the MMA is issued.
void touch_operands(Warp& warp, const Instruction& i, const Wgmma& w, uint64_t a, uint64_t b) {
  const Options& options = warp.grid->options;
  if (!options.check_races && !options.check_initialized) return;
  Toucher toucher{&warp, &i};
  Block& block = *warp.block;
  SharedReader reader{block.shared.data(), static_cast<uint32_t>(block.shared.size()),
                      touch_operand, &toucher};
  uint8_t codes[256 * 32];
  if (!w.a_in_registers)
    read_operand(read_wgmma_descriptor(a, "A"), 64, w.shape.a, w.shape.a_mn_major, reader, "A",
                 codes);
  read_operand(read_wgmma_descriptor(b, "B"), w.shape.N, w.shape.b, w.shape.b_mn_major, reader, "B",
               codes);
}

void mark(Warp& warp, const std::vector<int32_t>& slots, uint8_t as) {
  for (int32_t slot : slots) {
    warp.in_flight_count += warp.in_flight[slot] == 0;
    warp.in_flight[slot] = std::max(warp.in_flight[slot], as);
  }
}

void check_fenced(Warp& warp, const Instruction& i, const std::vector<int32_t>& slots) {
  for (int32_t slot : slots)
    if (warp.in_flight[slot] == 0 && warp.written[slot].executed > warp.fenced_at) {
      const Statement& s = warp.kernel->statements[warp.written[slot].statement];
      warp.fail(i, -1,
                "reads a register that was written after the last wgmma.fence, at PTX line " +
                    std::to_string(s.line) + " (" + s.text() + ")");
    }
}

// list: accumulators; more: A in registers, or empty; a, b: descriptors; d: scale-d predicate.
Status issue_wgmma(Warp& warp, const Instruction& i, uint32_t mask) {
  check_whole_warp(warp, i, mask);
  const auto& w = *static_cast<const Wgmma*>(i.extra.get());
  agent_of(warp, warp.wgmma.agent, "a wgmma");
  uint32_t scale = warp.predicates[i.d];
  if (scale != 0 && scale != ~0u) warp.fail(i, -1, "scale-d differs between lanes");
  uint64_t a = w.a_in_registers ? 0 : uniform(warp, i, i.a, "the descriptor of A");
  uint64_t b = uniform(warp, i, i.b, "the descriptor of B");
  // Triton's LLVM moves conversions of A in registers behind the wgmma.fence, so the rule is
  // checked for accumulators only.
  if (warp.fenced_at == 0) warp.fail(i, -1, "is issued before the first wgmma.fence of the warp");
  if (scale) check_fenced(warp, i, i.list);
  try {
    touch_operands(warp, i, w, a, b);
  } catch (const OperandError& error) {
    warp.fail(i, -1, error.what());
  }
  mark(warp, i.list, 1);
  mark(warp, i.more, 2);
  Warp* owner = &warp;
  const Instruction* instruction = &i;
  PendingPointer before = warp.last_wgmma;
  auto compute = [owner, instruction, before, a, b, scale] {
    Grid& grid = *owner->grid;
    if (before) grid.finish(*before);
    const auto& w = *static_cast<const Wgmma*>(instruction->extra.get());
    auto d = pointers(*owner, instruction->list.data(), instruction->list.size());
    auto registers = pointers(*owner, instruction->more.data(), instruction->more.size());
    Block& block = *owner->block;
    SharedReader reader{block.shared.data(), static_cast<uint32_t>(block.shared.size())};
    wgmma(w.shape, owner->index % 4, w.a_in_registers ? registers.data() : nullptr, a, b, d.data(),
          scale != 0, reader, grid.options.hardware_sums ? w.sums : FLOAT32);
  };
  warp.last_wgmma = warp.grid->start("wgmma", compute);
  warp.wgmma.open.push_back(warp.last_wgmma);
  warp.wgmma_slots.insert(warp.wgmma_slots.end(), i.list.begin(), i.list.end());
  warp.wgmma_slots.insert(warp.wgmma_slots.end(), i.more.begin(), i.more.end());
  count_flops(warp, i, 2ull * 16 * w.shape.N * w.shape.K);
  // 32 bytes of each row. The four warps of a warp group read B once.
  if (warp.grid->profile)
    warp.grid->profile->statements[i.statement].bytes +=
        32ull * (w.a_in_registers ? 0 : 16) + 32ull * w.shape.N / 4;
  return Status::NEXT;
}

Status fence_wgmma(Warp& warp, const Instruction& i, uint32_t mask) {
  check_whole_warp(warp, i, mask);
  warp.fenced_at = warp.executed;
  return Status::NEXT;
}

Status commit_wgmma(Warp& warp, const Instruction& i, uint32_t mask) {
  check_whole_warp(warp, i, mask);
  agent_of(warp, warp.wgmma.agent, "a wgmma");
  commit_group(warp.wgmma);
  warp.wgmma_groups.push_back(std::move(warp.wgmma_slots));
  warp.wgmma_slots.clear();
  return Status::NEXT;
}

Status wait_wgmma(Warp& warp, const Instruction& i, uint32_t mask) {
  check_whole_warp(warp, i, mask);
  size_t left = i.immediate;
  wait_groups(warp, warp.wgmma, left);
  while (warp.wgmma_groups.size() > left) warp.wgmma_groups.pop_front();
  std::fill(warp.in_flight.begin(), warp.in_flight.end(), 0);
  warp.in_flight_count = 0;
  for (auto& group : warp.wgmma_groups) mark(warp, group, 1);
  mark(warp, warp.wgmma_slots, 1);
  if (warp.wgmma_groups.empty() && warp.wgmma_slots.empty()) warp.last_wgmma.reset();
  return Status::NEXT;
}

Element read_element(Binder& b, const std::string& name) {
  static const std::pair<const char*, Element> NAMES[] = {
      {"f16", Element::F16},   {"bf16", Element::BF16}, {"tf32", Element::TF32},
      {"e4m3", Element::E4M3}, {"e5m2", Element::E5M2}, {"s8", Element::S8},
      {"u8", Element::U8}};
  for (auto& [text, element] : NAMES)
    if (name == text) return element;
  b.fail("unknown element type " + name);
}

Accumulators read_accumulators(Binder& b, const std::string& name) {
  if (name == "f32") return Accumulators::F32;
  if (name == "f16") return Accumulators::F16;
  if (name == "s32") return Accumulators::S32;
  b.fail("unknown accumulator type " + name);
}

// The sums of the hardware where they are known; float32 sums where they are not.
Sums sums_of(Binder& b, Unit unit, Element a) {
  try {
    return hardware_sums(b.target(), unit, a);
  } catch (const InvalidProgram&) {
    return FLOAT32;
  }
}

void bind_move(Binder& b, bool loads) {
  Instruction& i = b.instruction;
  i.kind = Class::MATRIX_MOVE;
  auto move = std::make_shared<MatrixMove>();
  move->matrices = b.has("x1") ? 1 : b.has("x2") ? 2 : b.has("x4") ? 4 : 0;
  move->transposed = b.has("trans");
  if (!b.has("m8n8") || !b.has("b16") || !move->matrices) b.fail("unknown shape");
  size_t address = loads ? 1 : 0;
  i.mode = b.width(b.statement.operands.at(address)) == 64;
  i.a = b.address(address, i.mode ? 64 : 32, i.immediate);
  i.list = loads ? b.destinations(0, 32) : b.sources(1, 32);
  if (static_cast<int>(i.list.size()) != move->matrices) b.fail("wrong number of registers");
  i.run = loads ? load_matrices : store_matrices;
  i.extra = move;
}

void bind_mma(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::TENSOR_CORE;
  const auto& op = b.statement.opcode;
  auto m = std::make_shared<Mma>();
  size_t n = op.size();
  if (!b.has("row") || !b.has("col") || b.has("sp") || b.has("satfinite") || b.has("block_scale"))
    b.fail("unknown modifier");
  m->shape.a = read_element(b, op[n - 3]);
  m->shape.b = read_element(b, op[n - 2]);
  m->shape.accumulators = read_accumulators(b, op[n - 1]);
  if (op[n - 4] != op[n - 1]) b.fail("C and D of different types");
  std::string size;
  for (const std::string& part : op)
    if (part.rfind("m16n8k", 0) == 0) size = part;
  m->shape.K = size.empty() ? 0 : std::atoi(size.c_str() + 6);
  int bytes = m->shape.K * element_bytes(m->shape.a);
  if (bytes != 16 && bytes != 32) b.fail("unknown shape");
  m->sums = sums_of(b, Unit::MMA, m->shape.a);
  i.list = b.sources(1, 32);
  auto second = b.sources(2, 32);
  i.list.insert(i.list.end(), second.begin(), second.end());
  i.more = b.sources(3, 32);
  auto d = b.destinations(0, 32);
  i.more.insert(i.more.end(), d.begin(), d.end());
  size_t a_count = bytes / 8, c_count = m->shape.accumulators == Accumulators::F16 ? 2 : 4;
  if (i.list.size() != a_count * 3 / 2 || i.more.size() != 2 * c_count)
    b.fail("wrong number of registers");
  i.extra = m;
  i.run = mma;
}

// The number behind a letter in a shape such as m64n128k32.
int size_behind(const std::string& shape, char letter) {
  return std::atoi(shape.c_str() + shape.find(letter) + 1);
}

void bind_wgmma_mma(Binder& b) {
  Instruction& i = b.instruction;
  i.kind = Class::TENSOR_CORE;
  const auto& op = b.statement.opcode;
  size_t n = op.size();
  auto w = std::make_shared<Wgmma>();
  if (n != 8 || op[4].rfind("m64n", 0) != 0) b.fail("unknown modifier");
  w->shape.N = size_behind(op[4], 'n');
  w->shape.K = size_behind(op[4], 'k');
  w->shape.accumulators = read_accumulators(b, op[5]);
  w->shape.a = read_element(b, op[6]);
  w->shape.b = read_element(b, op[7]);
  if (w->shape.K * element_bytes(w->shape.a) != 32 || w->shape.N % 8 || w->shape.N < 8 ||
      w->shape.N > 256)
    b.fail("unknown shape");
  w->sums = sums_of(b, Unit::WGMMA, w->shape.a);
  w->a_in_registers = b.statement.operands.at(1).kind == OperandText::LIST;
  b.sources(0, 32);  // read as well, unless scale-d is false
  i.list = b.destinations(0, 32);
  if (static_cast<int>(i.list.size()) !=
      w->shape.N / (w->shape.accumulators == Accumulators::F16 ? 4 : 2))
    b.fail("wrong number of accumulators");
  if (w->a_in_registers)
    i.more = b.sources(1, 32);
  else
    i.a = b.source(1, 64);
  i.b = b.source(2, 64);
  i.d = b.predicate(3);
  size_t rest = b.count() - 4;
  if (rest >= 2) {
    w->shape.negate_a = b.immediate(4) == -1;
    w->shape.negate_b = b.immediate(5) == -1;
  }
  size_t k = 6;
  if (rest >= 3 && !w->a_in_registers) w->shape.a_mn_major = b.immediate(k++) != 0;
  if (b.count() > k) w->shape.b_mn_major = b.immediate(k) != 0;
  i.extra = w;
  i.run = issue_wgmma;
  b.kernel().has_wgmma = true;
}

void bind_wgmma(Binder& b) {
  Instruction& i = b.instruction;
  const std::string& operation = b.statement.opcode.at(1);
  i.kind = Class::BARRIER;
  if (operation == "fence") {
    i.run = fence_wgmma;
  } else if (operation == "commit_group") {
    i.run = commit_wgmma;
  } else if (operation == "wait_group") {
    i.run = wait_wgmma;
    i.immediate = b.immediate(0);
  } else if (operation == "mma_async") {
    bind_wgmma_mma(b);
  } else {
    b.fail("unknown operation");
  }
}

}  // namespace

bool bind_matrix(Binder& b) {
  const std::string& name = b.statement.opcode[0];
  if (name == "ldmatrix" || name == "stmatrix")
    bind_move(b, name == "ldmatrix");
  else if (name == "mma")
    bind_mma(b);
  else if (name == "wgmma")
    bind_wgmma(b);
  else
    return false;
  return true;
}

}  // namespace deepkern::ptx
