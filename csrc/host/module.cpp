// deepkern._host: planners that work on numpy arrays on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
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
  // A copy, so that nobody changes a count between sizing the result and filling it.
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
    py::gil_scoped_release others_may_run;
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
