// Turns statements into instructions: slots for registers and constants, branch targets, and the
// places where diverged lanes meet again (the immediate post-dominators of branches).
#include <algorithm>

#include "machine.h"
#include "program.h"

namespace deepkern::ptx {

Binder::Binder(Kernel& kernel, Module& module, const Statement& s, Instruction& i)
    : statement(s), instruction(i), kernel_(kernel), module_(module) {}

void Binder::fail(const std::string& message) const {
  throw InvalidProgram("PTX line " + std::to_string(statement.line) + ": " + statement.text() +
                       ": " + message);
}

int Binder::width(const OperandText& operand) const {
  auto found = kernel_.widths.find(operand.name);
  bool is_register = operand.kind == OperandText::REGISTER || operand.kind == OperandText::ADDRESS;
  return is_register && found != kernel_.widths.end() ? found->second : 0;
}

int Binder::constant(uint64_t value, int bits) {
  bits = bits == 64 ? 64 : 32;
  for (const Constant& c : kernel_.constants)
    if (c.value == value && c.bits == bits) return c.slot;
  kernel_.constants.push_back({kernel_.slots, bits, value});
  kernel_.slots += bits / 32;
  return kernel_.constants.back().slot;
}

namespace {

// Slot of a special register or of the address of a shared variable: known when a warp starts.
int special(Kernel& kernel, const std::string& name, int bits) {
  for (const SpecialUse& use : kernel.specials)
    if (use.name == name && use.bits == bits) return use.slot;
  kernel.specials.push_back({name, kernel.slots, bits});
  kernel.slots += bits / 32;
  return kernel.specials.back().slot;
}

int register_slot(Kernel& kernel, const std::string& name, int bits) {
  auto [found, added] = kernel.registers.try_emplace(name, kernel.slots);
  if (added) kernel.slots += std::max(1, bits / 32);
  return found->second;
}

}  // namespace

int Binder::source(const OperandText& operand, int bits) {
  if (operand.negated) fail("a negated operand");
  int wide = bits == 64 ? 64 : 32;
  switch (operand.kind) {
    case OperandText::REGISTER: {
      int declared = width(operand);
      if (declared == 0) return special(kernel_, operand.name, wide);
      if (declared == 1) fail(operand.name + " is a predicate");
      if (declared < bits || (declared == 64) != (bits == 64))
        fail(operand.name + " has " + std::to_string(declared) + " bits, expected " +
             std::to_string(bits));
      int slot = register_slot(kernel_, operand.name, declared);
      instruction.reads.push_back(slot);
      return slot;
    }
    case OperandText::IMMEDIATE: {
      uint64_t value = operand.bits;
      if (operand.float_bits == 64 && bits == 32) {
        double wide_value;
        std::memcpy(&wide_value, &value, 8);
        float narrow = static_cast<float>(wide_value);
        value = 0;
        std::memcpy(&value, &narrow, 4);
      }
      if (bits < 64) value &= (uint64_t(1) << bits) - 1;
      return constant(value, bits);
    }
    case OperandText::SYMBOL: {
      if (operand.name == "WARP_SZ") return constant(LANES, bits);
      for (const Parameter& parameter : kernel_.parameters)
        if (parameter.name == operand.name)
          return constant(PARAMETER_BASE + parameter.offset + operand.bits, bits);
      auto found = kernel_.variables.find(operand.name);
      if (found == kernel_.variables.end()) fail("unknown name " + operand.name);
      const Variable& variable = found->second;
      if (variable.space == "shared")
        return special(kernel_, "shared+" + std::to_string(variable.offset + operand.bits), wide);
      if (variable.space == "local")
        return constant(LOCAL_BASE + variable.offset + operand.bits, bits);
      uint8_t* storage = module_.globals.at(variable.name).data();
      return constant(reinterpret_cast<uint64_t>(storage) + operand.bits, bits);
    }
    default:
      fail("expected a register or a constant");
  }
}

int Binder::destination(const OperandText& operand, int bits) {
  if (operand.kind == OperandText::SINK) return -1;
  int declared = width(operand);
  if (declared < 8) fail("expected a register as destination");
  if (declared < bits || (declared == 64) != (bits == 64))
    fail(operand.name + " has " + std::to_string(declared) + " bits, expected " +
         std::to_string(bits));
  int slot = register_slot(kernel_, operand.name, declared);
  instruction.writes.push_back(slot);
  return slot;
}

int Binder::predicate(const OperandText& operand) {
  if (operand.kind == OperandText::SINK) return -1;
  std::string name = operand.name;
  if (operand.kind == OperandText::IMMEDIATE) {
    name = operand.bits ? "true" : "false";  // predicates 0 and 1: see bind_kernel
  } else if (operand.negated) {
    fail("a negated predicate operand");
  } else if (width(operand) != 1) {
    fail("expected a predicate, got " + operand.name);
  }
  auto [found, added] = kernel_.registers.try_emplace(name, kernel_.predicates);
  if (added) kernel_.predicates++;
  return found->second;
}

int Binder::address(size_t i, int bits, int64_t& offset) {
  const OperandText& operand = statement.operands.at(i);
  if (operand.kind != OperandText::ADDRESS) fail("expected an address");
  OperandText base = operand;
  offset = static_cast<int64_t>(operand.bits);
  base.bits = 0;
  if (operand.name.empty()) {
    base.kind = OperandText::IMMEDIATE;
  } else {
    base.kind = width(operand) ? OperandText::REGISTER : OperandText::SYMBOL;
  }
  return source(base, bits);
}

std::vector<int> Binder::sources(size_t i, int bits) {
  const OperandText& operand = statement.operands.at(i);
  std::vector<int> slots;
  if (operand.kind != OperandText::LIST) return {source(operand, bits)};
  for (const OperandText& part : operand.parts) slots.push_back(source(part, bits));
  return slots;
}

std::vector<int> Binder::destinations(size_t i, int bits) {
  const OperandText& operand = statement.operands.at(i);
  std::vector<int> slots;
  if (operand.kind != OperandText::LIST) return {destination(operand, bits)};
  for (const OperandText& part : operand.parts) slots.push_back(destination(part, bits));
  return slots;
}

int64_t Binder::immediate(size_t i) const {
  const OperandText& operand = statement.operands.at(i);
  if (operand.kind != OperandText::IMMEDIATE) fail("expected a constant");
  return static_cast<int64_t>(operand.bits);
}

namespace {

// Static shared variables first, then the dynamic array; local variables per thread.
void place_variables(Kernel& kernel) {
  int64_t shared = 0, local = 0;
  for (auto& [name, variable] : kernel.variables) {
    if (variable.space == "global" || variable.space == "const" || variable.bytes == 0) continue;
    int64_t& end = variable.space == "shared" ? shared : local;
    variable.offset = (end + variable.align - 1) / variable.align * variable.align;
    end = variable.offset + variable.bytes;
  }
  kernel.static_shared_bytes = static_cast<int>(shared);
  kernel.local_bytes = static_cast<int>(local);
  kernel.dynamic_shared_offset = static_cast<int>((shared + 15) / 16 * 16);
  for (auto& [name, variable] : kernel.variables)
    if (variable.space == "shared" && variable.bytes == 0) {
      int align = variable.align;
      variable.offset = (kernel.dynamic_shared_offset + align - 1) / align * align;
    }
}

bool ends_path(const Statement& s) {
  return s.opcode[0] == "ret" || s.opcode[0] == "exit" || s.opcode[0] == "trap";
}

// Basic blocks by first instruction, and their successors; the exit is the last block.
struct Flow {
  std::vector<int> begin;  // of each block; begin.back() is the number of instructions
  std::vector<std::vector<int>> next;
};

Flow find_flow(const Kernel& kernel) {
  int count = static_cast<int>(kernel.statements.size());
  std::vector<char> leads(count + 1, 0);
  leads[0] = leads[count] = 1;
  for (const auto& [name, index] : kernel.labels) leads[index] = 1;
  for (int i = 0; i < count; i++)
    if (kernel.instructions[i].target >= 0 || ends_path(kernel.statements[i])) leads[i + 1] = 1;
  Flow flow;
  std::vector<int> block_of(count + 1, 0);
  for (int i = 0; i <= count; i++) {
    if (leads[i]) flow.begin.push_back(i);
    block_of[i] = static_cast<int>(flow.begin.size()) - 1;
  }
  int blocks = static_cast<int>(flow.begin.size()) - 1;
  flow.next.resize(blocks + 1);
  for (int b = 0; b < blocks; b++) {
    int last = flow.begin[b + 1] - 1;
    const Instruction& i = kernel.instructions[last];
    bool leaves = ends_path(kernel.statements[last]);
    if (i.target >= 0) flow.next[b].push_back(block_of[i.target]);
    if (leaves) flow.next[b].push_back(blocks);
    if ((i.target < 0 && !leaves) || i.guard >= 0) flow.next[b].push_back(b + 1);
  }
  return flow;
}

// Immediate post-dominators by iteration (Cooper, Harvey, Kennedy: A Simple, Fast Dominance
// Algorithm, 2001) on the reversed graph.
std::vector<int> find_post_dominators(const Flow& flow) {
  int count = static_cast<int>(flow.next.size());
  int exit = count - 1;
  std::vector<std::vector<int>> previous(count);
  for (int b = 0; b < count; b++)
    for (int n : flow.next[b]) previous[n].push_back(b);
  std::vector<int> order(count, -1), sequence;  // postorder from the exit
  std::vector<std::pair<int, size_t>> stack{{exit, 0}};
  std::vector<char> visited(count, 0);
  visited[exit] = 1;
  while (!stack.empty()) {
    auto& [b, child] = stack.back();
    if (child < previous[b].size()) {
      int p = previous[b][child++];
      if (!visited[p]) visited[p] = 1, stack.push_back({p, 0});
    } else {
      order[b] = static_cast<int>(sequence.size());
      sequence.push_back(b);
      stack.pop_back();
    }
  }
  std::vector<int> idom(count, -1);
  idom[exit] = exit;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = sequence.size(); k-- > 0;) {
      int b = sequence[k], found = -1;
      if (b == exit) continue;
      for (int n : flow.next[b]) {
        if (order[n] < 0 || idom[n] < 0) continue;
        if (found < 0) found = n;
        for (int m = n; m != found;) {
          if (order[m] < order[found])
            m = idom[m];
          else
            found = idom[found];
        }
      }
      if (found != idom[b]) idom[b] = found, changed = true;
    }
  }
  return idom;
}

void set_reconvergence(Kernel& kernel) {
  Flow flow = find_flow(kernel);
  std::vector<int> idom = find_post_dominators(flow);
  int exit = static_cast<int>(flow.next.size()) - 1;
  for (int b = 0; b < exit; b++) {
    Instruction& branch = kernel.instructions[flow.begin[b + 1] - 1];
    if (branch.target < 0) continue;
    branch.reconverge = idom[b] < 0 || idom[b] == exit ? -1 : flow.begin[idom[b]];
  }
}

void bind_statement(Kernel& kernel, Module& module, int index) {
  const Statement& s = kernel.statements[index];
  Instruction& i = kernel.instructions[index];
  i.statement = index;
  Binder binder(kernel, module, s, i);
  if (!s.guard.empty()) {
    OperandText guard;
    guard.kind = OperandText::REGISTER;
    guard.name = s.guard;
    i.guard = binder.predicate(guard);
    i.guard_negated = s.guard_negated;
  }
  bool known = bind_arithmetic(binder) || bind_memory(binder) || bind_control(binder) ||
               bind_convert(binder) || bind_warp(binder) || bind_async(binder) ||
               bind_matrix(binder) || bind_tcgen05(binder);
  if (!known) binder.fail("unknown opcode");
}

}  // namespace

void bind_kernel(Kernel& kernel, Module& module) {
  if (!kernel.instructions.empty()) return;
  place_variables(kernel);
  kernel.registers["false"] = 0;
  kernel.registers["true"] = 1;
  kernel.predicates = 2;
  kernel.instructions.resize(kernel.statements.size());
  try {
    for (size_t i = 0; i < kernel.statements.size(); i++)
      bind_statement(kernel, module, static_cast<int>(i));
    set_reconvergence(kernel);
  } catch (...) {
    kernel.instructions.clear();
    throw;
  }
}

}  // namespace deepkern::ptx
