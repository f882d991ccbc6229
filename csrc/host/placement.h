// Expert placement on plain arrays. Python checks the arguments; module.cpp is the binding.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace deepkern {

struct Cluster {
  int experts, replicas, groups, nodes, gpus;
  // As in DeepSeek's EPLB: if the nodes divide the groups evenly, each node gets whole groups;
  // otherwise all GPUs form one pool.
  bool hierarchical() const { return groups % nodes == 0; }
};

// Places the experts of one layer.
void place_experts(const double* load,  // [experts], >= 0 and finite
                   const Cluster& cluster,
                   int64_t* phy2log);  // out: [replicas], the expert of each slot

// One replica to copy from slot `from` to slot `to` of its layer.
struct Move {
  int64_t layer, to, from, expert;
};

// Aligns the new placement of one layer with the old one. Permutes the GPUs of `placed` (if
// hierarchical, the nodes and the GPUs within a node) and the slots of each GPU, so that as many
// slots as possible keep their expert. Appends a move for each other slot.
void align_placement(const int64_t* old,  // [replicas], the expert of each slot
                     const Cluster& cluster, int64_t layer,
                     int64_t* placed,  // [replicas], permuted in place
                     std::vector<Move>* moves);

// Calls work(layer) for each layer on up to `threads` threads; 0: one thread per core.
void for_each_layer(int64_t layers, int threads, const std::function<void(int64_t)>& work);

}  // namespace deepkern
