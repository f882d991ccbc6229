#include "tensors.h"

namespace deepkern {

bool poison_new_tensors = false;

}  // namespace deepkern

extern "C" __attribute__((visibility("default"))) void deepkern_poison_new_tensors(int enable) {
  deepkern::poison_new_tensors = enable != 0;
}
