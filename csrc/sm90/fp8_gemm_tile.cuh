// What a tile of fp8_gemm.cuh is, and where its buffers lie in shared memory.
#pragma once

#include "ring.cuh"
#include "schedule.cuh"

namespace sm90 {

constexpr int MOST_SPLITS = 8;  // blocks of a cluster that every GPU takes
// Shared memory of a multiprocessor, of a block, and what CUDA adds to each block.
constexpr uint32_t SHARED_OF_ALL = 233472, SHARED_OF_BLOCK = 232448, SHARED_BESIDE = 1024;

// LEFT_ROWS, RIGHT_ROWS: how many rows of an operand share a scale, 1 or 128.
template <Form FORM_, int GROUPS_, int N_, int STAGES_, int CLUSTER_, bool SWAPPED_, int B_ROWS>
struct GemmTile {
  static constexpr Form FORM = FORM_;
  static constexpr int GROUPS = GROUPS_, M = 64 * GROUPS, N = N_, K = 128, STAGES = STAGES_;
  static constexpr int CLUSTER = CLUSTER_;
  static constexpr bool SWAPPED = SWAPPED_;
  // Where K is cut into runs, this tile has a cluster of blocks, each with a run of its own; or each
  // block sums all runs, one after the other.
  static constexpr bool SPREAD = FORM == Form::dense && SWAPPED;
  static constexpr bool IN_TURN = FORM == Form::dense && !SWAPPED;
  static constexpr int LEFT_ROWS = SWAPPED ? B_ROWS : 1, RIGHT_ROWS = SWAPPED ? 1 : B_ROWS;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int RESIDENT = GROUPS == 1 ? 2 : 1;  // blocks that a multiprocessor holds
  static constexpr uint32_t LEFT_BYTES = M * K, STAGE_BYTES = LEFT_BYTES + N * K;
  // Where a tile of D is put in order.
  static constexpr uint32_t ORDERED = STAGES * STAGE_BYTES, ORDERED_BYTES = M * N * 4;
  static constexpr uint32_t SCALES = ORDERED + ORDERED_BYTES;
  static constexpr uint32_t SCALE_BYTES = RIGHT_ROWS == 1 ? N * 4 : 0;  // of a stage
  static constexpr uint32_t BARRIERS = SCALES + STAGES * SCALE_BYTES;
  static constexpr uint32_t SHARE_BARRIERS = BARRIERS + Ring<STAGES>::BYTES;
  static constexpr uint32_t SHARED_BYTES = SHARE_BARRIERS + (SWAPPED ? Ring<1>::BYTES : 0);
  static constexpr int LOADS = 1 + (RIGHT_ROWS == 1 ? 32 : 0);  // arrivals that fill a buffer
  using Tiles = Schedule<FORM, (SWAPPED ? N : M) * CLUSTER, SWAPPED ? M : N>;
  static_assert(RIGHT_ROWS == 1 || 128 % N == 0, "a tile has one scale of its right operand");
  static_assert(CLUSTER == 1 || (FORM == Form::dense && !SWAPPED && RIGHT_ROWS == 128));
  static_assert(SHARED_BYTES <= SHARED_OF_BLOCK);
  static_assert(RESIDENT * (SHARED_BYTES + SHARED_BESIDE) <= SHARED_OF_ALL);
};

// What all warps know: the ring and its buffers.
template <class Tile>
struct Buffers : Ring<Tile::STAGES> {
  char* memory;

  SM90_DEVICE explicit Buffers(char* shared)
      : Ring<Tile::STAGES>(shared + Tile::BARRIERS), memory(shared) {}
  SM90_DEVICE char* left() { return memory + this->stage * Tile::STAGE_BYTES; }
  SM90_DEVICE char* right() { return left() + Tile::LEFT_BYTES; }
  SM90_DEVICE char* scales() { return memory + Tile::SCALES + this->stage * Tile::SCALE_BYTES; }
};

}  // namespace sm90
