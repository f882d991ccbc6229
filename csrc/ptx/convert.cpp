// cvt, and the instructions that convert addresses: cvta, isspacep.
//
// A generic address of global, local, constant or parameter memory is the address itself. That of
// shared memory is the shared address plus GENERIC_SHARED_BASE.
// Source: PTX ISA 9.0, section 9.7.9: cvt, cvta, isspacep.
#include "convert.h"

namespace deepkern::ptx {
namespace {

const Forms& forms() {
  static const Forms all = [] {
    Forms forms;
    add_integer_conversions(forms);
    add_float_conversions(forms);
    return forms;
  }();
  return all;
}

void bind_cvt(Binder& binder) {
  const std::vector<std::string>& words = binder.statement.opcode;
  if (binder.count() < 2 || words.size() < 3) binder.fail("it has a wrong number of operands");
  const int width = binder.width(0);
  const auto form = forms().find(binder.statement.text());
  bool wide = form == forms().end();
  if (!wide) {
    const std::vector<uint8_t>& bits = *form->second.operands;
    wide = width == 64 && bits[0] < 64;
    for (size_t i = 1; i < bits.size() && i < binder.count(); ++i) {
      wide |= binder.width(i) == 64 && bits[i] < 64;
    }
  }
  if (!wide) {
    bind_form(binder, form->second);
  } else if (!bind_integer_conversion(binder) && !bind_number_conversion(binder)) {
    binder.fail("this conversion, or this width of its registers, is unknown");
  }
}

PTX_INLINE bool is_shared(uint64_t a) { return a >> 32 == GENERIC_SHARED_BASE >> 32; }

Status to_generic_shared(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t result[LANES];
  const uint64_t* a = warp.u64(instruction.a);
  for (int lane = 0; lane < LANES; ++lane) result[lane] = a[lane] + GENERIC_SHARED_BASE;
  blend(warp.u64(instruction.d), result, mask);
  return Status::NEXT;
}

Status from_generic_shared(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint64_t result[LANES];
  const uint64_t* a = warp.u64(instruction.a);
  for (int lane = 0; lane < LANES; ++lane) {
    if ((mask >> lane & 1) && !is_shared(a[lane])) {
      warp.fail(instruction, lane, "cvta.to.shared: the address is not one of shared memory");
    }
    result[lane] = a[lane] - GENERIC_SHARED_BASE;
  }
  blend(warp.u64(instruction.d), result, mask);
  return Status::NEXT;
}

PTX_INLINE uint64_t same_address(uint64_t a) { return a; }
PTX_INLINE bool is_global(uint64_t a) { return !is_shared(a); }

// cvta{.to}.space.u64
void bind_cvta(Binder& binder) {
  std::vector<std::string> words = binder.statement.opcode;
  if (words.back() != "u64") binder.fail("addresses have 64 bits");
  const bool to = words.size() == 4 && words[1] == "to";
  if (words.size() != 3 && !to) binder.fail("this modifier is unknown");
  const std::string& space = words[words.size() - 2];
  Instruction& instruction = binder.instruction;
  instruction.kind = Class::INTEGER;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster") {
    instruction.run = to ? from_generic_shared : to_generic_shared;
  } else if (space == "global" || space == "const" || space == "local" || space == "param" ||
             space == "param::entry") {
    instruction.run = handler_of<Lanes<same_address>>();
  } else {
    binder.fail("this state space is unknown");
  }
  if (binder.count() != 2) binder.fail("it has a wrong number of operands");
  instruction.d = binder.destination(0, 64);
  instruction.a = binder.source(1, 64);
}

// An address alone does not tell local, constant and parameter memory from global memory.
void bind_isspacep(Binder& binder) {
  static const Form shared = {handler_of<Lanes<is_shared>>(), Class::PREDICATE,
                              &Lanes<is_shared>::operands};
  static const Form global = {handler_of<Lanes<is_global>>(), Class::PREDICATE,
                              &Lanes<is_global>::operands};
  const std::string opcode = binder.statement.text();
  if (opcode == "isspacep.shared" || opcode == "isspacep.shared::cluster") {
    bind_form(binder, shared);
  } else if (opcode == "isspacep.global") {
    bind_form(binder, global);
  } else {
    binder.fail("this state space is unknown");
  }
}

}  // namespace

bool bind_convert(Binder& binder) {
  const std::string& name = binder.statement.opcode.at(0);
  if (name == "cvt") {
    bind_cvt(binder);
  } else if (name == "cvta") {
    bind_cvta(binder);
  } else if (name == "isspacep") {
    bind_isspacep(binder);
  } else {
    return false;
  }
  return true;
}

}  // namespace deepkern::ptx
