// mov: copies, and packing and unpacking of vectors of registers.
// Source: PTX ISA 9.0, section 9.7.9, "Data Movement and Conversion Instructions": mov.
#include "arithmetic.h"

namespace deepkern::ptx {
namespace {

template <class T>
PTX_INLINE T copy(T a) {
  return a;
}

Status move_predicate(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t bits = predicate_of(warp, instruction.a, instruction.mode & INVERT);
  set_predicate(warp, instruction.d, mask, bits);
  return Status::NEXT;
}

// The parts in `list` have `mode` bits each, the first is the least significant.
PTX_INLINE uint64_t part_mask(uint32_t bits) { return (uint64_t(1) << bits) - 1; }

template <class L>
Status pack(Warp& warp, const Instruction& instruction, uint32_t mask) {
  L result[LANES] = {};
  for (size_t k = 0; k < instruction.list.size(); ++k) {
    const uint32_t* part = warp.u32(instruction.list[k]);
    const uint32_t shift = instruction.mode * k;
    for (int lane = 0; lane < LANES; ++lane) result[lane] |= L(part[lane]) << shift;
  }
  blend(reinterpret_cast<L*>(warp.u32(instruction.d)), result, mask);
  return Status::NEXT;
}

template <class L>
Status unpack(Warp& warp, const Instruction& instruction, uint32_t mask) {
  L source[LANES];
  std::memcpy(source, warp.u32(instruction.a), sizeof(source));
  const uint32_t ones = static_cast<uint32_t>(part_mask(instruction.mode));
  for (size_t k = 0; k < instruction.list.size(); ++k) {
    if (instruction.list[k] < 0) continue;  // `_`
    uint32_t part[LANES];
    const uint32_t shift = instruction.mode * k;
    for (int lane = 0; lane < LANES; ++lane) part[lane] = uint32_t(source[lane] >> shift) & ones;
    blend(warp.u32(instruction.list[k]), part, mask);
  }
  return Status::NEXT;
}

int part_bits(Binder& binder, int bits, size_t parts) {
  const int part = parts ? bits / static_cast<int>(parts) : 0;
  const bool has_width = part == 8 || part == 16 || part == 32;
  if (parts < 2 || part * static_cast<int>(parts) != bits || !has_width) {
    binder.fail("a vector of " + std::to_string(parts) + " does not fill " + std::to_string(bits) +
                " bits");
  }
  return part;
}

void bind_vector(Binder& binder, int bits, bool packs) {
  Instruction& instruction = binder.instruction;
  const OperandText& vector = binder.statement.operands[packs ? 1 : 0];
  const int part = part_bits(binder, bits, vector.parts.size());
  instruction.mode = static_cast<uint32_t>(part);
  if (packs) {
    instruction.list = binder.sources(1, part);
    instruction.d = binder.destination(0, bits);
    instruction.run = bits == 64 ? pack<uint64_t> : pack<uint32_t>;
  } else {
    instruction.list = binder.destinations(0, part);
    instruction.a = binder.source(1, bits);
    instruction.run = bits == 64 ? unpack<uint64_t> : unpack<uint32_t>;
  }
}

}  // namespace

bool bind_move(Binder& binder) {
  if (binder.statement.opcode.at(0) != "mov") return false;
  Instruction& instruction = binder.instruction;
  instruction.kind = Class::MOVE;
  if (binder.count() != 2) binder.fail("it has a wrong number of operands");
  if (binder.statement.opcode.size() != 2) binder.fail("this modifier is unknown");
  const std::string& type = binder.statement.opcode[1];
  if (type == "pred") {
    instruction.run = move_predicate;
    instruction.kind = Class::PREDICATE;
    instruction.d = binder.predicate(0);
    instruction.a = bind_predicate_source(binder, 1, false);
    return true;
  }
  if (type.find_first_of("busf") != 0) binder.fail("this type is unknown");
  const std::string width = type.substr(1);
  const int bits = width == "64" ? 64 : width == "32" ? 32 : width == "16" ? 16 : 0;
  if (bits == 0) binder.fail("this type is unknown");
  const std::vector<OperandText>& operands = binder.statement.operands;
  const bool packs = operands[1].kind == OperandText::LIST;
  if (packs || operands[0].kind == OperandText::LIST) {
    bind_vector(binder, bits, packs);
    return true;
  }
  instruction.run =
      bits == 64 ? handler_of<Lanes<copy<uint64_t>>>() : handler_of<Lanes<copy<uint32_t>>>();
  instruction.d = binder.destination(0, bits);
  instruction.a = binder.source(1, bits);
  return true;
}

}  // namespace deepkern::ptx
