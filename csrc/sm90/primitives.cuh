// Device primitives; all inline PTX of the project is in this file.
//
// Every kernel compiles in two ways: with nvcc for sm_90a, which uses the functions below, and with
// any C++ compiler against csrc/emulator/primitives.h, which implements the same functions for a
// machine without a GPU. Kernels therefore use no CUDA feature directly. The semantics are those of
// the PTX ISA 9.0, chapters 9.7.9 (copies), 9.7.13 (barriers) and 9.7.15 (WGMMA).
#pragma once

// Hooks for planted bugs. The tests compile a kernel with -DPLANT_<name> and expect the emulator or
// a comparison with the reference to find the bug (tests/hopper/test_planted_bugs.py). Without such
// a flag each hook expands to the correct code alone, so the machine code is unchanged.
// Parenthesize an operand of a larger expression: the macros add no parentheses.
//
//     UNLESS_PLANTED(name, code)   the bug omits `code`
//     WHEN_PLANTED(name, code)     the bug adds `code`, which has no comma outside parentheses
//     PLANT(name, wrong, right)    the bug replaces `right` with `wrong`
#define UNLESS_PLANTED(name, ...) PLANT(name, , __VA_ARGS__)
#define WHEN_PLANTED(name, code) PLANT(name, code, )
#define PLANT(name, wrong, ...) PLANTING_IF(PLANT_##name)(wrong, __VA_ARGS__)
// PLANTING_IF(flag) is PLANTING_WRONG if `flag` is defined as 1, else PLANTING_RIGHT.
#define PLANTING_IF(flag) PLANTING_PASTE(flag)
#define PLANTING_PASTE(flag) PLANTING_CHOOSE(PLANTING_ARGUMENT_##flag)
#define PLANTING_ARGUMENT_1 ~,
#define PLANTING_CHOOSE(argument) PLANTING_SECOND(argument PLANTING_WRONG, PLANTING_RIGHT, )
#define PLANTING_SECOND(first, second, ...) second
#define PLANTING_WRONG(wrong, ...) wrong
#define PLANTING_RIGHT(wrong, ...) __VA_ARGS__

#if !defined(__CUDACC__)
#include "../emulator/primitives.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define SM90_DEVICE __device__ __forceinline__
#define SM90_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define SM90_PARAMETER const __grid_constant__

namespace sm90 {

using TensorMap = CUtensorMap;
using bf16 = __nv_bfloat16;
using fp16 = __half;

// An mbarrier. A phase completes when all expected arrivals and all announced bytes have arrived.
struct Barrier {
  uint64_t word;
};

SM90_DEVICE bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
SM90_DEVICE fp16 to_fp16(float x) { return __float2half_rn(x); }
SM90_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
SM90_DEVICE float to_float(fp16 x) { return __half2float(x); }
SM90_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
SM90_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
SM90_DEVICE uint32_t pack(bf16 low, bf16 high) {
  return __bfloat16_as_ushort(low) | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
SM90_DEVICE uint32_t pack(fp16 low, fp16 high) {
  return __half_as_ushort(low) | uint32_t{__half_as_ushort(high)} << 16;
}
// The two halves of a packed pair.
SM90_DEVICE bf16 low_bf16(uint32_t pair) { return __ushort_as_bfloat16(pair & 0xffff); }
SM90_DEVICE bf16 high_bf16(uint32_t pair) { return __ushort_as_bfloat16(pair >> 16); }
SM90_DEVICE fp16 low_fp16(uint32_t pair) { return __ushort_as_half(pair & 0xffff); }
SM90_DEVICE fp16 high_fp16(uint32_t pair) { return __ushort_as_half(pair >> 16); }
// Two floats to packed bf16 or fp16, rounded to nearest even.
SM90_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
SM90_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Two e4m3 codes to packed fp16. Exact.
SM90_DEVICE uint32_t e4m3_to_fp16(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}
// Products of packed fp16, rounded to nearest even.
SM90_DEVICE uint32_t multiply_fp16(uint32_t x, uint32_t y) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

// Indices. warp_index() is broadcast from lane 0, so that the compiler treats it as warp-uniform.
SM90_DEVICE int thread_index() { return threadIdx.x; }
SM90_DEVICE int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }
SM90_DEVICE int lane_index() { return threadIdx.x % 32; }
// x, in a way that the compiler cannot compute before this call: what follows from the result is
// computed here, not kept in registers through an earlier loop.
SM90_DEVICE int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
SM90_DEVICE int block_index() { return blockIdx.x; }
SM90_DEVICE int block_count() { return gridDim.x; }
SM90_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// True in exactly one lane of the warp, the same lane in every call.
SM90_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen));
  return chosen;
}

// The block's dynamic smem, 1024-byte aligned as the 128-byte swizzle requires.
SM90_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
SM90_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
template <class T>
SM90_DEVICE void store_shared(void* p, T value) {
  *static_cast<T*>(p) = value;
}
template <class T>
SM90_DEVICE T load_shared(const void* p) {
  return *static_cast<const T*>(p);
}

// 16 bytes loaded or stored as one access.
struct __align__(16) Chunk {
  union {
    uint16_t half[8];
    uint32_t word[4];
  };
};

// 8 bytes loaded or stored as one access.
struct alignas(8) Words {
  uint32_t word[2];
};

// Two floats loaded or stored as one 8-byte access.
struct alignas(8) FloatPair {
  float low, high;
};

// Four floats loaded or stored as one 16-byte access.
struct __align__(16) Floats {
  float value[4];
};
// Loads from the smem of block `rank` of the cluster, at the same offset as `p` (16-byte aligned)
// in this block. Block `rank` must have started and must not have exited.
SM90_DEVICE Floats load_shared_at(const void* p, int rank) {
  Floats x;
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(x.value[0]), "=f"(x.value[1]), "=f"(x.value[2]), "=f"(x.value[3])
      : "r"(shared_address(p)), "r"(rank));
  return x;
}

// Stores four 8x8 matrices of 16-bit values. Lane l holds row l / 4, columns 2 (l % 4) and
// 2 (l % 4) + 1 of each matrix in a, b, c and d. Lane l passes the address of row l % 8 of matrix
// l / 8.
SM90_DEVICE void store_matrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Makes this thread's smem writes visible to later TMA and WGMMA operations. A barrier afterwards
// extends that to operations that other threads issue.
SM90_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

SM90_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}
// Makes this thread's barrier_init calls visible to TMA and to the other blocks of the cluster.
SM90_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SM90_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives at the barrier at the same smem offset in block `rank` of the cluster. It releases in the
// scope of this block, so it may only say that a buffer is free: no data of this thread is visible
// to the other block.
SM90_DEVICE void barrier_arrive_remote(Barrier* barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// The same for data: makes this thread's earlier accesses visible to the threads of the cluster
// that wait with barrier_wait_acquire_cluster. Costs a membar of the whole GPU (MEMBAR.ALL.GPU).
SM90_DEVICE void barrier_arrive_release_cluster(Barrier* barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives and announces `bytes` that asynchronous copies will write.
SM90_DEVICE void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity completes. Phases count from 0. Acquires in the scope of
// this block: copies of TMA to this block's smem and what its threads wrote.
SM90_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n again:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra ended;\n bra again;\n ended:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// The same for data of other blocks of the cluster. Invalidates all of L1 (CCTL.IVALL).
SM90_DEVICE void barrier_wait_acquire_cluster(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n again:\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      " @done bra ended;\n bra again;\n ended:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

SM90_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SM90_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SM90_DEVICE void block_sync() { __syncthreads(); }
SM90_DEVICE void warp_sync() { __syncwarp(); }
SM90_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
SM90_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
SM90_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

SM90_DEVICE void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the box at (row, column) of the matrix to smem, with zeros outside the matrix. The copy
// completes the bytes of the whole box on `barrier`.
SM90_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same copy to the same smem offset in each block of the cluster whose bit is set in `ranks`.
// It completes the bytes on the barrier at the same offset in each of these blocks.
SM90_DEVICE void tma_load_multicast(void* to, const TensorMap* map, Barrier* barrier, int column,
                                    int row, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(column), "r"(row)
      : "memory");
}
// Copies contiguous `bytes`, a multiple of 16, between 16-byte aligned addresses.
SM90_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Copies a box of smem to (row, column) of the matrix. Elements outside the matrix are dropped.
SM90_DEVICE void tma_store(const TensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
SM90_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's last store groups still read smem.
template <int PENDING>
SM90_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
SM90_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of a tile of 128-byte rows with the 128-byte swizzle. K-major tiles: `stride_bytes` is
// the distance between groups of 8 rows, `leading_bytes` is unused. MN-major tiles: `leading_bytes`
// is the distance between groups of 64 rows, `stride_bytes` between groups of 8 values of K.
SM90_DEVICE uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes,
                                       uint32_t stride_bytes) {
  const uint64_t start = shared_address(tile) >> 4 & 0x3fff;
  return start | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}
// Descriptor of the tile `bytes` after that of `descriptor`, in the same swizzle pattern. One
// addition to the low word: addresses of smem do not carry out of their field.
SM90_DEVICE uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & ~uint64_t{0xffffffff}) |
         (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}
// Keeps the compiler from moving arithmetic on these values across this point. It moves arithmetic
// behind an asm statement that does not use its result, and before one that does not set its
// operands.
template <int N>
SM90_DEVICE void keep_order(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 8) {
    asm volatile("" : "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),
                 "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]));
  }
}
// Makes earlier register writes visible to the WGMMAs that follow.
SM90_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// For accumulators that the thread has written, which keep_order keeps before the fence.
template <int N>
SM90_DEVICE void wgmma_fence(float (&d)[N]) {
  keep_order(d);
  wgmma_fence();
}
SM90_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING WGMMA groups are in flight.
template <int PENDING>
SM90_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d[64, N] (+)= a[64, K] · b[N, K]ᵀ by a warpgroup, with K = 32 for e4m3 and 16 for bf16 and
// fp16. `a` and `b` are descriptors, or `a` is in registers as packed pairs in the accumulator
// layout. In thread t, d[i] is row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) +
// 2 (t % 4) + i % 2.
template <int N>
struct Wgmma;
template <int N>
SM90_DEVICE void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::e4m3(d, a, b, accumulate);
}
template <int N, bool A_K_MAJOR = true, bool B_K_MAJOR = true>
SM90_DEVICE void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::template bf16<A_K_MAJOR, B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool B_K_MAJOR = true>
SM90_DEVICE void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                            bool accumulate) {
  Wgmma<N>::template bf16<B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool A_K_MAJOR = true, bool B_K_MAJOR = true>
SM90_DEVICE void wgmma_fp16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::template fp16<A_K_MAJOR, B_K_MAJOR>(d, a, b, accumulate);
}
template <int N, bool B_K_MAJOR = true>
SM90_DEVICE void wgmma_fp16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                            bool accumulate) {
  Wgmma<N>::template fp16<B_K_MAJOR>(d, a, b, accumulate);
}

// PTX operands are numbered: first the elements of d, then the operands P0 to P6.
#define SM90_VALUES(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),     \
      "+f"(d[i + 6]), "+f"(d[i + 7])
// The functions for a 16-bit TYPE, which PTX calls PTX_TYPE.
#define SM90_WGMMA_16_BITS(TYPE, PTX_TYPE, N, NAMES, P0, P1, P2, P3, P4, P5, P6, ...)             \
  template <bool A_K_MAJOR, bool B_K_MAJOR>                                                       \
  static SM90_DEVICE void TYPE(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {      \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P2 ", 0;\n"                              \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {"    \
                 NAMES "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}"                   \
                 : __VA_ARGS__                                                                    \
                 : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{!A_K_MAJOR}),                    \
                   "n"(int{!B_K_MAJOR}));                                                         \
  }                                                                                               \
  template <bool B_K_MAJOR>                                                                       \
  static SM90_DEVICE void TYPE(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,             \
                               bool accumulate) {                                                 \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P5 ", 0;\n"                              \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {"    \
                 NAMES "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6    \
                 ";\n}"                                                                           \
                 : __VA_ARGS__                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}),      \
                   "n"(int{!B_K_MAJOR}));                                                         \
  }
#define SM90_WGMMA(N, NAMES, P0, P1, P2, P3, P4, P5, P6, ...)                                     \
  template <>                                                                                     \
  struct Wgmma<N> {                                                                               \
    static SM90_DEVICE void e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {    \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P2 ", 0;\n"                            \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES            \
                   "}, %" #P0 ", %" #P1 ", p, 1, 1;\n}"                                           \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(int{accumulate}));                                       \
    }                                                                                             \
    SM90_WGMMA_16_BITS(bf16, "bf16", N, NAMES, P0, P1, P2, P3, P4, P5, P6, __VA_ARGS__)           \
    SM90_WGMMA_16_BITS(fp16, "f16", N, NAMES, P0, P1, P2, P3, P4, P5, P6, __VA_ARGS__)            \
  };
#define SM90_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SM90_NAMES_16                                                                             \
  SM90_NAMES_8                                                                                    \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SM90_NAMES_32                                                                             \
  SM90_NAMES_16                                                                                   \
  ", %16, %17, %18, %19, %20, %21, %22, %23"                                                      \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SM90_NAMES_64                                                                             \
  SM90_NAMES_32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39"                                                      \
  ", %40, %41, %42, %43, %44, %45, %46, %47"                                                      \
  ", %48, %49, %50, %51, %52, %53, %54, %55"                                                      \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SM90_NAMES_96                                                                             \
  SM90_NAMES_64                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71"                                                      \
  ", %72, %73, %74, %75, %76, %77, %78, %79"                                                      \
  ", %80, %81, %82, %83, %84, %85, %86, %87"                                                      \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SM90_NAMES_128                                                                            \
  SM90_NAMES_96                                                                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103"                                                  \
  ", %104, %105, %106, %107, %108, %109, %110, %111"                                              \
  ", %112, %113, %114, %115, %116, %117, %118, %119"                                              \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SM90_VALUES_8 SM90_VALUES(0)
#define SM90_VALUES_16 SM90_VALUES_8, SM90_VALUES(8)
#define SM90_VALUES_32 SM90_VALUES_16, SM90_VALUES(16), SM90_VALUES(24)
#define SM90_VALUES_64                                                                            \
  SM90_VALUES_32, SM90_VALUES(32), SM90_VALUES(40), SM90_VALUES(48), SM90_VALUES(56)
#define SM90_VALUES_96                                                                            \
  SM90_VALUES_64, SM90_VALUES(64), SM90_VALUES(72), SM90_VALUES(80), SM90_VALUES(88)
#define SM90_VALUES_128                                                                           \
  SM90_VALUES_96, SM90_VALUES(96), SM90_VALUES(104), SM90_VALUES(112), SM90_VALUES(120)
SM90_WGMMA(16, SM90_NAMES_8, 8, 9, 10, 11, 12, 13, 14, SM90_VALUES_8)
SM90_WGMMA(32, SM90_NAMES_16, 16, 17, 18, 19, 20, 21, 22, SM90_VALUES_16)
SM90_WGMMA(64, SM90_NAMES_32, 32, 33, 34, 35, 36, 37, 38, SM90_VALUES_32)
SM90_WGMMA(128, SM90_NAMES_64, 64, 65, 66, 67, 68, 69, 70, SM90_VALUES_64)
SM90_WGMMA(192, SM90_NAMES_96, 96, 97, 98, 99, 100, 101, 102, SM90_VALUES_96)
SM90_WGMMA(256, SM90_NAMES_128, 128, 129, 130, 131, 132, 133, 134, SM90_VALUES_128)
#undef SM90_WGMMA
#undef SM90_WGMMA_16_BITS
#undef SM90_VALUES

// Sets the register count of this warpgroup's threads. registers_increase waits until the registers
// are available.
template <int COUNT>
SM90_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
SM90_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

SM90_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
SM90_DEVICE int shuffle_from(int x, int lane) { return __shfl_sync(~0u, x, lane); }

// Programmatic dependent launch: wait for the writes of the previous grid; allow the next grid to
// start.
SM90_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SM90_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;"); }

// Global memory accesses, aligned to their size. load_global is for data that no thread writes
// while the grid runs. load_written is for data that an earlier grid (after grid_dependency_wait)
// or this block may have written.
template <class T>
SM90_DEVICE T load_global(const T* p) {
  return __ldg(p);
}
SM90_DEVICE Chunk load_global(const Chunk* p) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(p));
  return *reinterpret_cast<const Chunk*>(&words);
}
// Loads data that is read once, or returns zeros without a load if `valid` is false. The volatile
// asm keeps the compiler from moving the load.
SM90_DEVICE Chunk load_streamed(const Chunk* p, bool valid) {
  Chunk chunk;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
      " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(chunk.word[0]), "=&r"(chunk.word[1]), "=&r"(chunk.word[2]), "=&r"(chunk.word[3])
      : "l"(p), "r"(int{valid}));
  return chunk;
}
SM90_DEVICE Words load_streamed(const Words* p, bool valid) {
  Words words;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %3, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(words.word[0]), "=&r"(words.word[1])
      : "l"(p), "r"(int{valid}));
  return words;
}
SM90_DEVICE float load_streamed(const float* p, bool valid) {
  float x;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n mov.b32 %0, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.f32 %0, [%1];\n}"
      : "=&f"(x)
      : "l"(p), "r"(int{valid}));
  return x;
}
template <class T>
SM90_DEVICE T load_written(const T* p) {
  return *p;
}
// Starts to copy 16 bytes to smem; zeros, and no load, if `valid` is false. Threads see the bytes
// after a wait of this thread, WGMMA after fence_async_proxy in addition.
SM90_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// This thread's arrival at `barrier` when all copies that it has started are done. Nothing else of
// this thread is ordered before. A thread that waits sees the bytes, and after fence_async_proxy so
// do the WGMMAs that it issues.
SM90_DEVICE void barrier_arrive_after_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                   shared_address(barrier))
               : "memory");
}
SM90_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's last groups of copies are in flight.
template <int PENDING>
SM90_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <class T>
SM90_DEVICE void store_global(T* p, T value) {
  *p = value;
}
SM90_DEVICE void atomic_min(int* p, int x) { atomicMin(p, x); }
SM90_DEVICE void atomic_max(int* p, int x) { atomicMax(p, x); }
// The larger or smaller number. If one argument is NaN, the result is the other one.
SM90_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
SM90_DEVICE float min_of(float a, float b) { return fminf(a, b); }
SM90_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// a / b with an error of at most 2 ulp.
SM90_DEVICE float divide(float a, float b) {
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}
// 2^x from the special function unit, with an error of at most 2 ulp; and an accurate log2.
SM90_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SM90_DEVICE float log2_of(float x) { return log2f(x); }

}  // namespace sm90

#endif
