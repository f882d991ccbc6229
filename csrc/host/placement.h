// Expert placement on plain arrays. module.cpp gives it to Python, where arguments are checked.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace deepkern {

struct Cluster {
  int experts, replicas, groups, nodes, gpus;
  // As in DeepSeek's EPLB: whole groups to nodes where they divide evenly, else one pool of GPUs.
  bool hierarchical() const { return groups % nodes == 0; }
};

// One layer. load: [experts], >= 0 and finite. phy2log: [replicas].
void place_experts(const double* load, const Cluster& cluster, int64_t* phy2log);

struct Move {
  int64_t layer, to, from, expert;  // to and from are slots of the layer
};

// One layer. Permutes `placed`'s GPUs (whole nodes, and GPUs within one, if hierarchical) and the
// slots in each so that as many slots as possible keep the expert of `old`; appends the others.
void align_placement(const int64_t* old, const Cluster& cluster, int64_t layer, int64_t* placed,
                     std::vector<Move>* moves);

// Calls work(layer) for all layers on up to `threads` threads (0: as many as there are cores).
void for_each_layer(int64_t layers, int threads, const std::function<void(int64_t)>& work);

}  // namespace deepkern
