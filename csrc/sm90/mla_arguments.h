// What mla_decode is given: by the op, for the launcher and the kernel.
#pragma once

#include <cstdint>

struct MlaArguments {
  const void *q, *cache;           // bf16, 576 values; or the cache FP8, 656 bytes a token
  const int *table, *lengths;
  void* out;                       // bf16 [batch, Sq, H, 512]
  float* lse;                      // [batch, H, Sq]
  float *partial, *partial_lse;    // [batch, splits, Sq * H, 512] and without 512; log2
  int64_t q_batch, q_query, q_head, table_row;  // strides, in elements
  int64_t block, slot;             // of pages and tokens, in elements of the cache
  float score_scale;               // softmax_scale · log2(e)
  int batch, Sq, H, capacity, blocks, page;
  int tiles, splits;               // tiles of 64 rows of a sequence; splits that the grid has
  int min_split, max_splits;       // fewest tokens of a split; most splits
  bool causal;
  bool by_tma;                     // pages are multiples of 64 tokens, all rows `slot` apart
  bool fp8;                        // the cache's format
  int64_t page_rows;               // by_tma: rows from a page to the next

  // Rows of the cache as TMA sees it.
  int64_t map_rows() const { return (blocks - 1) * page_rows + page; }
};

// How the work is cut, from the sizes: `min_split` and `max_splits` by the rows of a sequence alone,
// so that neither the batch nor the width of the table changes a bit; as the Triton kernel has them.
inline void cut_mla(MlaArguments& p) {
  p.tiles = static_cast<int>((int64_t{p.Sq} * p.H + 63) / 64);
  int power = 1;
  while (power < p.tiles) power *= 2;
  p.max_splits = power == 1 ? 64 : power < 16 ? 128 / power : 8;
  p.min_split = int64_t{p.Sq} * p.H <= 32 ? 512 : 1024;
  const int most = p.capacity / p.min_split + (p.capacity % p.min_split > 0);
  p.splits = most < 1 ? 1 : most < p.max_splits ? most : p.max_splits;
  if (p.page < 1) p.page = 1;  // pages of no tokens: no length reaches one, but divided by it is
  p.page_rows = p.slot > 0 ? p.block / p.slot : 0;
  p.by_tma = !p.fp8 && p.blocks > 0 && p.page % 64 == 0 && p.slot >= 576 && p.block % p.slot == 0 &&
             p.page_rows >= p.page && p.map_rows() < INT32_MAX - 64;
}
