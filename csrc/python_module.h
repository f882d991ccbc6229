// The entry point of an empty Python module: importing it loads the library, and loading it runs
// the op registrations in it.
//
// The declarations are copied by hand so that the build needs a compiler and torch, but not
// Python's headers, which Debian ships in a separate package. The layout of PyModuleDef is part of
// Python's stable ABI: it is the same in every version from 3.2 on. Free-threaded builds have no
// stable ABI and are not supported.
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
