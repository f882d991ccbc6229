// The parts of bind_arithmetic.
#pragma once

#include "lanes.h"

namespace deepkern::ptx {

// Ends the name of a form that has three sources where the opcode has a form with two as well.
// Such a form needs sm_100 or newer.
constexpr const char* THREE_SOURCES = " d, a, b, c";

void add_integer_forms(Forms& forms);  // arithmetic_integer.cpp
void add_logic_forms(Forms& forms);    // logic.cpp: bits, shifts, prmt
void add_float_forms(Forms& forms);    // arithmetic_float.cpp: f32, f64, f32x2
void add_half_forms(Forms& forms);     // arithmetic_half.cpp: f16, bf16, packed
void add_special_forms(Forms& forms);  // special.cpp: ex2, rcp, sqrt, ...

bool bind_compare(Binder& binder);  // compare.cpp: setp, set, selp, slct
bool bind_move(Binder& binder);     // move.cpp: mov
bool bind_logic(Binder& binder);    // logic.cpp: predicates, lop3, prmt by an immediate

}  // namespace deepkern::ptx
