// Small kernels for the tests of the primitives that fp8_gemm_nt does not use.
#include "../primitives.h"

#include <cstdio>
#include <functional>

using namespace sm90;
using emulator::Launch;

namespace {

int guarded(const Launch& launch, const std::function<void()>& kernel, char* message, int room) {
  try {
    emulator::Machine(launch, kernel).run();
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
  return 0;
}

Barrier* new_barrier(char* at, int count) {
  auto* barrier = reinterpret_cast<Barrier*>(at);
  if (thread_index() == 0) {
    barrier_init(barrier, count);
    barrier_init_fence();
  }
  block_sync();
  return barrier;
}

}  // namespace

extern "C" {

// out[64, 64] = A · Bᵀ in bf16: A [64, 64] by rows, B [64, 64] by rows (b_by_row) or as its
// transpose lies, A through shared memory or through registers.
int emulate_bf16_product(char* a, char* b, float* out, bool b_by_row, bool a_in_registers,
                         uint64_t seed, char* message, int room) {
  const TensorMap a_map{a, 64, 64, 128, 64, 64, 2, true}, b_map{b, 64, 64, 128, 64, 64, 2, true};
  Launch launch;
  launch.shared_bytes = 2 * 8192 + 16;
  launch.seed = seed;
  return guarded(launch, [&] {
    char *memory = shared_memory(), *right = memory + 8192;
    Barrier* full = new_barrier(memory + 2 * 8192, 1);
    if (thread_index() == 0) {
      barrier_arrive_expect(full, 2 * 8192);
      tma_load(memory, &a_map, full, 0, 0);
      tma_load(right, &b_map, full, 0, 0);
    }
    const int t = thread_index(), row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    float d[32];
    barrier_wait(full, 0);
    wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      uint32_t pairs[4];
      for (int i = 0; i < 4; ++i) {
        const int at = (row + i % 2 * 8) * 64 + k + i / 2 * 8 + column;
        std::memcpy(&pairs[i], a + at * 2, 4);
      }
      const uint64_t left = matrix_descriptor(memory + k * 2, 0, 1024);
      const uint64_t rows = matrix_descriptor(right + k * 2, 0, 1024);
      const uint64_t columns = matrix_descriptor(right + k * 128, 8192, 1024);
      if (a_in_registers && b_by_row) wgmma_bf16<64, true>(d, pairs, rows, k > 0);
      if (a_in_registers && !b_by_row) wgmma_bf16<64, false>(d, pairs, columns, k > 0);
      if (!a_in_registers && b_by_row) wgmma_bf16<64, true, true>(d, left, rows, k > 0);
      if (!a_in_registers && !b_by_row) wgmma_bf16<64, true, false>(d, left, columns, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 32; ++i) {
      out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
    }
  }, message, room);
}

// out[256] 16-bit values: a 16x16 tile through store_matrix_x4, value = 16 row + column.
int emulate_store_matrix(uint16_t* out, uint64_t seed, char* message, int room) {
  Launch launch;
  launch.threads = 32;
  launch.shared_bytes = 512;
  launch.seed = seed;
  return guarded(launch, [&] {
    const int lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
    uint32_t parts[4];  // top left, top right, bottom left, bottom right
    for (int m = 0; m < 4; ++m) {
      const uint32_t first = (row + m / 2 * 8) * 16 + column + m % 2 * 8;
      parts[m] = first | (first + 1) << 16;
    }
    char* to = shared_memory() + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16;
    store_matrix_x4(to, parts[0], parts[1], parts[2], parts[3]);
    warp_sync();
    for (int i = lane; i < 256; i += 32) out[i] = load_shared<uint16_t>(shared_memory() + 2 * i);
  }, message, room);
}

// out[32] = in, by a bulk copy; its sum, added up by shuffles, in out[32]; lane 5's in out[33].
int emulate_bulk_load_and_shuffles(const float* in, float* out, uint64_t seed, char* message,
                                   int room) {
  Launch launch;
  launch.threads = 32;
  launch.shared_bytes = 144;
  launch.seed = seed;
  return guarded(launch, [&] {
    char* memory = shared_memory();
    Barrier* full = new_barrier(memory + 128, 1);
    if (thread_index() == 0) {
      barrier_arrive_expect(full, 128);
      bulk_load(memory, in, 128, full);
    }
    barrier_wait(full, 0);
    const int lane = lane_index();
    const float mine = load_shared<float>(memory + 4 * lane);
    float sum = mine;
    for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
    out[lane] = mine;
    if (lane == 0) out[32] = sum;
    const int fifth = shuffle_from(static_cast<int>(mine), 5);
    if (lane == 31) out[33] = static_cast<float>(fifth);
  }, message, room);
}

// What `misuse` names; each must be refused.
int emulate_misuse(int misuse, char* message, int room) {
  Launch launch;
  launch.threads = 256;
  launch.shared_bytes = misuse == 0 ? 232449 : 4096;
  if (misuse == 1) launch.registers = 256;
  return guarded(launch, [&] {
    char* memory = shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(memory);
    const bool first = thread_index() == 0;
    if (misuse == 2 && first) barrier_arrive(barrier);
    if (misuse == 3 && first) barrier_init(barrier, 0);
    if (misuse == 4) {
      if (first) barrier_init(barrier, 1);
      block_sync();
      barrier_wait(barrier, 0);
    }
    if (misuse == 5 && thread_index() < 128) named_barrier_sync(3, 256);
    if (misuse == 6) named_barrier_sync(16, 256);
    if (misuse == 7) named_barrier_sync(2, thread_index() < 128 ? 128 : 160);
    if (misuse == 8 && first) store_shared(memory + 4093, 1.0f);
    if (misuse == 9 && thread_index() < 31) warp_sync();
    if (misuse == 10) cluster_wait();
    if (misuse == 11 && first) *reinterpret_cast<char*>(memory + 4100) = 0;
    if (misuse == 12 && first) {
      barrier_init(barrier, 1);
      barrier_init(barrier, 1);
    }
    if (misuse == 13 && first) throw std::runtime_error("a kernel's own exception");
  }, message, room);
}

}  // extern "C"
