// Entry points for tests of parts that no single PTX instruction shows; called through ctypes.
#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "numbers.h"
#include "tcgen05_layout.h"
#include "tensor_core.h"

#define HOOK extern "C" __attribute__((visibility("default")))

using namespace deepkern::ptx;

namespace {

thread_local std::string last_error;

const Format& format_of(int format) {
  static const Format* const FORMATS[] = {&F16, &BF16, &TF32, &E4M3, &E5M2, &E3M2, &E2M3, &E2M1};
  return *FORMATS[format];
}

// Runs `body` and keeps the message of a failure; 1 if it failed.
template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
}

struct Touched {
  uint32_t* ranges;  // pairs of an address and a length
  int count, capacity;
};

void record(void* context, uint32_t address, uint32_t bytes) {
  auto* t = static_cast<Touched*>(context);
  if (t->count < t->capacity) {
    t->ranges[2 * t->count] = address;
    t->ranges[2 * t->count + 1] = bytes;
  }
  ++t->count;
}

// Register r of `count` registers of 32 lanes each.
template <typename Word>
std::vector<Word*> registers(Word* words, int count) {
  std::vector<Word*> pointers(count);
  for (int r = 0; r < count; ++r) pointers[r] = words + 32 * r;
  return pointers;
}

Sums sums_of(int target, Unit unit, Element a) {
  return target ? hardware_sums(target, unit, a) : FLOAT32;
}

}  // namespace

HOOK const char* deepkern_ptx_test_error() { return last_error.c_str(); }

HOOK void deepkern_ptx_test_encode(const double* x, int count, int format, int rounding,
                                   int saturate, uint32_t* codes) {
  for (int i = 0; i < count; ++i) {
    codes[i] = encode(x[i], format_of(format), static_cast<Rounding>(rounding), saturate != 0);
  }
}

// operation: 0 bf16_fma, 1 f16_fma.
HOOK void deepkern_ptx_test_fma(const uint16_t* a, const uint16_t* b, const uint16_t* c, int count,
                                int operation, uint16_t* d) {
  for (int i = 0; i < count; ++i) {
    d[i] = operation == 0 ? bf16_fma(a[i], b[i], c[i]) : f16_fma(a[i], b[i], c[i]);
  }
}

// target 0: float32 sums.
HOOK int deepkern_ptx_test_multiply(int M, int N, int K, int a, int b, const uint8_t* A,
                                    const uint8_t* B, float* D, int target, int unit, int f16) {
  return guarded([&] {
    Sums sums = sums_of(target, static_cast<Unit>(unit), static_cast<Element>(a));
    sums.f16 = f16 != 0;
    multiply_add(M, N, K, static_cast<Element>(a), static_cast<Element>(b), A, B, D, sums);
  });
}

HOOK void deepkern_ptx_test_mma(int K, int element, int accumulators, const uint32_t* a,
                                const uint32_t* b, uint32_t* d) {
  const MmaShape shape{K, static_cast<Element>(element), static_cast<Element>(element),
                       static_cast<Accumulators>(accumulators)};
  const auto left = registers(a, 4), right = registers(b, 2);
  const auto sums = registers(d, 4);
  mma_sync(shape, left.data(), right.data(), sums.data(), sums.data(), FLOAT32);
}

// flags: 1 A in registers, 2 A is MN-major, 4 B is MN-major, 8 negate A, 16 negate B,
// 32 accumulate, 64 f16 accumulators. Returns the count of ranges, -1 after a failure.
HOOK int deepkern_ptx_test_wgmma(int N, int K, int element, int flags, const uint32_t* a,
                                 uint64_t a_descriptor, uint64_t b_descriptor, uint32_t* d,
                                 const uint8_t* shared, uint32_t size, uint32_t* ranges,
                                 int capacity) {
  WgmmaShape shape{N, K, static_cast<Element>(element), static_cast<Element>(element)};
  shape.a_mn_major = flags & 2;
  shape.b_mn_major = flags & 4;
  shape.negate_a = flags & 8;
  shape.negate_b = flags & 16;
  if (flags & 64) shape.accumulators = Accumulators::F16;
  Touched touched{ranges, 0, capacity};
  const auto left = registers(a, 16);
  const auto sums = registers(d, 4 * (flags & 64 ? N / 4 : N / 2));
  const int failed = guarded([&] {
    const size_t count = sums.size() / 4;
    for (int warp = 0; warp < 4; ++warp) {
      // Each warp reads all of A and B: the ranges of one are enough.
      const SharedReader reader{shared, size, warp == 0 ? record : nullptr, &touched};
      wgmma(shape, warp, flags & 1 ? left.data() + 4 * warp : nullptr, a_descriptor, b_descriptor,
            sums.data() + warp * count, flags & 32, reader, FLOAT32);
    }
  });
  return failed ? -1 : touched.count;
}

// kind: TensorKind. cells: [128][512]. a is a descriptor, or an address if a_in_tensor_memory.
HOOK int deepkern_ptx_test_tcgen05(uint32_t instruction, int kind, uint32_t d,
                                   int a_in_tensor_memory, uint64_t a, uint64_t b, int accumulate,
                                   const uint8_t* shared, uint32_t size, uint32_t* cells) {
  return guarded([&] {
    const auto read = read_instruction_descriptor(instruction, static_cast<TensorKind>(kind));
    tcgen05_mma(read, d, a_in_tensor_memory, a, b, accumulate, SharedReader{shared, size},
                TensorMemory{cells}, FLOAT32);
  });
}

// The lane and the column of a register.
HOOK void deepkern_ptx_test_tensor_cell(int shape, int lane, int reg, int half_offset, int* cell) {
  const TensorCell c = tensor_cell(static_cast<TensorShape>(shape), lane, reg, half_offset);
  cell[0] = c.lane;
  cell[1] = c.column;
}

// rows: matrices * 8 rows of 16 bytes.
HOOK void deepkern_ptx_test_ldmatrix(int matrices, int transposed, uint8_t* rows, uint32_t* d,
                                     int store) {
  std::vector<uint8_t*> pointers(8 * matrices);
  for (int r = 0; r < 8 * matrices; ++r) pointers[r] = rows + 16 * r;
  const auto words = registers(d, matrices);
  if (store) {
    stmatrix(matrices, transposed, pointers.data(), words.data());
  } else {
    ldmatrix(matrices, transposed, pointers.data(), words.data());
  }
}
