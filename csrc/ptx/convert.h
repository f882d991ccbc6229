// The parts of bind_convert.
#pragma once

#include "lanes.h"

namespace deepkern::ptx {

// A key is the opcode with its modifiers.
void add_integer_conversions(Forms& forms);    // convert_integer.cpp: from and to integers
void add_float_conversions(Forms& forms);      // convert_float.cpp
bool bind_integer_conversion(Binder& binder);  // those absent from the table
bool bind_number_conversion(Binder& binder);   // between integers and floats, absent from the table

}  // namespace deepkern::ptx
