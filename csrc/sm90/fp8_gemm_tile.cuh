// A tile of fp8_gemm.cuh: its sizes and its layout in smem.
#pragma once

#include "ring.cuh"
#include "schedule.cuh"

namespace sm90 {

using deepkern::MAX_SPLITS;

// Bytes of smem of an SM, of a block, and that CUDA reserves for each block.
constexpr uint32_t SMEM_PER_SM = 233472, SMEM_PER_BLOCK = 232448, SMEM_RESERVED = 1024;

// lhs and rhs are the left and right operand of the MMA: A and B, or B and A if SWAPPED.
// CLUSTER_M blocks of neighbouring tile rows share a tile of B, CLUSTER_N blocks of neighbouring
// tile columns share a tile of A. B_ROWS: rows of B per scale, 1 or 128.
template <GemmVariant VARIANT_, int M_, int N_, int STAGES_, int CLUSTER_M_, int CLUSTER_N_,
          bool SWAPPED_, int B_ROWS>
struct GemmTile {
  static constexpr GemmVariant VARIANT = VARIANT_;
  static constexpr int M = M_;    // lhs rows
  static constexpr int N = N_;    // rhs rows
  static constexpr int K = 128;   // values per stage
  static constexpr int WARPGROUPS = M == 64 ? 1 : 2;        // consumers
  static constexpr int WAVES = M / (64 * WARPGROUPS);       // blocks of 64 rows of a warpgroup
  static constexpr int STAGES = STAGES_;
  static constexpr int CLUSTER_M = CLUSTER_M_, CLUSTER_N = CLUSTER_N_;
  static constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;     // blocks that share by multicast
  static constexpr bool SWAPPED = SWAPPED_;
  // Split-K: either each block of a cluster sums one split, or a block sums all splits in turn.
  static constexpr bool CLUSTER_SPLIT_K = VARIANT == GemmVariant::dense && SWAPPED;
  static constexpr bool SERIAL_SPLIT_K =
      VARIANT == GemmVariant::dense && !SWAPPED && WAVES == 1;
  static constexpr int LHS_ROWS_PER_SCALE = SWAPPED ? B_ROWS : 1;
  static constexpr int RHS_ROWS_PER_SCALE = SWAPPED ? 1 : B_ROWS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);
  static constexpr uint32_t LHS_BYTES = M * K, STAGE_BYTES = LHS_BYTES + N * K;

  // Scales of a stage: those of the lhs rows, or one for all of them, then those of the rhs.
  static constexpr int LHS_SCALES = LHS_ROWS_PER_SCALE == 1 ? M : 1;
  static constexpr int RHS_SCALES_START = (LHS_SCALES + 1) / 2 * 2;  // consumers load pairs
  static constexpr int SCALES = RHS_SCALES_START + (RHS_ROWS_PER_SCALE == 1 ? N : 1);
  static constexpr int RHS_PAIRS = RHS_ROWS_PER_SCALE == 1 ? N / 8 : 1;  // of a thread's columns
  static constexpr uint32_t SCALE_BYTES = (SCALES + 3) / 4 * 16;     // of a stage
  static constexpr int SCALE_WARPS = SCALES <= 32 ? 1 : 3;           // producer warps

  // Layout of smem, offsets in bytes: the ring's operands, the epilogue's staging buffer for one
  // wave of a tile of D in float32 (or two in 16 bits), the ring's scales, barriers.
  static constexpr uint32_t STAGING = STAGES * STAGE_BYTES, STAGING_BYTES = M * N * 4 / WAVES;
  static constexpr uint32_t SCALES_OFFSET = STAGING + STAGING_BYTES;
  static constexpr uint32_t BARRIERS = SCALES_OFFSET + STAGES * SCALE_BYTES;
  static constexpr uint32_t PARTIALS_BARRIERS = BARRIERS + Ring<STAGES>::BYTES;
  static constexpr uint32_t SMEM_BYTES = PARTIALS_BARRIERS + (SWAPPED ? Ring<1>::BYTES : 0);
  using PartialsRing = Ring<1, CLUSTER_SPLIT_K>;  // one buffer: the staging buffer
  static constexpr int RESIDENT_BLOCKS =  // per SM
      WARPGROUPS == 1 && 2 * (SMEM_BYTES + SMEM_RESERVED) <= SMEM_PER_SM ? 2 : 1;

  // Arrivals on a full barrier: the TMA thread, and each warp that loads scales.
  static constexpr int FULL_ARRIVALS = 1 + PLANT(no_wait_for_scales, 0, SCALE_WARPS);
  using Tiles = Schedule<VARIANT, (SWAPPED ? N : M) * CLUSTER_M, (SWAPPED ? M : N) * CLUSTER_N>;
  static_assert(M == 64 || M == 128 || M == 256, "one or two warpgroups, one or two waves");
  static_assert(!SWAPPED || WAVES == 1, "the partial sums of a swapped tile have one wave");
  static_assert(RHS_ROWS_PER_SCALE == 1 || 128 % N == 0, "all rhs rows of a tile share one scale");
  static_assert(LHS_ROWS_PER_SCALE == 1 || 128 % M == 0, "all lhs rows of a tile share one scale");
  static_assert(CLUSTER == 1 || (CLUSTER == 2 && !SWAPPED), "pairs of tiles that are not swapped");
  static_assert(CLUSTER_M == 1 || VARIANT == GemmVariant::dense,
                "neighbouring tile rows of a group may belong to different groups");
  static_assert(SMEM_BYTES <= SMEM_PER_BLOCK, "a tile fits in the smem of a block");
  static_assert(RESIDENT_BLOCKS ==
                    deepkern::Sm90Tile{VARIANT, M, N, STAGES, CLUSTER_M, CLUSTER_N, SWAPPED, B_ROWS}
                        .resident_blocks(),
                "choose.h knows the number of resident blocks");
};

// The operand ring: barriers and buffers of the current stage.
template <class Tile>
struct OperandRing : Ring<Tile::STAGES> {
  char* smem;

  SM90_DEVICE explicit OperandRing(char* smem_base)
      : Ring<Tile::STAGES>(smem_base + Tile::BARRIERS), smem(smem_base) {}
  SM90_DEVICE char* lhs() { return smem + this->stage * Tile::STAGE_BYTES; }  // [M, K] e4m3
  SM90_DEVICE char* rhs() { return lhs() + Tile::LHS_BYTES; }                 // [N, K] e4m3
  SM90_DEVICE char* scales() {                                                // [SCALES] float
    return smem + Tile::SCALES_OFFSET + this->stage * Tile::SCALE_BYTES;
  }
};

}  // namespace sm90
