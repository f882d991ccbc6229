// The parts of bind_convert.
#pragma once

#include "lanes.h"

namespace deepkern::ptx {

// A key is the opcode with its modifiers. "/16" or "/32" follows where a narrow signed result is
// sign-extended to a register of that width.
void add_integer_conversions(Forms& forms);  // convert_integer.cpp: from and to integers
void add_float_conversions(Forms& forms);  // convert_float.cpp
bool bind_integer_conversion(Binder& binder);  // the forms that are absent from the table

}  // namespace deepkern::ptx
