// Which GPU plays which role of a new placement, so that as few experts as possible have to move.
//
// GPUs are alike, so a placement is as good with their roles exchanged. The slots of new GPU i that
// old GPU j fills already are counted for all pairs, and a perfect matching of the largest sum is
// sought. If groups are bound to nodes, GPUs are matched within each pair of nodes, then nodes.
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
  const int n = static_cast<int>(gain.size()), none = n;
  std::vector<int> row_of(n + 1, -1), column_of(n), row_price(n, 0), column_price(n + 1, 0);
  for (int r = 0; r < n; ++r) {
    // Column `none` stands for where row r comes in; grow the cheapest path to a free column.
    std::vector<int> slack(n, std::numeric_limits<int>::max()), before(n, none);
    std::vector<bool> reached(n + 1, false);
    int column = none;
    row_of[none] = r;
    while (row_of[column] >= 0) {
      reached[column] = true;
      const int row = row_of[column];
      int least = std::numeric_limits<int>::max(), next = none;
      for (int c = 0; c < n; ++c) {
        if (reached[c]) continue;
        const int reduced = -gain[row][c] - row_price[row] - column_price[c];
        if (reduced < slack[c]) slack[c] = reduced, before[c] = column;
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
    for (; column != none; column = before[column]) row_of[column] = row_of[before[column]];
    row_of[none] = -1;
  }
  for (int c = 0; c < n; ++c) column_of[row_of[c]] = c;
  return column_of;
}

int in_common(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {  // both sorted
  int common = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i] == b[j]) ++common, ++i, ++j;
    else if (a[i] < b[j]) ++i;
    else ++j;
  }
  return common;
}

std::vector<std::vector<int64_t>> gpus_of(const int64_t* slot, int gpus, int slots) {
  std::vector<std::vector<int64_t>> experts;
  for (int g = 0; g < gpus; ++g, slot += slots) {
    experts.emplace_back(slot, slot + slots);
    std::sort(experts.back().begin(), experts.back().end());
  }
  return experts;
}

// The old GPU whose place each new GPU takes.
std::vector<int> roles(const std::vector<std::vector<int64_t>>& placed,
                       const std::vector<std::vector<int64_t>>& old, int nodes) {
  const int gpus = static_cast<int>(old.size()), size = gpus / nodes;
  std::vector<std::vector<std::vector<int>>> inner(nodes, std::vector<std::vector<int>>(nodes));
  Matrix kept(nodes, std::vector<int>(nodes, 0));
  for (int i = 0; i < nodes; ++i) {
    for (int j = 0; j < nodes; ++j) {
      Matrix common(size, std::vector<int>(size));
      for (int a = 0; a < size; ++a)
        for (int b = 0; b < size; ++b)
          common[a][b] = in_common(placed[i * size + a], old[j * size + b]);
      inner[i][j] = match(common);
      for (int a = 0; a < size; ++a) kept[i][j] += common[a][inner[i][j][a]];
    }
  }
  const std::vector<int> node = match(kept);
  std::vector<int> role(gpus);
  for (int g = 0; g < gpus; ++g)
    role[g] = node[g / size] * size + inner[g / size][node[g / size]][g % size];
  return role;
}

// Writes `experts` (sorted) to the slots of a GPU that held `old`: those it has stay where they are.
void fill(std::vector<int64_t> experts, const int64_t* old, int slots, int64_t* out) {
  std::vector<int> open;
  for (int s = 0; s < slots; ++s) {
    const auto it = std::lower_bound(experts.begin(), experts.end(), old[s]);
    if (it != experts.end() && *it == old[s]) {
      out[s] = old[s];
      experts.erase(it);
    } else {
      open.push_back(s);
    }
  }
  for (size_t i = 0; i < open.size(); ++i) out[open[i]] = experts[i];
}

}  // namespace

void align_placement(const int64_t* old, const Cluster& c, int64_t layer, int64_t* placed,
                     std::vector<Move>* moves) {
  const int slots = c.replicas / c.gpus;
  const auto before = gpus_of(old, c.gpus, slots), after = gpus_of(placed, c.gpus, slots);
  const std::vector<int> role = roles(after, before, c.hierarchical() ? c.nodes : 1);
  for (int g = 0; g < c.gpus; ++g)
    fill(after[g], old + role[g] * slots, slots, placed + role[g] * slots);

  // Each new replica comes from the nearest old one: of the same GPU, the same node, any; among
  // equals from the GPU that has sent least so far.
  std::vector<std::vector<int>> holders(c.experts);
  for (int s = 0; s < c.replicas; ++s) holders[old[s]].push_back(s);
  std::vector<int> sent(c.gpus, 0);
  const int node_slots = c.replicas / c.nodes;
  for (int s = 0; s < c.replicas; ++s) {
    if (placed[s] == old[s]) continue;
    std::tuple<int, int, int> nearest{3, 0, -1};
    for (int from : holders[placed[s]]) {
      const int far = from / slots == s / slots ? 0 : from / node_slots == s / node_slots ? 1 : 2;
      nearest = std::min(nearest, {far, sent[from / slots], from});
    }
    const int from = std::get<2>(nearest);
    ++sent[from / slots];
    moves->push_back({layer, s, from, placed[s]});
  }
}

}  // namespace deepkern
