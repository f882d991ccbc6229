// Compiles one source for every instruction set of this machine's architecture.
//
// A kernel's file includes itself once for each instruction set:
//
//     #ifndef DEEPKERN_ISA
//     #include "real.h"                     // every other header
//     namespace deepkern { struct Rows { ... }; }           // what all instruction sets share
//     #define DEEPKERN_FILE "cpu/this_file.cpp"
//     #include "every_isa.h"
//     namespace deepkern {
//     void kernel(const Rows& rows) { DEEPKERN_DISPATCH(kernel)(rows); }
//     }
//     #else
//     namespace deepkern::DEEPKERN_ISA { void kernel(const Rows& rows) { ... } }
//     #endif
//
// Inside, simd.h gives a vector of LANES floats; DEEPKERN_AVX2 or DEEPKERN_AVX512 is defined where
// intrinsics of that instruction set may be used. All standard headers must be included before, so
// that no inline function of theirs is compiled for an instruction set which the CPU may lack.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "real.h"
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics header of GCC 12 initializes its undefined vectors with themselves.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#define DEEPKERN_ISA portable
#include "simd.h"
#include DEEPKERN_FILE
#undef DEEPKERN_ISA

#if defined(__x86_64__)
#define DEEPKERN_ISA avx2
#define DEEPKERN_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd.h"
#include DEEPKERN_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DEEPKERN_AVX2
#undef DEEPKERN_ISA

#define DEEPKERN_ISA avx512
#define DEEPKERN_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "simd.h"
#include DEEPKERN_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DEEPKERN_AVX512
#undef DEEPKERN_ISA
#endif

#undef DEEPKERN_FILE
