// What the launchers of mla_prefill and of its gradients share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mla_prefill_schedule.cuh"
#include "tensor_map.h"

namespace deepkern {

// Encodes x [rows, heads, dim], whose heads are `head_stride` values apart within a row. Without
// rows nothing is loaded, and the map stays empty.
inline bool encode_heads(CUtensorMap* map, const void* x, int64_t rows, int64_t heads, int64_t dim,
                         int64_t row_stride, int64_t head_stride, int box_rows) {
  if (rows == 0) {
    *map = {};
    return true;
  }
  const int64_t columns = (heads - 1) * head_stride + dim;
  const int64_t row_bytes = (rows > 1 ? row_stride : columns) * 2;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, x, rows, columns, row_bytes, 2, box_rows);
}

// Writes a table of tiles: see sm90::find_prefill_tiles.
template <int ROWS>
cudaError_t launch_find_prefill_tiles(sm90::Boundaries tiled, sm90::Boundaries others,
                                      bool last_first, int* tiles, int num_tiles,
                                      cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((tiled.count + 1 + 3) / 4));
  config.blockDim = dim3(128);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sm90::find_prefill_tiles<ROWS>, tiled, others, last_first,
                            tiles, num_tiles);
}

}  // namespace deepkern
