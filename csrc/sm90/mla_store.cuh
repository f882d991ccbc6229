// mla_decode: from the sums of a block to out and lse, or to the results of a split, and from those
// to out and lse.
#pragma once

#include "mla_multiply.cuh"

namespace sm90 {

// 16 columns of sums, times the scales of a thread's two rows, to shared memory: as float32, or as
// bf16, 16 rows of 32 bytes.
SM90_DEVICE void put_columns(const float* sum, const float (&scale)[2], char* staged, int column,
                             FloatPair) {
  const int lane = lane_index(), row = lane / 4;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const int half = i / 2 % 2, at = (column + i / 4 * 8 + lane % 4 * 2) * 4;
    store_shared(staged + (row + 8 * half) * 1024 + ((at / 16) ^ (row * 2)) * 16 + at % 16,
                 FloatPair{sum[i] * scale[half], sum[i + 1] * scale[half]});
  }
}
SM90_DEVICE void put_columns(const float* sum, const float (&scale)[2], char* staged, int column,
                             uint32_t) {
  const int row = lane_index() % 16, chunk = column / 8 + lane_index() / 16;
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = pack(to_bf16(sum[2 * i] * scale[i % 2]), to_bf16(sum[2 * i + 1] * scale[i % 2]));
  }
  store_matrix_x4(staged + row * 512 + (chunk ^ (row % 8)) * 16, pair[0], pair[1], pair[2], pair[3]);
}

// A warp's 16 rows of 256 sums, times `scale` (by block of columns and row), to `out`, whose rows are
// 512 values apart: through shared memory, so that whole lines are written. Pair: two values of out.
template <class Pair>
SM90_DEVICE void store_rows(const float (&sum)[2][64], const float (&scale)[2][2], char* staged,
                            char* out, int rows) {
  constexpr int ROW_BYTES = 128 * sizeof(Pair), TURN = sizeof(Pair) / 4;
  const int lane = lane_index();
  // The chunks of eight rows are turned against each other, else they would lie in the same banks.
#pragma unroll
  for (int i = 0; i < 128; i += 8) {
    put_columns(&sum[i / 64][i % 64], scale[i / 64], staged, i * 2, Pair{});
  }
  warp_sync();
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int chunk = lane; chunk < ROW_BYTES / 16; chunk += 32) {
      const char* from = staged + row * ROW_BYTES + (chunk ^ (row % 8 * TURN)) * 16;
      store_global(reinterpret_cast<Chunk*>(out + row * 2 * ROW_BYTES) + chunk,
                   load_shared<Chunk>(from));
    }
  }
}

// A warpgroup's part of out and lse, or of the split's results.
SM90_DEVICE void store_attended(const float (&sum)[2][64], Rows& rows, const MlaArguments& p,
                                const MlaWork& w, char* memory, int group) {
  const int lane = lane_index(), first = thread_index() % 128 / 32 * 16, row = first + lane / 4;
  char* sums = memory + MlaTile::EXCHANGED;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.total[half] = sum_of_row(rows.total[half]);
    // Where this warpgroup has read maxima, and the other one reads none.
    const int to = (1 - group) * MlaTile::ROWS + row + 8 * half;
    if (lane % 4 == 0) store_shared(sums + 4 * to, rows.total[half]);
  }
  named_barrier_sync(1, 256);
  const int all = p.Sq * p.H, left = all - w.row - first;  // rows from this warp's first on
  const bool whole = w.splits == 1;
  const int64_t out_row = int64_t{w.sequence} * all + w.row + first;
  const int64_t split_row =
      (int64_t{w.sequence} * p.splits + w.split) * all + w.row + first;
  float scale[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // In the same order in both warpgroups.
    const float total = load_shared<float>(sums + 4 * (row + 8 * half)) +
                        load_shared<float>(sums + 4 * (MlaTile::ROWS + row + 8 * half));
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float divisor = total + sum_of_row(rows.excess[b][half]);
      scale[b][half] = total == 0.0f ? 0.0f : 1.0f / divisor;
    }
    const int m = row + 8 * half - first;
    if (group == 0 && lane % 4 == 0 && m < left) {
      const float lse = total == 0.0f ? minus_infinity() : rows.top[half] + log2_of(total);
      const int of = w.row + first + m;
      const int64_t at = (int64_t{w.sequence} * p.H + of % p.H) * p.Sq + of / p.H;
      if (whole) store_global(p.lse + at, lse * 0.6931471805599453f);
      if (!whole) store_global(p.partial_lse + split_row + m, lse);
    }
  }
  // q and the tokens are not read any more.
  char* staged = memory + warp_index() * 16 * 256 * 4;
  if (whole) {
    auto* out = static_cast<bf16*>(p.out) + out_row * MlaTile::VALUES + group * 256;
    store_rows<uint32_t>(sum, scale, staged, reinterpret_cast<char*>(out), smaller(left, 16));
  } else {
    float* out = p.partial + split_row * MlaTile::VALUES + group * 256;
    store_rows<FloatPair>(sum, scale, staged, reinterpret_cast<char*>(out), smaller(left, 16));
  }
}

// Adds up the splits of each row, weighted with their shares of the sum of exponentials. A warp
// takes a row; blocks of 4 rows.
SM90_KERNEL(128, 1)
void mla_combine(SM90_PARAMETER MlaArguments p) {
  grid_dependency_wait();
  const int all = p.Sq * p.H, tiles = (all + 3) / 4;
  const int sequence = block_index() / tiles, m = block_index() % tiles * 4 + warp_index();
  const Splits cut(p, sequence);
  if (cut.count == 1 || m >= all) return;
  const int64_t first = int64_t{sequence} * p.splits * all + m;  // of split 0
  float top = minus_infinity();
  for (int i = 0; i < cut.count; ++i) {
    top = larger(load_written(p.partial_lse + first + int64_t{i} * all), top);
  }
  const float zero = top == minus_infinity() ? 0.0f : top;
  float total = 0.0f, sum[16] = {};
  for (int i = 0; i < cut.count; ++i) {
    const int64_t at = first + int64_t{i} * all;
    const float weight = exp2_of(load_written(p.partial_lse + at) - zero);
    total += weight;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const float* from = p.partial + at * MlaTile::VALUES + j / 2 * 64 + lane_index() * 2;
      const auto x = load_written(reinterpret_cast<const FloatPair*>(from));
      sum[j] = fused_multiply_add(weight, x.low, sum[j]);
      sum[j + 1] = fused_multiply_add(weight, x.high, sum[j + 1]);
    }
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  bf16* out = static_cast<bf16*>(p.out) + (int64_t{sequence} * all + m) * MlaTile::VALUES;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    store_global(reinterpret_cast<uint32_t*>(out + j / 2 * 64 + lane_index() * 2),
                 pack(to_bf16(sum[j] * scale), to_bf16(sum[j + 1] * scale)));
  }
  if (lane_index() == 0) {
    const float lse = total == 0.0f ? minus_infinity() : top + log2_of(total);
    const int64_t at = (int64_t{sequence} * p.H + m % p.H) * p.Sq + m / p.H;
    store_global(p.lse + at, lse * 0.6931471805599453f);
  }
}

}  // namespace sm90
