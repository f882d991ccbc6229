// y[m, i] = silu(gate[m, i]) * up[m, i]      [gate | up] = gate_up, silu(g) = g·σ(g)
//
// The factors are multiplied from left to right in float32 and the product is rounded once to the
// dtype of gate_up. Vectors and remainders run the same operations, so a value has the same bits at
// every position.
//
// Parallelization: threads take ranges of blocks of 128 columns.
//
// Limit: the exponential and the division of σ; then memory bandwidth, 6 bytes per value in bf16.
#ifndef DEEPKERN_ISA
#include "swiglu.h"

#include <algorithm>

#include "scales.h"

namespace deepkern {
namespace {

// y [M, I], contiguous, of silu(gate) * up in the dtype of gate_up.
struct Swiglu {
  RealRows gate_up;  // [M, 2I]
  int64_t I;
  void* y;
};

}  // namespace
}  // namespace deepkern

#define DEEPKERN_FILE "cpu/swiglu.cpp"
#include "every_isa.h"

namespace deepkern {
namespace {

Tensor swiglu(const Tensor& gate_up) {
  const Arguments arguments{"swiglu"};
  const Real type = arguments.check_real("gate_up", gate_up, {-1, -1});
  const int64_t M = gate_up.size(0), I = gate_up.size(1) / 2;
  arguments.require(gate_up.size(1) % 2 == 0, "gate_up", "an even number of columns");
  Tensor y = new_tensor({M, I}, gate_up.scalar_type());
  if (M * I == 0) return y;
  const Swiglu op{{gate_up.const_data_ptr(), type, gate_up.stride(0)}, I, y.mutable_data_ptr()};
  const auto swiglu_blocks = DEEPKERN_DISPATCH(swiglu_blocks);
  parallel_ranges(M * ceil_div(I, 128), 256,
                  [&](int64_t first, int64_t last) { swiglu_blocks(op, first, last); });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(deepkern_native, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }

}  // namespace
}  // namespace deepkern
#else
#include "arithmetic.h"
#include "cast_block.h"
#include "real_blocks.h"
#include "swiglu_blocks.h"

namespace deepkern::DEEPKERN_ISA {
namespace {

template <Real type>
void swiglu_blocks_of(const Swiglu& s, int64_t first, int64_t last) {
  float gate[128], up[128];
  const int64_t blocks = ceil_div(s.I, 128);
  for (int64_t i = first; i < last; ++i) {
    const int64_t m = i / blocks, column = i % blocks * 128;
    const int64_t count = std::min<int64_t>(128, s.I - column);
    const int64_t offset = m * s.gate_up.stride + column;
    load_block<type>(s.gate_up.data, offset, count, gate);
    load_block<type>(s.gate_up.data, offset + s.I, count, up);
    for (int k = 0; k < 128; k += LANES) {
      store_vector(gate + k, swiglu(load_vector<Floats>(gate + k), load_vector<Floats>(up + k)));
    }
    store_block<type>(s.y, m * s.I + column, count, gate);
  }
}

void swiglu_blocks(const Swiglu& s, int64_t first, int64_t last) {
  DEEPKERN_FOR_REAL(s.gate_up.type, swiglu_blocks_of<type>(s, first, last));
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
#endif
