// Maps the GPUs of a new placement to physical GPUs so that as few experts as possible move.
//
// GPUs are interchangeable, so permuting them does not change the quality of a placement. For each
// pair, count the experts that new GPU i and old GPU j have in common; a perfect matching of the
// largest sum gives the mapping. If groups are bound to nodes, match the GPUs within each pair of
// nodes first, then the nodes.
//
// Source of the matching: the Hungarian method (Kuhn 1955, Munkres 1957), with shortest augmenting
// paths and potentials: O(n^3).
#include <algorithm>
#include <limits>
#include <tuple>

#include "placement.h"

namespace deepkern {
namespace {

using Matrix = std::vector<std::vector<int>>;

// The column of each row in a perfect matching of the largest sum of gain[row][column].
std::vector<int> match(const Matrix& gain) {
  const int n = static_cast<int>(gain.size()), root = n;
  std::vector<int> row_of(n + 1, -1), column_of(n), row_price(n, 0), column_price(n + 1, 0);
  for (int r = 0; r < n; ++r) {
    // The extra column `root` is the start of the path: row r is assigned to it. Grow the cheapest
    // alternating path to a free column.
    std::vector<int> slack(n, std::numeric_limits<int>::max()), previous(n, root);
    std::vector<bool> reached(n + 1, false);
    int column = root;
    row_of[root] = r;
    while (row_of[column] >= 0) {
      reached[column] = true;
      const int row = row_of[column];
      int least = std::numeric_limits<int>::max(), next = root;
      for (int c = 0; c < n; ++c) {
        if (reached[c]) continue;
        const int reduced = -gain[row][c] - row_price[row] - column_price[c];
        if (reduced < slack[c]) slack[c] = reduced, previous[c] = column;
        if (slack[c] < least) least = slack[c], next = c;
      }
      for (int c = 0; c <= n; ++c) {
        if (reached[c]) {
          row_price[row_of[c]] += least, column_price[c] -= least;
        } else if (c < n) {
          slack[c] -= least;
        }
      }
      column = next;
    }
    for (; column != root; column = previous[column]) row_of[column] = row_of[previous[column]];
    row_of[root] = -1;
  }
  for (int c = 0; c < n; ++c) column_of[row_of[c]] = c;
  return column_of;
}

// The number of equal elements of two sorted arrays.
int count_common(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  int common = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i] == b[j]) ++common, ++i, ++j;
    else if (a[i] < b[j]) ++i;
    else ++j;
  }
  return common;
}

// The sorted experts of each GPU. slot: [gpus * slots].
std::vector<std::vector<int64_t>> experts_per_gpu(const int64_t* slot, int gpus, int slots) {
  std::vector<std::vector<int64_t>> experts;
  for (int g = 0; g < gpus; ++g, slot += slots) {
    experts.emplace_back(slot, slot + slots);
    std::sort(experts.back().begin(), experts.back().end());
  }
  return experts;
}

// The old GPU that each new GPU is mapped to. placed, old: the sorted experts of each GPU.
std::vector<int> match_gpus(const std::vector<std::vector<int64_t>>& placed,
                            const std::vector<std::vector<int64_t>>& old, int nodes) {
  const int gpus = static_cast<int>(old.size()), size = gpus / nodes;
  // Within new node i and old node j: the GPU that each GPU is mapped to, and the experts kept.
  std::vector<std::vector<std::vector<int>>> inner(nodes, std::vector<std::vector<int>>(nodes));
  Matrix kept(nodes, std::vector<int>(nodes, 0));
  for (int i = 0; i < nodes; ++i) {
    for (int j = 0; j < nodes; ++j) {
      Matrix common(size, std::vector<int>(size));
      for (int a = 0; a < size; ++a)
        for (int b = 0; b < size; ++b)
          common[a][b] = count_common(placed[i * size + a], old[j * size + b]);
      inner[i][j] = match(common);
      for (int a = 0; a < size; ++a) kept[i][j] += common[a][inner[i][j][a]];
    }
  }
  const std::vector<int> node = match(kept);
  std::vector<int> old_gpu(gpus);
  for (int g = 0; g < gpus; ++g)
    old_gpu[g] = node[g / size] * size + inner[g / size][node[g / size]][g % size];
  return old_gpu;
}

// Writes `experts` (sorted) to the slots of a GPU whose old experts are `old`. Experts that the GPU
// has already keep their slot.
void fill_slots(std::vector<int64_t> experts, const int64_t* old, int slots, int64_t* out) {
  std::vector<int> free_slots;
  for (int s = 0; s < slots; ++s) {
    const auto it = std::lower_bound(experts.begin(), experts.end(), old[s]);
    if (it != experts.end() && *it == old[s]) {
      out[s] = old[s];
      experts.erase(it);
    } else {
      free_slots.push_back(s);
    }
  }
  for (size_t i = 0; i < free_slots.size(); ++i) out[free_slots[i]] = experts[i];
}

}  // namespace

void align_placement(const int64_t* old, const Cluster& c, int64_t layer, int64_t* placed,
                     std::vector<Move>* moves) {
  const int slots = c.replicas / c.gpus;
  const auto before = experts_per_gpu(old, c.gpus, slots);
  const auto after = experts_per_gpu(placed, c.gpus, slots);
  const std::vector<int> old_gpu = match_gpus(after, before, c.hierarchical() ? c.nodes : 1);
  for (int g = 0; g < c.gpus; ++g)
    fill_slots(after[g], old + old_gpu[g] * slots, slots, placed + old_gpu[g] * slots);

  // Copy each new replica from the nearest old one: on the same GPU, else on the same node, else on
  // any node. Ties go to the GPU that has sent the fewest so far.
  std::vector<std::vector<int>> holders(c.experts);
  for (int s = 0; s < c.replicas; ++s) holders[old[s]].push_back(s);
  std::vector<int> sent(c.gpus, 0);
  const int node_slots = c.replicas / c.nodes;
  for (int s = 0; s < c.replicas; ++s) {
    if (placed[s] == old[s]) continue;
    std::tuple<int, int, int> nearest{3, 0, -1};  // distance, sent, slot
    for (int from : holders[placed[s]]) {
      const int distance = from / slots == s / slots             ? 0
                           : from / node_slots == s / node_slots ? 1
                                                                 : 2;
      nearest = std::min(nearest, {distance, sent[from / slots], from});
    }
    const int from = std::get<2>(nearest);
    ++sent[from / slots];
    moves->push_back({layer, s, from, placed[s]});
  }
}

}  // namespace deepkern
