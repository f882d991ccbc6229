// Torch's current CUDA stream. The function is looked up at run time in the libraries that
// `import torch` has loaded, so the package links to no CUDA library and one build works with torch
// builds with and without CUDA.
#include <dlfcn.h>

#include <cstdint>

#include "launch.h"

namespace deepkern {

bool current_stream(int device, void** stream) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  static void* const function =
      library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return function && reinterpret_cast<GetStream>(function)(device, stream) == 0;
}

}  // namespace deepkern
