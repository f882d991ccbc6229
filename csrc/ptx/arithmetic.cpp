// Instructions that compute registers from registers.
//
// A table holds each opcode with all its modifiers. An instruction that is absent from the table
// is rejected, so that no modifier is ignored.
// Source: PTX ISA 9.0, sections 9.7.1 to 9.7.8.
#include "arithmetic.h"

namespace deepkern::ptx {
namespace {

const Forms& forms() {
  static const Forms all = [] {
    Forms forms;
    add_integer_forms(forms);
    add_logic_forms(forms);
    add_float_forms(forms);
    add_half_forms(forms);
    add_special_forms(forms);
    return forms;
  }();
  return all;
}

bool is_known(const std::string& opcode) {
  for (const auto& entry : forms()) {
    if (entry.first.compare(0, opcode.size() + 1, opcode + ".") == 0) return true;
  }
  return false;
}

}  // namespace

void bind_form(Binder& binder, const Form& form) {
  const std::vector<uint8_t>& bits = *form.operands;
  if (binder.count() != bits.size()) {
    binder.fail("it has " + std::to_string(binder.count()) + " operands instead of " +
                std::to_string(bits.size()));
  }
  Instruction& instruction = binder.instruction;
  int32_t* slots[] = {&instruction.a, &instruction.b, &instruction.c, &instruction.e};
  instruction.run = form.run;
  instruction.kind = form.kind;
  instruction.d = bits[0] == 1 ? binder.predicate(0) : binder.destination(0, bits[0]);
  if (instruction.d < 0) binder.fail("its destination is not a register");
  for (size_t i = 1; i < bits.size(); ++i) {
    *slots[i - 1] =
        bits[i] == 1 ? bind_predicate_source(binder, i, false) : binder.source(i, bits[i]);
  }
}

int bind_predicate_source(Binder& binder, size_t operand, bool negatable) {
  OperandText text = binder.statement.operands.at(operand);
  bool invert = text.negated;
  if (invert && !negatable) binder.fail("its predicate cannot be negated");
  text.negated = false;
  int slot = -1;
  if (text.kind == OperandText::IMMEDIATE) {
    invert ^= text.bits != 0;
  } else {
    slot = binder.predicate(text);
    if (slot < 0) binder.fail("operand " + std::to_string(operand) + " is not a predicate");
  }
  if (invert) binder.instruction.mode |= INVERT;
  return slot;
}

bool bind_arithmetic(Binder& binder) {
  if (bind_move(binder) || bind_compare(binder) || bind_logic(binder)) return true;
  auto form = forms().find(binder.statement.text());
  if (binder.count() == 4 && binder.target() >= 100) {
    const auto longer = forms().find(binder.statement.text() + THREE_SOURCES);
    if (longer != forms().end()) form = longer;
  }
  if (form == forms().end()) {
    if (is_known(binder.statement.opcode.at(0))) {
      binder.fail("this combination of modifiers is unknown");
    }
    return false;
  }
  bind_form(binder, form->second);
  return true;
}

}  // namespace deepkern::ptx
