// WGMMA: D[64, N] += A[64, K] · B[N, K]ᵀ by a warpgroup, asynchronously.
#include <algorithm>
#include <array>
#include <cmath>

#include "primitives.h"

namespace emulator {
namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

float from_e4m3(uint8_t code) {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> t{};
    for (int i = 0; i < 256; ++i) {
      const int exponent = i >> 3 & 15, mantissa = i & 7;
      float x = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
      if ((i & 127) == 127) x = NAN;
      t[i] = i & 128 ? -x : x;
    }
    return t;
  }();
  return table[code];
}

// A tile in shared memory as a descriptor names it, in rows of 128 bytes, swizzled. By row: the
// values of one row stand together; else those of one column of K, 64 of them to a row.
struct Tile {
  const Block& block;
  uint32_t start, leading, stride;
  int element;
  bool by_row;

  Tile(const Block& b, uint64_t descriptor, int bytes, bool rows)
      : block(b),
        start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        element(bytes),
        by_row(rows) {
    if (descriptor >> 62 != 1) fail("wgmma: descriptor: expected the 128-byte swizzle");
    // Else the descriptor's base offset would have to say where the pattern of 8 rows begins.
    if (start >> 7 & 7) fail("wgmma: a tile begins at a multiple of 8 rows of 128 bytes");
  }

  float at(int row, int k) const {
    uint32_t place = start;
    if (by_row) {
      place += row / 8 * stride + row % 8 * 128 + k * element;
    } else {
      place += row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * element;
    }
    place ^= (place >> 7 & 7) << 4;
    block.offset(block.shared + place, element, "wgmma");
    if (block.dirty[place]) {
      fail("wgmma reads shared memory at offset " + std::to_string(place) + ", which thread " +
           std::to_string(block.dirty[place] - 1) + " wrote and no fence_async_proxy followed");
    }
    if (element == 1) return from_e4m3(static_cast<uint8_t>(block.shared[place]));
    uint16_t bits;
    std::memcpy(&bits, block.shared + place, 2);
    return from_bf16(bits);
  }
};

// Row and column that accumulator `i` of thread `t` of a warpgroup holds.
int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// The sum as a tensor core makes it that keeps `bits` of it: what lies further below the largest
// summand is cut off. 0: in float32.
float sum(const float* a, const float* b, int K, float before, int bits) {
  if (bits == 0) {
    double exact = 0;
    for (int k = 0; k < K; ++k) exact += double{a[k]} * b[k];
    return static_cast<float>(before + exact);
  }
  double largest = std::fabs(before);
  for (int k = 0; k < K; ++k) largest = std::max(largest, std::fabs(double{a[k]} * b[k]));
  if (largest == 0 || !std::isfinite(largest)) {
    return sum(a, b, K, before, 0);
  }
  const double unit = std::ldexp(1.0, std::ilogb(largest) - bits + 1);
  double kept = std::trunc(before / unit);
  for (int k = 0; k < K; ++k) kept += std::trunc(double{a[k]} * b[k] / unit);
  return static_cast<float>(kept * unit);
}

void execute(Block& block, int group, const Wgmma& w) {
  const Tile b(block, w.b, w.fp8 ? 1 : 2, w.b_by_row);
  std::vector<float> left(64 * w.K), right(w.N * w.K);
  for (int n = 0; n < w.N; ++n) {
    for (int k = 0; k < w.K; ++k) right[n * w.K + k] = b.at(n, k);
  }
  if (w.a_in_registers) {  // bf16: as accumulators of a product of 16 columns, in pairs
    for (int t = 0; t < WARPGROUP; ++t) {
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = w.a_registers[t * 4 + i / 2];
        left[accumulator_row(t, i) * w.K + accumulator_column(t, i)] =
            from_bf16(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair));
      }
    }
  } else {
    const Tile a(block, w.a, w.fp8 ? 1 : 2, w.a_by_row);
    for (int m = 0; m < 64; ++m) {
      for (int k = 0; k < w.K; ++k) left[m * w.K + k] = a.at(m, k);
    }
  }
  const int bits = w.fp8 ? block.launch().accumulator_bits : 0;
  for (int t = 0; t < WARPGROUP; ++t) {
    auto& values = block.threads[group * WARPGROUP + t]->accumulators.at(w.accumulators[t]).values;
    for (int i = 0; i < w.N / 2; ++i) {
      const float* row = &left[accumulator_row(t, i) * w.K];
      const float* column = &right[accumulator_column(t, i) * w.K];
      values[i] = sum(row, column, w.K, w.accumulate ? values[i] : 0.0f, bits);
    }
  }
}

bool same(const Wgmma& x, const Wgmma& y) {
  return x.N == y.N && x.K == y.K && x.fp8 == y.fp8 && x.accumulate == y.accumulate &&
         x.a == y.a && x.b == y.b && x.a_in_registers == y.a_in_registers &&
         x.a_by_row == y.a_by_row && x.b_by_row == y.b_by_row;
}

}  // namespace
}  // namespace emulator

namespace sm90 {

using emulator::current;
using emulator::fail;
using emulator::Thread;
using emulator::WARPGROUP;
using emulator::Wgmma;

uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes) {
  if ((shared_address(tile) | leading_bytes | stride_bytes) % 16) {
    fail("matrix_descriptor: addresses and distances are multiples of 16 bytes");
  }
  if (leading_bytes >> 18 || stride_bytes >> 18) {
    fail("matrix_descriptor: distances have 14 bits, of 16 bytes");
  }
  const uint64_t start = shared_address(tile) >> 4 & 0x3fff;
  return start | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}

void wgmma_fence() { current().fenced = true; }

void wgmma_issue(Wgmma operation, float* accumulators, const uint32_t* a) {
  Thread& t = current();
  emulator::Block* block = t.block;
  emulator::Machine* m = block->machine;
  const int N = operation.N, group = t.group(), mine = t.index % WARPGROUP;
  if (N % 8 || N < 8 || N > 256) fail("wgmma: N = " + std::to_string(N));
  auto found = t.accumulators.find(accumulators);
  if (found == t.accumulators.end()) {
    if (!t.fenced) fail("wgmma: no wgmma_fence since its registers were last written");
    std::vector<float> values(accumulators, accumulators + N / 2);
    found = t.accumulators.emplace(accumulators, emulator::InFlight{std::move(values), 0}).first;
    // Until it is waited for, nobody may look.
    std::fill_n(accumulators, N / 2, NAN);
  }
  const uint64_t number = t.issued++;
  found->second.last = number;
  auto& g = block->groups[group];
  Wgmma& w = g.operations[number];
  if (w.arrived == 0) {
    w = operation;
    w.accumulators.resize(WARPGROUP);
    w.a_registers.resize(a ? 4 * WARPGROUP : 0);
  } else if (!emulator::same(w, operation)) {
    fail("wgmma: other operands than those of the warpgroup's other threads");
  }
  w.accumulators[mine] = accumulators;
  if (a) std::copy_n(a, 4, &w.a_registers[mine * 4]);
  if (++w.arrived < WARPGROUP) return;
  block->cluster->add(
      [=, &g] {
        emulator::execute(*block, group, g.operations.at(number));
        g.operations.erase(number);
        g.executed = number + 1;
        m->wake(g.done);
      },
      block->rank * 8 + group);
}

void wgmma_commit() {
  current().commits.push_back(current().issued);
  current().block->machine->pause(8);
}

void wgmma_wait_groups(int left) {
  Thread& t = current();
  const int count = static_cast<int>(t.commits.size()) - left;
  if (count <= 0) return;
  const uint64_t target = t.commits[count - 1];
  auto& g = t.block->groups[t.group()];
  t.block->machine->wait(g.done, [] { return "WGMMA"; }, [&] { return g.executed >= target; });
  t.commits.erase(t.commits.begin(), t.commits.begin() + count);
  for (auto i = t.accumulators.begin(); i != t.accumulators.end();) {
    if (i->second.last < target) {
      std::copy(i->second.values.begin(), i->second.values.end(), i->first);
      i = t.accumulators.erase(i);
      t.fenced = false;
    } else {
      ++i;
    }
  }
}

}  // namespace sm90
