// Rows of ragged attention, read as floats; see every_isa.h.
//
// The heads of q that use the same head of k and v are stacked: row r of a sequence is head
// r % group of query r / group.

namespace deepkern::DEEPKERN_ISA {
namespace {

// The rows of a tile, numbered from 0.
struct StackedRows {
  StackedRows(const RaggedTile& tile, int64_t kv_head, int64_t heads_per_kv_head)
      : span(tile.span),
        first(tile.first),
        count(tile.count),
        first_head(kv_head * heads_per_kv_head),
        group(heads_per_kv_head) {}
  const Span span;
  const int64_t first, count, first_head, group;
  int64_t query(int64_t i) const { return span.begin + (first + i) / group; }
  int64_t head(int64_t i) const { return first_head + (first + i) % group; }
  // A row attends to the first keys of its sequence, this many.
  int64_t visible_keys(int64_t i, bool causal) const {
    const int64_t keys = span.other_size();
    if (!causal) return keys;
    return std::min(std::max<int64_t>(query(i) + 1 - span.end + keys, 0), keys);
  }
};

inline void load_stacked_rows(const HeadRows& x, const StackedRows& rows, Matrix out) {
  DEEPKERN_FOR_REAL(
      x.type, for (int64_t i = 0; i < rows.count; ++i) {
        load_row<type>(x.data, x.at(rows.query(i), rows.head(i)), x.width, out.row(i));
      });
}

// Rows [first, first + count) of one head.
inline void load_rows(const HeadRows& x, int64_t first, int64_t head, int64_t count, Matrix out) {
  DEEPKERN_FOR_REAL(
      x.type, for (int64_t i = 0; i < count;
                   ++i) { load_row<type>(x.data, x.at(first + i, head), x.width, out.row(i)); });
}

}  // namespace
}  // namespace deepkern::DEEPKERN_ISA
