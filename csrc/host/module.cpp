// deepkern._host: planners on numpy arrays, for the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "placement.h"

namespace py = pybind11;

namespace {

using Counts = py::array_t<int64_t, py::array::c_style>;
using Tiles = py::array_t<int32_t>;

// The M-tiles of a grouped GEMM whose groups are stored one after another.
std::pair<Tiles, Tiles> grouped_tile_schedule(const Counts& tokens_per_group, int64_t block_m) {
  if (tokens_per_group.ndim() != 1) {
    throw py::value_error("grouped_tile_schedule: tokens_per_group: expected rank 1, got rank " +
                          std::to_string(tokens_per_group.ndim()));
  }
  if (block_m < 1) {
    throw py::value_error("grouped_tile_schedule: block_m: expected at least 1, got " +
                          std::to_string(block_m));
  }
  // Copy the counts: another thread may change the array between the two loops.
  const std::vector<int64_t> counts(tokens_per_group.data(),
                                    tokens_per_group.data() + tokens_per_group.size());
  int64_t rows = 0, tiles = 0;
  for (size_t g = 0; g < counts.size(); ++g) {
    if (counts[g] < 0 || counts[g] > INT32_MAX - rows) {
      throw py::value_error("grouped_tile_schedule: tokens_per_group[" + std::to_string(g) +
                            "]: expected counts >= 0 with a sum below 2^31, got " +
                            std::to_string(counts[g]));
    }
    rows += counts[g];
    tiles += counts[g] / block_m + (counts[g] % block_m != 0);
  }
  Tiles group(tiles), first_row(tiles);
  int32_t* group_out = group.mutable_data();
  int32_t* first_row_out = first_row.mutable_data();
  {
    py::gil_scoped_release release_gil;
    int64_t row = 0;
    for (size_t g = 0; g < counts.size(); row += counts[g++]) {
      for (int64_t m = 0; m < counts[g]; m += block_m) {
        *group_out++ = static_cast<int32_t>(g);
        *first_row_out++ = static_cast<int32_t>(row + m);
      }
    }
  }
  return {std::move(group), std::move(first_row)};
}

using Placement = py::array_t<int64_t, py::array::c_style>;

// kernels/deepkern/experts/ checks the arguments.
Placement rebalance_experts(const py::array_t<double, py::array::c_style>& load, int num_replicas,
                            int num_groups, int num_nodes, int num_gpus, int threads) {
  const int64_t layers = load.shape(0), experts = load.shape(1), replicas = num_replicas;
  const deepkern::Cluster cluster{static_cast<int>(experts), num_replicas, num_groups, num_nodes,
                                  num_gpus};
  Placement phy2log({layers, replicas});
  const double* in = load.data();
  int64_t* out = phy2log.mutable_data();
  {
    py::gil_scoped_release release_gil;
    deepkern::for_each_layer(layers, threads, [&](int64_t l) {
      deepkern::place_experts(in + l * experts, cluster, out + l * replicas);
    });
  }
  return phy2log;
}

std::pair<Placement, Placement> replicas_of(const Placement& phy2log, int64_t experts) {
  const int64_t layers = phy2log.shape(0), replicas = phy2log.shape(1);
  Placement logcnt({layers, experts});
  int64_t* count = logcnt.mutable_data();
  const int64_t* expert = phy2log.data();
  std::fill_n(count, layers * experts, 0);
  for (int64_t i = 0; i < layers * replicas; ++i) ++count[i / replicas * experts + expert[i]];
  int64_t max_count = 1;
  for (int64_t i = 0; i < layers * experts; ++i) max_count = std::max(max_count, count[i]);
  Placement log2phy({layers, experts, max_count});
  int64_t* slot = log2phy.mutable_data();
  std::fill_n(slot, layers * experts * max_count, -1);
  std::vector<int64_t> written(layers * experts, 0);  // slots of each expert so far
  for (int64_t i = 0; i < layers * replicas; ++i) {
    const int64_t e = i / replicas * experts + expert[i];
    slot[e * max_count + written[e]++] = i % replicas;
  }
  return {std::move(log2phy), std::move(logcnt)};
}

std::pair<Placement, Placement> plan_moves(const Placement& old_phy2log, const Placement& phy2log,
                                           int num_experts, int num_groups, int num_nodes,
                                           int num_gpus, int threads) {
  const int64_t layers = phy2log.shape(0), replicas = phy2log.shape(1);
  const deepkern::Cluster cluster{num_experts, static_cast<int>(replicas), num_groups, num_nodes,
                                  num_gpus};
  Placement aligned({layers, replicas});
  std::copy_n(phy2log.data(), layers * replicas, aligned.mutable_data());
  const int64_t* old = old_phy2log.data();
  int64_t* out = aligned.mutable_data();
  std::vector<std::vector<deepkern::Move>> layer_moves(layers);
  {
    py::gil_scoped_release release_gil;
    deepkern::for_each_layer(layers, threads, [&](int64_t l) {
      deepkern::align_placement(old + l * replicas, cluster, l, out + l * replicas,
                                &layer_moves[l]);
    });
  }
  int64_t count = 0;
  for (const auto& moves : layer_moves) count += moves.size();
  Placement all_moves({count, int64_t{4}});
  int64_t* row = all_moves.mutable_data();
  for (const auto& moves : layer_moves) {
    for (const auto& m : moves) {
      for (int64_t value : {m.layer, m.to, m.from, m.expert}) *row++ = value;
    }
  }
  return {std::move(aligned), std::move(all_moves)};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Planners on numpy arrays.";
  m.def("grouped_tile_schedule", &grouped_tile_schedule, py::arg("tokens_per_group"),
        py::arg("block_m"),
        "The M-tiles of a grouped GEMM whose groups are stored one after another.\n\n"
        "Args:\n"
        "    tokens_per_group: int array [G], rows of each group; 0 is allowed.\n"
        "    block_m: rows per tile, at least 1.\n\n"
        "Returns:\n"
        "    group, first_row: int32 [tiles]; the rows of a tile belong to one group.\n\n"
        "Raises:\n"
        "    ValueError: a negative count, a sum of 2^31 or more, block_m < 1.");
  m.def("rebalance_experts", &rebalance_experts, py::arg("load"), py::arg("num_replicas"),
        py::arg("num_groups"), py::arg("num_nodes"), py::arg("num_gpus"), py::arg("threads") = 0,
        "deepkern.rebalance_experts on float64 [L, E], unchecked: phy2log int64 [L, R]. The\n"
        "result does not depend on the number of threads; 0: one thread per core.");
  m.def("replicas_of", &replicas_of, py::arg("phy2log"), py::arg("num_experts"),
        "log2phy int64 [L, E, X] and logcnt int64 [L, E] of phy2log int64 [L, R], unchecked.");
  m.def("plan_moves", &plan_moves, py::arg("old_phy2log"), py::arg("new_phy2log"),
        py::arg("num_experts"), py::arg("num_groups"), py::arg("num_nodes"), py::arg("num_gpus"),
        py::arg("threads") = 0,
        "deepkern.plan_moves on int64 [L, R], unchecked: the new placement and the moves [n, 4].");
}
