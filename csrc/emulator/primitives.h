// The primitives of csrc/sm90/primitives.cuh, implemented by the emulated machine of machine.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

#define SM90_DEVICE inline
#define SM90_KERNEL(threads, blocks) inline
#define SM90_PARAMETER const

namespace sm90 {

using TensorMap = emulator::TensorMap;
struct Barrier {
  uint64_t word;
};

// The bits of a bfloat16 and of a float16.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
bf16 to_bf16(float x);
fp16 to_fp16(float x);
float to_float(bf16 x);
float to_float(fp16 x);
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t pack(bf16 low, bf16 high) { return low.bits | uint32_t{high.bits} << 16; }
inline uint32_t pack(fp16 low, fp16 high) { return low.bits | uint32_t{high.bits} << 16; }
inline bf16 low_bf16(uint32_t pair) { return {static_cast<uint16_t>(pair)}; }
inline bf16 high_bf16(uint32_t pair) { return {static_cast<uint16_t>(pair >> 16)}; }
inline fp16 low_fp16(uint32_t pair) { return {static_cast<uint16_t>(pair)}; }
inline fp16 high_fp16(uint32_t pair) { return {static_cast<uint16_t>(pair >> 16)}; }
inline uint32_t pack_bf16(float low, float high) { return pack(to_bf16(low), to_bf16(high)); }
inline uint32_t pack_fp16(float low, float high) { return pack(to_fp16(low), to_fp16(high)); }
uint32_t e4m3_to_fp16(uint16_t codes);
uint32_t multiply_fp16(uint32_t x, uint32_t y);

// Indices.
inline int thread_index() { return emulator::current().index; }
inline int warp_index() { return emulator::current().warp(); }
inline int lane_index() { return emulator::current().lane(); }
inline int not_before(int x) { return x; }
inline int block_index() { return emulator::current().block->index; }
inline int block_count() { return emulator::current().block->launch().blocks; }
inline int cluster_rank() { return emulator::current().block->rank; }
bool elect_one();

// Shared memory.
char* shared_memory();
uint32_t shared_address(const void* p);
void store_shared_bytes(void* p, const void* value, uint32_t bytes);
void load_shared_bytes(const void* p, void* value, uint32_t bytes);
template <class T>
void store_shared(void* p, T value) {
  store_shared_bytes(p, &value, sizeof(T));
}
template <class T>
T load_shared(const void* p) {
  T value;
  load_shared_bytes(p, &value, sizeof(T));
  return value;
}
struct alignas(16) Chunk {
  union {
    uint16_t half[8];
    uint32_t word[4];
  };
};
struct alignas(8) Words {
  uint32_t word[2];
};
struct alignas(8) FloatPair {
  float low, high;
};
struct alignas(16) Floats {
  float value[4];
};
Floats load_shared_at(const void* p, int rank);
void store_matrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void fence_async_proxy();

// Mbarriers, in shared memory.
void barrier_init(Barrier* barrier, int count);
void barrier_init_fence();
void barrier_arrive(Barrier* barrier);
void barrier_arrive_remote(Barrier* barrier, int rank);
void barrier_arrive_release_cluster(Barrier* barrier, int rank);
void barrier_arrive_expect(Barrier* barrier, uint32_t bytes);
void barrier_wait(Barrier* barrier, uint32_t parity);
void barrier_wait_acquire_cluster(Barrier* barrier, uint32_t parity);

// Thread barriers.
void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);
void block_sync();
void warp_sync();
void cluster_arrive();
void cluster_wait();
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// TMA.
inline void prefetch(const TensorMap*) {}
void tma_load(void* to, const TensorMap* map, Barrier* barrier, int column, int row);
void tma_load_multicast(void* to, const TensorMap* map, Barrier* barrier, int column, int row,
                        uint16_t ranks);
void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier);
void tma_store(const TensorMap* map, const void* from, int column, int row);
void tma_store_commit();
void tma_store_wait_groups(int pending, bool reads_only);
template <int PENDING>
void tma_store_wait_read() {
  tma_store_wait_groups(PENDING, true);
}
template <int PENDING>
void tma_store_wait() {
  tma_store_wait_groups(PENDING, false);
}

// WGMMA.
uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes);
inline uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}
template <int N>
void keep_order(float (&)[N]) {}
void wgmma_fence();
template <int N>
void wgmma_fence(float (&d)[N]) {
  asm volatile("" ::"r"(&d[0]) : "memory");  // they are written before the fence here, too
  wgmma_fence();
}
void wgmma_commit();
void wgmma_wait_groups(int pending);
template <int PENDING>
void wgmma_wait() {
  wgmma_wait_groups(PENDING);
}
void wgmma_issue(emulator::Wgmma operation, float* accumulators, const uint32_t* a);

template <int N>
void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulator::Wgmma w;
  w.N = N, w.K = 32, w.fp8 = true, w.accumulate = accumulate, w.a = a, w.b = b;
  wgmma_issue(w, d, nullptr);
}
template <bool FP16, int N, bool A_K_MAJOR, bool B_K_MAJOR>
void wgmma_16_bits(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulator::Wgmma w;
  w.N = N, w.K = 16, w.fp16 = FP16, w.accumulate = accumulate, w.a = a, w.b = b;
  w.a_k_major = A_K_MAJOR, w.b_k_major = B_K_MAJOR;
  wgmma_issue(w, d, nullptr);
}
template <bool FP16, int N, bool B_K_MAJOR>
void wgmma_16_bits(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::Wgmma w;
  w.N = N, w.K = 16, w.fp16 = FP16, w.accumulate = accumulate, w.a_in_registers = true, w.b = b;
  w.b_k_major = B_K_MAJOR;
  wgmma_issue(w, d, a);
}
template <int N, bool A_K_MAJOR = true, bool B_K_MAJOR = true>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_16_bits<false, N, A_K_MAJOR, B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool B_K_MAJOR = true>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  wgmma_16_bits<false, N, B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool A_K_MAJOR = true, bool B_K_MAJOR = true>
void wgmma_fp16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_16_bits<true, N, A_K_MAJOR, B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool B_K_MAJOR = true>
void wgmma_fp16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  wgmma_16_bits<true, N, B_K_MAJOR>(d, a, b, accumulate);
}

// Registers, shuffles and dependent grids.
void set_registers(int count, bool increase);
template <int COUNT>
void registers_decrease() {
  set_registers(COUNT, false);
}
template <int COUNT>
void registers_increase() {
  set_registers(COUNT, true);
}
float shuffle_xor(float x, int lanes);
int shuffle_from(int x, int lane);
void grid_dependency_wait();
void grid_dependency_launch();

// Global memory.
void access_global(emulator::Access access, const void* p, uint32_t bytes, const char* what,
                   const void* value = nullptr);
template <class T>
T load_global(const T* p) {
  access_global(emulator::Access::constant, p, sizeof(T), "load_global");
  return *p;
}
inline Chunk load_global(const Chunk* p) {
  emulator::current().block->machine->maybe_yield(8);
  access_global(emulator::Access::constant, p, 16, "load_global");
  return *p;
}
template <class T>
T load_streamed(const T* p, bool valid) {
  return valid ? load_global(p) : T{};
}
template <class T>
T load_written(const T* p) {
  access_global(emulator::Access::read, p, sizeof(T), "load_written");
  return *p;
}
void copy_async(void* to, const void* from, bool valid);
void barrier_arrive_after_copies(Barrier* barrier);
void copy_async_commit();
void copy_async_wait_groups(int pending);
template <int PENDING>
void copy_async_wait() {
  copy_async_wait_groups(PENDING);
}
template <class T>
void store_global(T* p, T value) {
  access_global(emulator::Access::write, p, sizeof(T), "store_global", &value);
  *p = value;
}
inline void atomic_min(int* p, int x) {
  access_global(emulator::Access::atomic, p, 4, "atomic_min");
  *p = x < *p ? x : *p;
}
inline void atomic_max(int* p, int x) {
  access_global(emulator::Access::atomic, p, 4, "atomic_max");
  *p = x > *p ? x : *p;
}
inline float max_of(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min_of(float a, float b) { return __builtin_fminf(a, b); }
inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float exp2_of(float x) { return __builtin_exp2f(x); }
inline float log2_of(float x) { return __builtin_log2f(x); }

}  // namespace sm90
