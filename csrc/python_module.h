// The entry point of a Python module that has no contents: importing it loads the library, and that
// runs the registrations in it.
//
// Written out by hand so that building needs a compiler and torch, but not Python's headers (on
// Debian a package of their own). The layout of PyModuleDef is part of Python's stable ABI: it is
// the same in every version from 3.2 on, free-threaded builds aside, which have no stable ABI.
#pragma once

#include <cstdint>

namespace deepkern {

struct PyModuleDef {
  intptr_t refcount;  // this and the next four are PyModuleDef_Base, which Python fills in
  void* type;
  void* (*init)();
  intptr_t index;
  void* copy;
  const char* name;
  const char* doc;
  intptr_t size;
  void *methods, *slots, *traverse, *clear, *free;
};

}  // namespace deepkern

extern "C" void* PyModule_Create2(deepkern::PyModuleDef* definition, int abi_version);

#define DEEPKERN_EMPTY_PYTHON_MODULE(NAME)                                               \
  extern "C" __attribute__((visibility("default"))) void* PyInit_##NAME() {              \
    static deepkern::PyModuleDef definition = {1,       nullptr, nullptr, 0,             \
                                               nullptr, #NAME,   nullptr, -1,            \
                                               nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create2(&definition, 3); /* 3: built for the stable ABI */           \
  }
