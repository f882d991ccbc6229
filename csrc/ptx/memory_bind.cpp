// Operands and modifiers of loads, stores and atomics.
// Source: PTX ISA 9.0, section 9.7.9.
#include "memory.h"

namespace deepkern::ptx {

namespace {

bool starts(const std::string& word, const char* with) { return word.rfind(with, 0) == 0; }

// True if the word is a state space; sets it.
bool read_space(const std::string& word, MemoryAccess& m) {
  if (word == "global" || word == "const")
    m.space = Space::GLOBAL;
  else if (word == "shared" || word == "shared::cta" || word == "shared::cluster")
    m.space = Space::SHARED;
  else if (word == "local")
    m.space = Space::LOCAL;
  else if (word == "param" || word == "param::entry")
    m.space = Space::PARAM;
  else
    return false;
  return true;
}

bool read_order(const std::string& word, MemoryAccess& m) {
  if (word == "relaxed" || word == "volatile" || word == "mmio")
    m.relaxed = true;
  else if (word == "acquire")
    m.acquire = true;
  else if (word == "release")
    m.release = true;
  else if (word == "acq_rel")
    m.acquire = m.release = true;
  else
    return false;
  return true;
}

// Scopes and hints, which have no effect here. A scope narrower than needed is not detected.
bool is_hint(const std::string& word) {
  for (const char* known : {"weak", "cta", "cluster", "gpu", "sys", "ca", "cg", "cs", "lu", "cv",
                            "wb", "wt", "nc", "noftz"})
    if (word == known) return true;
  return starts(word, "L1::") || starts(word, "L2::");
}

bool read_type(const std::string& word, MemoryAccess& m) {
  if (word.size() < 2 || !std::strchr("bsuf", word[0])) return false;
  int bits = std::atoi(word.c_str() + 1);
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) return false;
  if (word != std::string(1, word[0]) + std::to_string(bits)) return false;
  m.element_bytes = bits / 8;
  m.number = word[0] == 's'   ? Number::SIGNED
             : word[0] != 'f' ? Number::UNSIGNED
             : bits == 64     ? Number::F64
                              : Number::F32;
  return true;
}

std::shared_ptr<MemoryAccess> attach(Binder& b) {
  auto m = std::make_shared<MemoryAccess>();
  b.instruction.extra = m;
  return m;
}

void set_kind(Instruction& i, const MemoryAccess& m) {
  i.kind = m.atomic != Atomic::NONE                                ? Class::ATOMIC
           : m.space == Space::SHARED                              ? Class::SHARED
           : m.space == Space::GLOBAL || m.space == Space::GENERIC ? Class::GLOBAL
                                                                   : Class::MOVE;
}

// The address operand: 32 bits are enough for shared memory.
void bind_address(Binder& b, size_t operand, MemoryAccess& m) {
  const OperandText& text = b.statement.operands.at(operand);
  int width = b.width(text);
  m.address_bits = width ? width : m.space == Space::SHARED ? 32 : 64;
  if (m.address_bits == 32 && m.space != Space::SHARED) b.fail("an address of 32 bits");
  b.instruction.a = b.address(operand, m.address_bits, b.instruction.immediate);
}

Atomic read_operation(const std::string& word) {
  static const std::pair<const char*, Atomic> NAMES[] = {
      {"add", Atomic::ADD}, {"min", Atomic::MIN}, {"max", Atomic::MAX},   {"inc", Atomic::INC},
      {"dec", Atomic::DEC}, {"cas", Atomic::CAS}, {"exch", Atomic::EXCH}, {"and", Atomic::AND},
      {"or", Atomic::OR},   {"xor", Atomic::XOR}};
  for (auto& [name, operation] : NAMES)
    if (word == name) return operation;
  return Atomic::NONE;
}

}  // namespace

void bind_access(Binder& b, size_t address, size_t registers) {
  auto m = attach(b);
  const auto& op = b.statement.opcode;
  for (size_t k = 1; k < op.size(); k++) {
    if (op[k] == "v2" || op[k] == "v4" || op[k] == "v8")
      m->count = op[k][1] - '0';
    else if (!read_space(op[k], *m) && !read_order(op[k], *m) && !is_hint(op[k]) &&
             !read_type(op[k], *m))
      b.fail("unknown modifier ." + op[k]);
  }
  Instruction& i = b.instruction;
  bool loads = registers < address;
  bind_address(b, address, *m);
  const OperandText& list = b.statement.operands.at(registers);
  bool is_list = list.kind == OperandText::LIST;
  int count = is_list ? static_cast<int>(list.parts.size()) : 1;
  if (count != m->count) b.fail("expected " + std::to_string(m->count) + " registers");
  int width = 0;
  for (int e = 0; e < count; e++) width = std::max(width, b.width(is_list ? list.parts[e] : list));
  if (width == 0) width = m->element_bytes == 8 ? 64 : 32;
  m->register_bits = width == 8 ? 16 : width;
  m->sign_extend = loads && m->number == Number::SIGNED && width > 8 * m->element_bytes;
  i.list = loads ? b.destinations(registers, width) : b.sources(registers, width);
  set_kind(i, *m);
  bool global = m->space == Space::GLOBAL || m->space == Space::GENERIC;
  if (global && (m->relaxed || m->acquire || m->release)) b.kernel().communicates = true;
}

void bind_atomic(Binder& b) {
  auto m = attach(b);
  const auto& op = b.statement.opcode;
  for (size_t k = 1; k < op.size(); k++) {
    Atomic operation = read_operation(op[k]);
    if (operation != Atomic::NONE)
      m->atomic = operation;
    else if (!read_space(op[k], *m) && !read_order(op[k], *m) && !is_hint(op[k]) &&
             !read_type(op[k], *m))
      b.fail("unknown modifier ." + op[k]);
  }
  bool floats = m->number == Number::F32 || m->number == Number::F64;
  if (m->atomic == Atomic::NONE) b.fail("no operation");
  if (m->element_bytes < 4) b.fail("atomics of fewer than 32 bits");
  if (floats && m->atomic != Atomic::ADD && m->atomic != Atomic::EXCH)
    b.fail("only add and exch are known for floating-point numbers");
  if (!m->acquire && !m->release) m->relaxed = true;
  Instruction& i = b.instruction;
  size_t k = 0;
  int bits = m->register_bits = 8 * m->element_bytes;
  if (op[0] == "atom") i.d = b.destination(k++, bits);
  bind_address(b, k++, *m);
  i.b = b.source(k++, bits);
  if (m->atomic == Atomic::CAS) i.c = b.source(k++, bits);
  if (k != b.count()) b.fail("unexpected operand");
  set_kind(i, *m);
  if (m->space != Space::SHARED) b.kernel().communicates = true;
}

}  // namespace deepkern::ptx
