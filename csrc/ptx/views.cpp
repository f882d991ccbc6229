// Views of agents: vector clocks, and how synchronization joins them.
// Source: FastTrack (Flanagan and Freund, PLDI 2009).
#include <algorithm>
#include <utility>

#include "happens_before.h"

namespace deepkern::ptx {
namespace {

void join_clocks(std::vector<Clock>& into, const std::vector<Clock>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

}  // namespace

void Clocks::join(const Clocks& other) {
  join_clocks(generic, other.generic);
  join_clocks(async, other.async);
}

void Clocks::fence_proxy() { join_clocks(async, generic); }

void View::join(const View& other) {
  Clocks::join(other);
  for (const auto& [cluster, clocks] : other.foreign) foreign[cluster].join(clocks);
}

void View::fence_proxy() {
  Clocks::fence_proxy();
  for (auto& item : foreign) item.second.fence_proxy();
}

int Agents::add(std::string name) {
  names_.push_back(std::move(name));
  clocks_.push_back(1);
  return int(names_.size()) - 1;
}

}  // namespace deepkern::ptx
