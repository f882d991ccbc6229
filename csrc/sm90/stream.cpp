// Which CUDA stream is current, as torch's CUDA build says. That is looked up by name in what
// `import torch` has loaded, not linked: one file serves builds of torch with CUDA and without, and
// where it was built does not matter.
#include <dlfcn.h>

#include <cstdint>

#include "launch.h"

namespace deepkern {

bool current_stream(int device, void** stream) {
  using Find = int32_t (*)(int32_t device, void** stream);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  static void* const found =
      library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return found && reinterpret_cast<Find>(found)(device, stream) == 0;
}

}  // namespace deepkern
