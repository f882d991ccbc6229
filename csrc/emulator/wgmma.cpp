// WGMMA: D[64, N] += A[64, K] · B[N, K]ᵀ by a warpgroup, asynchronously.
//
// How: the last of the 128 threads to issue it schedules the product, which reads A and B through
// their descriptors when it runs. The accumulators stay in the machine until wgmma_wait. Products
// are added as Hopper's tensor core adds them (../ptx/tensor_core.h), so results have its bits as
// far as MMA-Sim models them.
//
// Limit: the sums of the hardware, 64 * N * K terms aligned one by one, and the address arithmetic
// of each operand.
#include <algorithm>
#include <cmath>

#include "../ptx/tensor_core.h"
#include "calls.h"
#include "primitives.h"

namespace emulator {
namespace {

// An operand in shared memory, given by its matrix descriptor: rows of 128 bytes, swizzled. In a
// K-major operand such a row has consecutive k of one matrix row, else 64 matrix rows at one k.
struct Tile {
  const Block& block;
  const std::vector<Clock>& clocks;  // of the warps that issued the WGMMA
  uint32_t start, leading, stride;
  int element_bytes;
  bool k_major;

  Tile(const Block& b, const Wgmma& w, uint64_t descriptor, bool k_major)
      : block(b),
        clocks(w.clocks),
        start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        element_bytes(w.fp8 ? 1 : 2),
        k_major(k_major) {
    constexpr uint64_t RESERVED = 0x3ff1c000c000c000;  // bits 14, 15, 30, 31, 46-48 and 52-61
    if (descriptor & RESERVED) fail("wgmma: descriptor: a reserved bit is set");
    if (descriptor >> 49 & 7) fail("wgmma: descriptor: expected base offset 0");
    if (descriptor >> 62 != 1) fail("wgmma: descriptor: expected the 128-byte swizzle");
    // The descriptor's base offset, which could shift the swizzle pattern, is not emulated.
    if (start >> 7 & 7) fail("wgmma: descriptor: expected a tile aligned to 8 rows of 128 bytes");
  }

  // 16 bytes that start with the element (row, k), checked.
  const char* chunk(int row, int k) const {
    uint32_t offset = start;
    if (k_major) {
      offset += row / 8 * stride + row % 8 * 128 + k * element_bytes;
    } else {
      offset += row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * element_bytes;
    }
    offset = swizzled(offset);
    block.offset(block.shared + offset, 16, "wgmma");
    block.records.async_load(offset, 16, "wgmma", clocks);
    return block.shared + offset;
  }

  // [rows, K] elements without gaps.
  std::vector<uint8_t> codes(int rows, int K) const {
    std::vector<uint8_t> codes(static_cast<size_t>(rows) * K * element_bytes);
    const int width = 16 / element_bytes;
    for (int row = 0; k_major && row < rows; ++row) {
      for (int k = 0; k < K; k += width) {
        std::memcpy(&codes[(row * K + k) * element_bytes], chunk(row, k), 16);
      }
    }
    for (int k = 0; !k_major && k < K; ++k) {
      for (int row = 0; row < rows; row += width) {
        const char* from = chunk(row, k);
        for (int i = 0; i < width; ++i) {
          std::memcpy(&codes[((row + i) * K + k) * element_bytes], from + i * element_bytes,
                      element_bytes);
        }
      }
    }
    return codes;
  }
};

// The row and the column of D of accumulator `i` of thread `t` of a warpgroup.
int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// A [64, 16] of bf16 or fp16 from registers: pairs, in the layout of accumulators with N = 16.
std::vector<uint8_t> codes_of_registers(const Wgmma& w) {
  std::vector<uint8_t> codes(64 * w.K * 2);
  for (int t = 0; t < WARPGROUP_SIZE; ++t) {
    for (int i = 0; i < 8; i += 2) {
      const int at = accumulator_row(t, i) * w.K + accumulator_column(t, i);
      std::memcpy(&codes[at * 2], &w.a_registers[t * 4 + i / 2], 4);
    }
  }
  return codes;
}

void execute(Block& block, int group, const Wgmma& w) {
  using deepkern::ptx::Element;
  const Element element = w.fp8 ? Element::E4M3 : w.fp16 ? Element::F16 : Element::BF16;
  const std::vector<uint8_t> left = w.a_in_registers
                                        ? codes_of_registers(w)
                                        : Tile(block, w, w.a, w.a_k_major).codes(64, w.K);
  const std::vector<uint8_t> right = Tile(block, w, w.b, w.b_k_major).codes(w.N, w.K);
  std::vector<float> sums(64 * w.N);
  const auto for_each = [&](auto move) {
    for (int t = 0; t < WARPGROUP_SIZE; ++t) {
      Thread& thread = *block.threads[group * WARPGROUP_SIZE + t];
      auto& values = thread.accumulators.at(w.accumulators[t]).values;
      for (int i = 0; i < w.N / 2; ++i) {
        move(values[i], sums[accumulator_row(t, i) * w.N + accumulator_column(t, i)]);
      }
    }
  };
  if (w.accumulate) for_each([](float& value, float& sum) { sum = value; });
  const auto rule = deepkern::ptx::hardware_sums(90, deepkern::ptx::Unit::WGMMA, element);
  deepkern::ptx::multiply_add(64, w.N, w.K, element, element, left.data(), right.data(),
                              sums.data(), rule);
  for_each([](float& value, float& sum) { value = sum; });
}

bool same_operands(const Wgmma& x, const Wgmma& y) {
  return x.N == y.N && x.K == y.K && x.fp8 == y.fp8 && x.fp16 == y.fp16 &&
         x.accumulate == y.accumulate && x.a == y.a && x.b == y.b &&
         x.a_in_registers == y.a_in_registers && x.a_k_major == y.a_k_major &&
         x.b_k_major == y.b_k_major;
}

}  // namespace
}  // namespace emulator

namespace sm90 {

using emulator::current;
using emulator::fail;
using emulator::Thread;
using emulator::WARPGROUP_SIZE;
using emulator::Wgmma;

uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes) {
  if ((shared_address(tile) | leading_bytes | stride_bytes) % 16) {
    fail("matrix_descriptor: address and strides must be multiples of 16 bytes");
  }
  if (leading_bytes >> 18 || stride_bytes >> 18) {
    fail("matrix_descriptor: expected strides below 2^18 bytes");
  }
  const uint64_t start = shared_address(tile) >> 4 & 0x3fff;
  return start | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}

void wgmma_fence() {
  Thread& t = current();
  emulator::converge("wgmma_fence");
  t.fenced_stack.assign(static_cast<const char*>(__builtin_frame_address(0)),
                        t.fiber->stack_end());
  t.written_accumulators.clear();
}

namespace {

// Fails unless the thread has left the accumulators as they were at its last wgmma_fence.
void check_fence(Thread& t, const float* accumulators, size_t bytes) {
  const char* p = reinterpret_cast<const char*>(accumulators);
  const char* end = t.fiber->stack_end();
  const auto depth = static_cast<size_t>(end - p);
  const bool fenced = !t.fenced_stack.empty() &&
                      t.written_accumulators.count(const_cast<float*>(accumulators)) == 0;
  if (!fenced) fail("wgmma: no wgmma_fence since its registers were last written");
  if (p >= end || depth > t.fenced_stack.size()) return;  // declared since, or not on the stack
  if (std::memcmp(p, &*(t.fenced_stack.end() - static_cast<std::ptrdiff_t>(depth)), bytes)) {
    fail("wgmma: its accumulators were written after the last wgmma_fence");
  }
}

}  // namespace

void wgmma_issue(Wgmma operation, float* accumulators, const uint32_t* a) {
  Thread& t = current();
  emulator::Block* block = t.block;
  emulator::Machine* m = block->machine;
  const int N = operation.N, group = t.group(), rank = t.index % WARPGROUP_SIZE;
  if (N % 8 || N < 8 || N > 256) {
    fail("wgmma: N: expected a multiple of 8 up to 256, got " + std::to_string(N));
  }
  emulator::converge("wgmma");
  auto found = t.accumulators.find(accumulators);
  if (found == t.accumulators.end()) {
    check_fence(t, accumulators, static_cast<size_t>(N / 2) * sizeof(float));
    std::vector<float> values(accumulators, accumulators + N / 2);
    found = t.accumulators
                .emplace(accumulators, emulator::PendingAccumulators{std::move(values), 0})
                .first;
    std::fill_n(accumulators, N / 2, NAN);  // until wgmma_wait
  }
  const uint64_t number = t.wgmmas_issued++;
  found->second.last_wgmma = number;
  auto& g = block->groups[group];
  Wgmma& w = g.wgmmas[number];
  if (w.issued == 0) {
    w = operation;
    w.accumulators.resize(WARPGROUP_SIZE);
    w.a_registers.resize(a ? 4 * WARPGROUP_SIZE : 0);
  } else if (!emulator::same_operands(w, operation)) {
    fail("wgmma: the threads of the warpgroup issue different operands");
  }
  w.accumulators[rank] = accumulators;
  if (a) std::copy_n(a, 4, &w.a_registers[rank * 4]);
  if (t.lane() == 0) w.clocks.push_back(t.clock);
  if (++w.issued < WARPGROUP_SIZE) return;
  block->cluster->schedule(
      [=, &g] {
        emulator::execute(*block, group, g.wgmmas.at(number));
        g.wgmmas.erase(number);
        g.executed = number + 1;
        m->wake(g.waiters);
      },
      block->rank * 8 + group);
}

void wgmma_commit() {
  emulator::converge("wgmma_commit");
  current().wgmma_commits.push_back(current().wgmmas_issued);
  current().block->machine->maybe_yield(8);
}

void wgmma_wait_groups(int pending) {
  Thread& t = current();
  emulator::converge_and_wait("wgmma_wait", static_cast<uint64_t>(pending));
  const int count = static_cast<int>(t.wgmma_commits.size()) - pending;
  if (count <= 0) return;
  const uint64_t target = t.wgmma_commits[count - 1];
  auto& g = t.block->groups[t.group()];
  t.block->machine->wait(g.waiters, [] { return "WGMMA"; }, [&] { return g.executed >= target; });
  t.wgmma_commits.erase(t.wgmma_commits.begin(), t.wgmma_commits.begin() + count);
  for (auto i = t.accumulators.begin(); i != t.accumulators.end();) {
    if (i->second.last_wgmma < target) {
      std::copy(i->second.values.begin(), i->second.values.end(), i->first);
      t.written_accumulators.insert(i->first);
      i = t.accumulators.erase(i);
    } else {
      ++i;
    }
  }
}

}  // namespace sm90
