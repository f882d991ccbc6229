// What the kernels of this folder do that C++ has no words for: all inline PTX of the project.
//
// A kernel is compiled twice: by nvcc for sm_90a, with the functions below, and by any C++ compiler
// against csrc/emulator/primitives.h, which has the same functions for a machine without a GPU. So
// kernels use nothing of CUDA but what stands here. Meanings are those of the PTX ISA 9.0, chapters
// 9.7.9 (copies), 9.7.13 (barriers) and 9.7.15 (WGMMA).
#pragma once

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

// An mbarrier: a phase ends when all arrivals and all announced bytes have come.
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
// The halves of a packed pair.
SM90_DEVICE bf16 low_bf16(uint32_t pair) { return __ushort_as_bfloat16(pair & 0xffff); }
SM90_DEVICE bf16 high_bf16(uint32_t pair) { return __ushort_as_bfloat16(pair >> 16); }
SM90_DEVICE fp16 low_fp16(uint32_t pair) { return __ushort_as_half(pair & 0xffff); }
SM90_DEVICE fp16 high_fp16(uint32_t pair) { return __ushort_as_half(pair >> 16); }
// Two e4m3 codes as packed bf16, exactly.
SM90_DEVICE uint32_t e4m3_to_bf16(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return pack(to_bf16(to_float(low_fp16(halves))), to_bf16(to_float(high_fp16(halves))));
}
// Products of packed bf16, rounded.
SM90_DEVICE uint32_t multiply_bf16(uint32_t x, uint32_t y) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

// Who and where. A warp's index is broadcast, so that the compiler knows it to be uniform.
SM90_DEVICE int thread_index() { return threadIdx.x; }
SM90_DEVICE int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }
SM90_DEVICE int lane_index() { return threadIdx.x % 32; }
SM90_DEVICE int block_index() { return blockIdx.x; }
SM90_DEVICE int block_count() { return gridDim.x; }
SM90_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// True in one lane of the warp, the same one at every call.
SM90_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen));
  return chosen;
}

// The block's dynamic shared memory, from a multiple of 1024 on as the 128-byte swizzle needs.
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

// 16 bytes that move together.
struct __align__(16) Chunk {
  union {
    uint16_t half[8];
    uint32_t word[4];
  };
};

// Two that stand together.
struct alignas(8) FloatPair {
  float low, high;
};

// Four floats that move together; and those at the place of `p`, a multiple of 16, in the shared
// memory of block `rank` of the cluster, which must have begun and not have ended.
struct __align__(16) Floats {
  float value[4];
};
SM90_DEVICE Floats load_shared_at(const void* p, int rank) {
  Floats x;
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(x.value[0]), "=f"(x.value[1]), "=f"(x.value[2]), "=f"(x.value[3])
      : "r"(shared_address(p)), "r"(rank));
  return x;
}

// Four 8x8 matrices of 16-bit values: lane l holds of each the values at row l / 4, columns
// 2 (l % 4) and the next, and says where row l % 8 of matrix l / 8 goes.
SM90_DEVICE void store_matrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// What this thread wrote to shared memory is seen by TMA and WGMMA that follow (after a barrier:
// by those of other threads).
SM90_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

SM90_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}
// Barriers that this thread initialised are seen by TMA and by the cluster's other blocks.
SM90_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SM90_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives at the barrier of the same place in block `rank` of the cluster.
SM90_DEVICE void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives, and announces `bytes` that copies will bring.
SM90_DEVICE void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: phases count from 0.
SM90_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
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
// The box at (row, column) of the matrix to shared memory, zeros where it reaches beyond; `barrier`
// gets the bytes of the whole box.
SM90_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same to the same place in each block of the cluster that `ranks` has a bit for, whose barrier
// of the same place gets the bytes.
SM90_DEVICE void tma_load_multicast(void* to, const TensorMap* map, Barrier* barrier, int column,
                                    int row, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(column), "r"(row)
      : "memory");
}
// `bytes` that stand together: a multiple of 16, from and to multiples of 16.
SM90_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// A box of shared memory to (row, column) of the matrix; what reaches beyond is left out.
SM90_DEVICE void tma_store(const TensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
SM90_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the last LEFT groups of this thread's stores have read shared memory.
template <int LEFT>
SM90_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
template <int LEFT>
SM90_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(LEFT) : "memory");
}

// A tile of 128-byte rows with the 128-byte swizzle. By row (values of one row stand together):
// `stride_bytes` from 8 rows to the next 8, `leading_bytes` unused. Else: `leading_bytes` from 64
// rows to the next 64, `stride_bytes` from 8 values of K to the next 8.
SM90_DEVICE uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes,
                                       uint32_t stride_bytes) {
  const uint64_t start = shared_address(tile) >> 4 & 0x3fff;
  return start | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}
// Registers that the program wrote are seen by the WGMMAs that follow.
SM90_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SM90_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last LEFT groups are done.
template <int LEFT>
SM90_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// d[64, N] (+)= a[64, K] · b[N, K]ᵀ by a warpgroup, K = 32 for e4m3 and 16 for bf16, `a` and `b`
// by descriptor, or `a` in registers as accumulators lie, in pairs. Thread t holds in d[i] row
// 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
template <int N>
struct Wgmma;
template <int N>
SM90_DEVICE void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::e4m3(d, a, b, accumulate);
}
template <int N, bool A_BY_ROW = true, bool B_BY_ROW = true>
SM90_DEVICE void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::template bf16<A_BY_ROW, B_BY_ROW>(d, a, b, accumulate);
}
template <int N, bool B_BY_ROW = true>
SM90_DEVICE void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                            bool accumulate) {
  Wgmma<N>::template bf16<B_BY_ROW>(d, a, b, accumulate);
}

// An operand of PTX goes by its number: those of d come first, then the ones given here.
#define SM90_VALUES(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),     \
      "+f"(d[i + 6]), "+f"(d[i + 7])
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
    template <bool A_BY_ROW, bool B_BY_ROW>                                                       \
    static SM90_DEVICE void bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {    \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P2 ", 0;\n"                            \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES            \
                   "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}"                       \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{!A_BY_ROW}),                   \
                     "n"(int{!B_BY_ROW}));                                                        \
    }                                                                                             \
    template <bool B_BY_ROW>                                                                      \
    static SM90_DEVICE void bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,           \
                                 bool accumulate) {                                               \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P5 ", 0;\n"                            \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES            \
                   "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}" \
                   : __VA_ARGS__                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}),    \
                     "n"(int{!B_BY_ROW}));                                                        \
    }                                                                                             \
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
#undef SM90_VALUES

// Registers of this warpgroup's threads from now on; more are waited for.
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

// Programmatic dependent launch: until the grid before has written; and let the next grid start.
SM90_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SM90_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;"); }

// Global memory, at multiples of what is moved. load_global is for what nobody writes while the grid
// runs; load_written for what an earlier grid, waited for, or this block may have written.
template <class T>
SM90_DEVICE T load_global(const T* p) {
  return __ldg(p);
}
SM90_DEVICE Chunk load_global(const Chunk* p) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(p));
  return *reinterpret_cast<const Chunk*>(&words);
}
// What is read once, or zeros without reading if it is not there. It is asked for here, whatever
// the compiler thinks of it.
SM90_DEVICE Chunk load_streamed(const Chunk* p, bool there) {
  Chunk chunk;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n"
      " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(chunk.word[0]), "=&r"(chunk.word[1]), "=&r"(chunk.word[2]), "=&r"(chunk.word[3])
      : "l"(p), "r"(int{there}));
  return chunk;
}
template <class T>
SM90_DEVICE T load_written(const T* p) {
  return *p;
}
template <class T>
SM90_DEVICE void store_global(T* p, T value) {
  *p = value;
}
SM90_DEVICE void atomic_min(int* p, int x) { atomicMin(p, x); }
SM90_DEVICE void atomic_max(int* p, int x) { atomicMax(p, x); }
SM90_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// Quotients to 2 units in the last place.
SM90_DEVICE float divide(float a, float b) {
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}
// 2^x as the special function unit has it, to 2 units in the last place; and log2, rounded well.
SM90_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SM90_DEVICE float log2_of(float x) { return log2f(x); }

}  // namespace sm90

#endif
