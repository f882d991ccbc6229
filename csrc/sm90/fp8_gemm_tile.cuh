// A tile of fp8_gemm.cuh: its sizes and its layout in smem.
#pragma once

#include "ring.cuh"
#include "schedule.cuh"

namespace sm90 {

using deepkern::MAX_SPLITS;

// Bytes of smem of an SM, of a block, and that CUDA reserves for each block.
constexpr uint32_t SMEM_PER_SM = 233472, SMEM_PER_BLOCK = 232448, SMEM_RESERVED = 1024;

// lhs and rhs are the left and right operand of the MMA: A and B, or B and A if SWAPPED.
// B_ROWS: rows of B per scale, 1 or 128.
template <GemmVariant VARIANT_, int WARPGROUPS_, int N_, int STAGES_, int CLUSTER_, bool SWAPPED_,
          int B_ROWS>
struct GemmTile {
  static constexpr GemmVariant VARIANT = VARIANT_;
  static constexpr int WARPGROUPS = WARPGROUPS_;  // consumer warpgroups, 64 lhs rows each
  static constexpr int M = 64 * WARPGROUPS;       // lhs rows
  static constexpr int N = N_;                    // rhs rows
  static constexpr int K = 128;                   // values per stage
  static constexpr int STAGES = STAGES_;
  static constexpr int CLUSTER = CLUSTER_;        // blocks that share a tile of B by multicast
  static constexpr bool SWAPPED = SWAPPED_;
  // Split-K: either each block of a cluster sums one split, or a block sums all splits in turn.
  static constexpr bool CLUSTER_SPLIT_K = VARIANT == GemmVariant::dense && SWAPPED;
  static constexpr bool SERIAL_SPLIT_K = VARIANT == GemmVariant::dense && !SWAPPED;
  static constexpr int LHS_ROWS_PER_SCALE = SWAPPED ? B_ROWS : 1;
  static constexpr int RHS_ROWS_PER_SCALE = SWAPPED ? 1 : B_ROWS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);
  static constexpr int RESIDENT_BLOCKS = WARPGROUPS == 1 ? 2 : 1;  // per SM
  static constexpr uint32_t LHS_BYTES = M * K, STAGE_BYTES = LHS_BYTES + N * K;

  // Layout of smem, offsets in bytes: the ring's operands, the epilogue's staging buffer for a tile
  // of D, the ring's rhs scales, barriers.
  static constexpr uint32_t STAGING = STAGES * STAGE_BYTES, STAGING_BYTES = M * N * 4;
  static constexpr uint32_t SCALES = STAGING + STAGING_BYTES;
  static constexpr uint32_t SCALE_BYTES = RHS_ROWS_PER_SCALE == 1 ? N * 4 : 0;  // of a stage
  static constexpr uint32_t BARRIERS = SCALES + STAGES * SCALE_BYTES;
  static constexpr uint32_t PARTIALS_BARRIERS = BARRIERS + Ring<STAGES>::BYTES;
  static constexpr uint32_t SMEM_BYTES = PARTIALS_BARRIERS + (SWAPPED ? Ring<1>::BYTES : 0);
  using PartialsRing = Ring<1, CLUSTER_SPLIT_K>;  // one buffer: the staging buffer

  // Arrivals on a full barrier: the TMA thread, and each lane of the warp that loads scales.
  static constexpr int FULL_ARRIVALS =
      1 + (RHS_ROWS_PER_SCALE == 1 ? PLANT(no_wait_for_scales, 0, 32) : 0);
  using Tiles = Schedule<VARIANT, (SWAPPED ? N : M) * CLUSTER, SWAPPED ? M : N>;
  static_assert(RHS_ROWS_PER_SCALE == 1 || 128 % N == 0, "all rhs rows of a tile share one scale");
  static_assert(CLUSTER == 1 ||
                    (VARIANT == GemmVariant::dense && !SWAPPED && RHS_ROWS_PER_SCALE == 128),
                "multicast supports dense products with 128x128 scales of B only");
  static_assert(SMEM_BYTES <= SMEM_PER_BLOCK, "a tile fits in the smem of a block");
  static_assert(RESIDENT_BLOCKS * (SMEM_BYTES + SMEM_RESERVED) <= SMEM_PER_SM,
                "the resident blocks fit in the smem of an SM");
};

// The operand ring: barriers and buffers of the current stage.
template <class Tile>
struct OperandRing : Ring<Tile::STAGES> {
  char* smem;

  SM90_DEVICE explicit OperandRing(char* smem_base)
      : Ring<Tile::STAGES>(smem_base + Tile::BARRIERS), smem(smem_base) {}
  SM90_DEVICE char* lhs() { return smem + this->stage * Tile::STAGE_BYTES; }  // [M, K] e4m3
  SM90_DEVICE char* rhs() { return lhs() + Tile::LHS_BYTES; }                 // [N, K] e4m3
  SM90_DEVICE char* rhs_scales() {                                            // [N] float
    return smem + Tile::SCALES + this->stage * Tile::SCALE_BYTES;
  }
};

}  // namespace sm90
