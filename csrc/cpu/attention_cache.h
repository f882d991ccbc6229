// The paged caches of the attention ops: their formats, and checks of the arguments.
//
// The latent cache: a token is R latents and D RoPE values. In a cache of a real dtype they are
// consecutive. In the FP8 format a token has R e4m3 latents, ceil(R / 128) fp32 scales and D bf16
// RoPE values, without alignment.
#pragma once

#include "tensors.h"

namespace deepkern {

struct LatentCache {
  char* data;
  Real type;                          // of all values, or of the RoPE values in the FP8 format
  bool fp8;                           // whether the cache has the FP8 format
  int64_t num_pages, page_size;       // page_size in tokens
  int64_t page_stride, token_stride;  // bytes
  int64_t R, D;                       // latents and RoPE values of a token

  int64_t num_slots() const { return num_pages * page_size; }
  int64_t rope_offset() const { return fp8 ? R + 4 * ceil_div(R, 128) : R * size_of(type); }
  char* at(int64_t page, int64_t offset) const {
    return data + page * page_stride + offset * token_stride;
  }
  // Of a slot in [0, num_slots()).
  char* slot(int64_t slot) const { return at(slot / page_size, slot % page_size); }
};

// Checks a cache [blocks, page, 1, width] whose tokens have R latents; D is what the width leaves.
inline LatentCache latent_cache(const Arguments& arguments, const Tensor& cache, int64_t R) {
  const bool fp8 = cache.scalar_type() == ScalarType::Byte;
  if (fp8) {
    arguments.check_shape("cache", cache, {-1, -1, 1, -1});
  } else {
    arguments.check_real("cache", cache, {-1, -1, 1, -1});
  }
  const Real type = fp8 ? Real::bf16 : real_type(arguments.op, "cache", cache.scalar_type());
  const int64_t size = fp8 ? 1 : size_of(type);
  const int64_t rest = cache.size(3) - (fp8 ? R + 4 * ceil_div(R, 128) : R);
  arguments.require(R >= 0 && rest >= 0 && (!fp8 || rest % 2 == 0), "v_head_dim",
                    "latents that fit into the cache's width");
  return {static_cast<char*>(cache.data_ptr()),
          type,
          fp8,
          cache.size(0),
          cache.size(1),
          cache.stride(0) * size,
          cache.stride(1) * size,
          R,
          fp8 ? rest / 2 : rest};
}

// The indexer's cache. The bytes of a page are the D e4m3 values of each of its tokens, then the
// fp32 scale of each, without alignment.
struct IndexerCache {
  uint8_t* data;
  int64_t num_pages, page_size;  // page_size in tokens
  int64_t page_stride;           // bytes
  int64_t D;                     // values of a token

  uint8_t* codes(int64_t page, int64_t offset) const {
    return data + page * page_stride + offset * D;
  }
  uint8_t* scale(int64_t page, int64_t offset) const {
    return data + page * page_stride + page_size * D + offset * 4;
  }
};

// Checks a cache [blocks, page, 1, D + 4] with contiguous pages.
inline IndexerCache indexer_cache(const Arguments& arguments, const Tensor& cache, int64_t D) {
  arguments.check("cache", cache, ScalarType::Byte, {-1, -1, 1, D + 4});
  const int64_t page_size = cache.size(1), width = D + 4;
  arguments.require(cache.numel() == 0 || page_size == 1 || cache.stride(1) == width, "cache",
                    "contiguous pages");
  arguments.require(page_size * width < int64_t{1} << 31, "cache",
                    "pages of fewer than 2**31 bytes");
  return {static_cast<uint8_t*>(cache.data_ptr()), cache.size(0), page_size, cache.stride(0), D};
}

}  // namespace deepkern
