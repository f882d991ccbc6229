// deepkern._host: planners that work on numpy arrays on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Counts = py::array_t<int64_t, py::array::c_style>;
using Tiles = py::array_t<int32_t>;

// The M-tiles of a grouped GEMM whose groups' rows stand one after another.
std::pair<Tiles, Tiles> grouped_tile_schedule(const Counts& tokens_per_group, int64_t block_m) {
  if (tokens_per_group.ndim() != 1) {
    throw py::value_error("grouped_tile_schedule: tokens_per_group: expected rank 1, got rank " +
                          std::to_string(tokens_per_group.ndim()));
  }
  if (block_m < 1) {
    throw py::value_error("grouped_tile_schedule: block_m: expected at least 1, got " +
                          std::to_string(block_m));
  }
  const int64_t* counts = tokens_per_group.data();
  const int64_t groups = tokens_per_group.shape(0);
  std::vector<int32_t> group, first_row;
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (counts[g] < 0 || row + counts[g] > INT32_MAX) {
      throw py::value_error("grouped_tile_schedule: tokens_per_group[" + std::to_string(g) +
                            "]: expected counts >= 0 with a sum below 2^31, got " +
                            std::to_string(counts[g]));
    }
    for (int64_t m = 0; m < counts[g]; m += block_m) {
      group.push_back(static_cast<int32_t>(g));
      first_row.push_back(static_cast<int32_t>(row + m));
    }
    row += counts[g];
  }
  const auto tiles = static_cast<py::ssize_t>(group.size());
  return {Tiles(tiles, group.data()), Tiles(tiles, first_row.data())};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Planners on numpy arrays.";
  m.def("grouped_tile_schedule", &grouped_tile_schedule, py::arg("tokens_per_group"),
        py::arg("block_m"),
        "The M-tiles of a grouped GEMM over groups whose rows stand one after another.\n\n"
        "Args:\n"
        "    tokens_per_group: int array [G], the rows of each group; may be 0.\n"
        "    block_m: rows of a tile.\n\n"
        "Returns:\n"
        "    group, first_row: int32 [tiles]; no tile crosses from one group into the next.\n\n"
        "Raises:\n"
        "    ValueError: a negative count, a sum of 2^31 or more, block_m < 1.");
}
