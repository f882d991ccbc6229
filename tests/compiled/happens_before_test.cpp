// Tests of csrc/ptx/happens_before.h: each rule in a scenario, and random programs against a model
// that remembers all accesses. Arguments: "rules", or "random" and a seed.
#include "../../csrc/ptx/happens_before.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

using namespace deepkern::ptx;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  failures++;
  printf("failed: %s\n", what);
}

enum Operation { READ, WRITE, ATOMIC };

// Agents 0 and 1 are warps, 2 and 3 copies of the async proxy; the clock of an agent is 1 until it
// releases. A view without entries covers nothing.
Access by(int agent, int lane = 255, int instruction = 0, Clock clock = 1) {
  return {uint16_t(agent), agent < 2 ? Proxy::GENERIC : Proxy::ASYNC, uint8_t(lane), clock,
          instruction};
}

View sees(std::vector<Clock> generic, std::vector<Clock> async = {}) {
  View view;
  view.generic = std::move(generic);
  view.async = std::move(async);
  return view;
}

const View NOTHING;

// ---- Rules of shared memory

void test_agents_race() {
  for (int first = 0; first < 3; first++) {
    for (int second = 0; second < 3; second++) {
      auto run = [&](const View& view) {
        Shadow s(64, true, false);
        auto access = [&](int op, const Access& a, const View& v) {
          return op == READ ? s.read(4, 8, a, v, 0)
                            : op == WRITE ? s.write(4, 8, a, v, 0) : s.atomic(4, 8, a, v, 0);
        };
        expect(!access(first, by(0, 3, 70, 5), NOTHING).found, "a first access is no conflict");
        return access(second, by(1, 3, 71), view);
      };
      bool conflicts = first == WRITE || second == WRITE || first != second;
      Conflict c = run(sees({4}));
      expect(c.found == conflicts, "unordered accesses conflict unless both read or are atomic");
      expect(!run(sees({5})).found, "a view that has the clock covers the access");
      if (!conflicts) continue;
      expect(c.address == 4 && c.previous.agent == 0 && c.previous.instruction == 70 &&
                 c.previous.clock == 5 && c.previous.lane == 3,
             "a conflict names the previous access");
      expect(c.previous_is_write == (first != READ), "a conflict names the kind of access");
      expect(!c.uninitialized && !c.proxy_fence_is_missing, "a race is only a race");
    }
  }
}

void test_all_readers_are_remembered() {
  for (int third = 0; third < 3; third++) {
    Shadow s(16, true, false);
    for (int agent = 0; agent < 3; agent++) s.read(0, 4, by(agent), NOTHING, 0);
    std::vector<Clock> clocks = {1, 1, 1, 0};
    clocks[third] = 0;
    Conflict c = s.write(0, 4, by(3), sees(clocks), 0);
    expect(c.found && c.previous.agent == third, "a write conflicts with any unordered reader");
  }
  Shadow s(16, true, false);
  for (int agent = 0; agent < 3; agent++) s.read(0, 4, by(agent), NOTHING, 0);
  expect(!s.write(0, 4, by(3), sees({1, 1, 1}), 0).found, "a write after all readers is ordered");
}

void test_proxies() {
  Shadow s(64, true, false);
  s.write(0, 16, by(0), NOTHING, 0);
  Conflict c = s.read(0, 16, by(2), sees({1}), 0);
  expect(c.found && c.proxy_fence_is_missing, "a generic write needs a fence before async reads");
  c = s.read(0, 16, by(2), NOTHING, 0);
  expect(c.found && !c.proxy_fence_is_missing, "without order the fence is not what is missing");
  expect(!s.read(0, 16, by(2), sees({1}, {1}), 0).found, "the fence orders it");
  s.read(16, 16, by(0), NOTHING, 0);
  expect(!s.write(16, 16, by(2), sees({1}), 0).found, "a generic read needs no fence");
  s.write(32, 16, by(2), NOTHING, 0);
  expect(!s.read(32, 16, by(0), sees({0, 0, 1}), 0).found, "an async write needs no fence");
  s.atomic(48, 4, by(0), NOTHING, 0);
  expect(s.read(48, 4, by(2), sees({1}), 0).proxy_fence_is_missing, "an atomic needs a fence");
  View view = sees({3, 1}, {1, 2});
  view.fence_proxy();
  expect(view.async == std::vector<Clock>({3, 2}), "a fence takes the larger clocks");
}

void test_lanes() {
  Shadow s(64, true, false);
  s.write(0, 4, by(0, 1, 7), NOTHING, 5);
  Conflict c = s.read(0, 4, by(0, 2, 8), NOTHING, 5);
  expect(c.found && c.previous.lane == 1, "lanes race within an epoch of the warp");
  s.write(4, 4, by(0, 1, 7), NOTHING, 5);
  expect(!s.read(4, 4, by(0, 2, 8), NOTHING, 6).found, "bar.warp.sync orders lanes");
  expect(!s.read(4, 4, by(0, 255, 8), NOTHING, 6).found, "lane 255 is exempt");
  s.write(8, 4, by(0, 1, 7), NOTHING, 5);
  expect(!s.write(8, 4, by(0, 2, 7), NOTHING, 5).found, "one instruction stores by many lanes");
  c = s.read(8, 4, by(0, 1, 8), NOTHING, 5);
  expect(c.found && c.previous.lane == 2, "the second lane of a store is remembered");
  s.write(12, 4, by(0, 1, 6), NOTHING, 5);
  expect(!s.write(12, 4, by(0, 1, 7), NOTHING, 5).found, "one lane is in program order");
  expect(s.write(12, 4, by(0, 2, 7), NOTHING, 5).found, "the first of two stores is remembered");
  s.read(16, 4, by(0, 1, 6), NOTHING, 5);
  s.read(16, 4, by(0, 2, 6), NOTHING, 5);
  expect(s.write(16, 4, by(0, 2, 7), NOTHING, 5).found, "a write races with reads of other lanes");
  s.atomic(20, 4, by(0, 1, 6), NOTHING, 5);
  expect(!s.atomic(20, 4, by(0, 2, 7), NOTHING, 5).found, "atomics of lanes do not race");
  expect(s.read(20, 4, by(0, 2, 8), NOTHING, 5).found, "a read races with an atomic of a lane");
}

void test_bytes() {
  Shadow s(64, true, true);
  for (int i = 0; i < 4; i++) {
    expect(!s.write(uint32_t(i), 1, by(i & 1, i), NOTHING, 0).found, "bytes of one cell do not race");
  }
  Conflict c = s.read(0, 4, by(1), sees({0}), 1);
  expect(c.found && c.address == 0, "byte 0 was written by the other warp");
  c = s.read(1, 2, by(1), NOTHING, 1);
  expect(c.found && c.address == 2, "byte 2 was written by the other warp");
  expect(!s.write(0, 4, by(1), sees({1}), 1).found, "a write covers the bytes");
  expect(s.read(3, 1, by(0), NOTHING, 1).found, "the cell is whole again");
  s.write(6, 4, by(0), NOTHING, 0);
  c = s.write(4, 8, by(1), NOTHING, 0);
  expect(c.found && c.address == 6, "a conflict has the first byte concerned");
}

void test_initialization() {
  for (bool races : {false, true}) {
    Shadow s(400, races, true);
    Conflict c = s.read(100, 4, by(0), NOTHING, 0);
    expect(c.found && c.uninitialized && c.address == 100, "bytes that were never written");
    s.write(10, 300, by(0), NOTHING, 0);
    expect(!s.read(10, 300, by(0), NOTHING, 0).found, "bytes that were written");
    c = s.read(200, 111, by(0), NOTHING, 0);
    expect(c.found && c.uninitialized && c.address == 310, "the first byte not written");
    s.forget(101, 7);
    c = s.read(64, 64, by(0), NOTHING, 0);
    expect(c.uninitialized && c.address == 101, "forget clears");
    expect(!s.read(108, 4, by(0), NOTHING, 0).found, "forget clears no byte more");
    expect(s.write(108, 1, by(1), NOTHING, 0).found == races, "forget keeps other bytes");
    s.forget(101, 7);
    expect(!s.write(101, 7, by(1), NOTHING, 0).found, "forgotten accesses do not race");
    s.atomic(320, 4, by(0), NOTHING, 0);
    expect(!s.read(320, 4, by(0), NOTHING, 0).found, "an atomic initializes");
  }
  Shadow none(64, false, false);
  none.write(0, 4, by(0), NOTHING, 0);
  expect(!none.read(0, 8, by(1), NOTHING, 0).found, "nothing is checked");
  Shadow only_races(64, true, false);
  expect(!only_races.read(0, 8, by(1), NOTHING, 0).found, "initialization is not checked");
}

// ---- Rules of global memory

constexpr uint64_t BASE = 0x7f0000001000, COUNTER = BASE + 0x100000;

void test_clusters() {
  GlobalOrder g(true, false);
  g.add_memory(BASE, 1 << 20);
  expect(!g.write(BASE, 16, 0, by(0, 1), NOTHING).found, "a first access");
  Conflict c = g.read(BASE + 12, 8, 1, by(0, 1), sees({9}));
  expect(c.found && c.address == BASE + 12 && g.previous_cluster(c) == 0, "clusters race");
  expect(!g.read(BASE, 16, 0, by(0, 2), NOTHING).found, "lanes of a warp are exempt");
  expect(g.read(BASE, 4, 0, by(1), NOTHING).found, "warps of a cluster race");
  expect(!g.read(BASE, 4, 0, by(1), sees({1})).found, "a barrier orders warps of a cluster");
  for (uint32_t cluster = 2; cluster < 9; cluster++)
    expect(!g.read(BASE + 64, 16, cluster, by(0), NOTHING).found, "reads do not race");
  c = g.write(BASE + 64, 4, 8, by(0), NOTHING);
  expect(c.found && g.previous_cluster(c) != 8, "a write after reads of another cluster");
  g.write(BASE + 128, 1, 0, by(0), NOTHING);
  expect(!g.write(BASE + 129, 1, 1, by(0), NOTHING).found, "bytes are separate");
  c = g.read(BASE + 128, 4, 1, by(0), NOTHING);
  expect(c.found && c.address == BASE + 128, "the byte of the other cluster");
  uint64_t page = (BASE & ~0xFFFFull) + 0x20000;
  g.write(page, 4, 3, by(0), NOTHING);
  expect(g.write(page - 64, 128, 4, by(0), NOTHING).address == page, "a range crosses pages");
  expect(!g.write(1 << 20, 4, 3, by(0), NOTHING).found, "other memory");
  expect(!g.write(1 << 20, 4, 4, by(0), NOTHING).found, "other memory is not tracked");
  GlobalOrder off(false, true);
  off.add_memory(BASE, 64);
  off.write(BASE, 4, 0, by(0), NOTHING);
  expect(!off.write(BASE, 4, 1, by(0), NOTHING).found, "races are not checked");
}

void test_publication() {
  GlobalOrder g(true, true);
  g.add_memory(BASE, 1 << 20);
  // Two warps of cluster 0 release on their own; both are acquired.
  for (int warp = 0; warp < 2; warp++) {
    g.write(BASE + 16 * warp, 16, 0, by(warp), NOTHING);
    g.release(COUNTER, 0, warp == 0 ? sees({1}) : sees({0, 1}));
  }
  View one;
  expect(g.read(BASE, 16, 1, by(0), one).found, "not yet acquired");
  g.acquire(COUNTER, 1, one);
  expect(!g.read(BASE, 32, 1, by(0), one).found, "all releases at the address were acquired");
  g.write(BASE, 4, 0, by(0, 255, 0, 2), sees({2}));
  Conflict c = g.read(BASE, 4, 1, by(0), one);
  expect(c.found && g.previous_cluster(c) == 0, "a write after the release is not published");
  // Cluster 2 acquires from cluster 1 what cluster 0 released.
  g.release(COUNTER + 4, 1, one);
  View two;
  g.acquire(COUNTER + 4, 2, two);
  expect(!g.read(BASE + 16, 16, 2, by(0), two).found, "release is transitive");
  // Back in cluster 0, the other warp is ordered as by a barrier.
  View back;
  g.acquire(COUNTER + 4, 0, back);
  expect(back.generic == std::vector<Clock>({1, 1}), "a cluster acquires its own release");
  g.store_relaxed(COUNTER);
  View three;
  g.acquire(COUNTER, 3, three);
  expect(three.foreign.empty(), "a relaxed store ends the release sequence");
}

void test_foreign_views() {
  GlobalOrder g(true, true);
  g.add_memory(BASE, 4096);
  g.write(BASE, 4, 0, by(0), NOTHING);
  g.release(COUNTER, 0, sees({1}));
  View view;
  g.acquire(COUNTER, 1, view);
  Conflict c = g.read(BASE, 4, 1, by(2), view);
  expect(c.found && c.proxy_fence_is_missing, "a copy needs a fence after a store elsewhere");
  view.fence_proxy();
  View joined;
  joined.join(view);
  expect(!g.read(BASE, 4, 1, by(2), joined).found, "the fence of the reader is enough");
  g.atomic(BASE + 8, 4, 0, by(0), NOTHING);
  expect(!g.atomic(BASE + 8, 4, 5, by(0), NOTHING).found, "atomics do not race");
  expect(g.read(BASE + 8, 4, 6, by(0), NOTHING).found, "a read races with an atomic");
  g.read(BASE + 16, 4, 0, by(0), NOTHING);
  expect(g.atomic(BASE + 16, 4, 5, by(0), NOTHING).found, "an atomic races with a read");
}

// ---- Random programs against a model with full vector clocks

struct Past {
  int agent;  // over all clusters
  int cluster;
  int operation;
  Access access;
  Clock warp_epoch;
};

using Vector = std::vector<Clock>;

// What an agent of the model covers, by the agents of all clusters.
struct Full {
  Vector generic, async;

  explicit Full(size_t n = 0) : generic(n, 0), async(n, 0) {}
  static void larger(Vector& a, const Vector& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] = std::max(a[i], b[i]);
  }
  void join(const Full& o) {
    larger(generic, o.generic);
    larger(async, o.async);
  }
};

struct Model {
  bool lanes_count;
  bool communicates;
  std::vector<std::vector<Past>> bytes;

  bool conflicts(const Past& p, const Past& now, const Full& view) const {
    if (p.operation != WRITE && p.operation == now.operation) return false;
    if (p.agent == now.agent) {
      bool same_store = p.operation == WRITE && now.operation == WRITE &&
                        p.access.instruction == now.access.instruction;
      return lanes_count && p.access.lane != 255 && now.access.lane != 255 &&
             p.access.lane != now.access.lane && p.warp_epoch == now.warp_epoch && !same_store;
    }
    if (p.cluster != now.cluster && !communicates) return true;
    if (view.generic[p.agent] < p.access.clock) return true;
    return p.operation != READ && p.access.proxy == Proxy::GENERIC &&
           now.access.proxy == Proxy::ASYNC && view.async[p.agent] < p.access.clock;
  }

  // The first byte with a conflict, or -1.
  int check(int begin, int count, const Past& now, const Full& view) const {
    for (int i = begin; i < begin + count; i++)
      for (const Past& p : bytes[i])
        if (conflicts(p, now, view)) return i;
    return -1;
  }
};

struct Counts {
  long accesses = 0, conflicts = 0;
};

// A program of `clusters` with two warps and two async agents each. Synchronization objects 0 and 1
// are of each cluster (barriers), 2 and 3 of all (flags in global memory).
class Program {
 public:
  Program(std::mt19937& random, int clusters, bool communicates)
      : random_(random),
        clusters_(clusters),
        base_(clusters == 1 ? 0 : BASE),
        shadow_(BYTES, true, false),
        global_(true, communicates),
        views_(4 * clusters),
        full_(4 * clusters, Full(4 * clusters)),
        epochs_(4 * clusters, 0),
        agents_(clusters),
        barrier_views_(2 * clusters),
        barrier_full_(2 * clusters, Full(4 * clusters)),
        flag_full_(2, Full(4 * clusters)),
        model_{clusters == 1, communicates || clusters == 1, {}} {
    model_.bytes.resize(BYTES);
    for (Agents& agents : agents_)
      for (int i = 0; i < 4; i++) agents.add("agent");
    global_.add_memory(BASE, BYTES);
  }

  // Runs to the first conflict. Returns false where the model differs.
  bool run(Counts& counts) {
    sync_percent_ = 10 + draw(70);
    for (int step = 0; step < 150; step++) {
      if (draw(100) < sync_percent_) {
        synchronize(draw(4 * clusters_));
      } else if (Result result = access(counts); result != GO_ON) {
        return result == SAME_CONFLICT;
      }
    }
    return true;
  }

 private:
  static constexpr int BYTES = 24;
  enum Result { GO_ON, SAME_CONFLICT, DIFFERS };

  int draw(int n) { return int(random_() % uint32_t(n)); }

  // Most accesses that conflict are left out, so that programs become long.
  Result access(Counts& counts) {
    int id = draw(4 * clusters_), operation = draw(5) % 3;
    int bytes = 1 << draw(5), begin = draw(BYTES - bytes + 1);
    if (draw(4) != 0) begin = begin / bytes * bytes;
    Access a = by(id % 4, id % 4 < 2 ? draw(3) : 255, operation * 10 + draw(2),
                  agents_[id / 4].now(id % 4));
    Past past = {id, id / 4, operation, a, epochs_[id]};
    int want = model_.check(begin, bytes, past, full_[id]);
    if (want >= 0 && draw(50) != 0) return GO_ON;
    counts.accesses++;
    counts.conflicts += want >= 0;
    for (int i = begin; i < begin + bytes; i++) model_.bytes[i].push_back(past);
    Conflict got = perform(past, uint32_t(begin), uint32_t(bytes));
    if (got.found != (want >= 0)) return DIFFERS;
    if (want < 0) return GO_ON;
    return got.address == base_ + uint64_t(want) ? SAME_CONFLICT : DIFFERS;
  }

  Conflict perform(const Past& p, uint32_t begin, uint32_t bytes) {
    const View& view = views_[p.agent];
    uint32_t cluster = uint32_t(p.cluster);
    if (clusters_ == 1) {
      auto method = p.operation == READ    ? &Shadow::read
                    : p.operation == WRITE ? &Shadow::write
                                           : &Shadow::atomic;
      return (shadow_.*method)(begin, bytes, p.access, view, p.warp_epoch);
    }
    auto method = p.operation == READ    ? &GlobalOrder::read
                  : p.operation == WRITE ? &GlobalOrder::write
                                         : &GlobalOrder::atomic;
    return (global_.*method)(base_ + begin, bytes, cluster, p.access, view);
  }

  // The view covers the agent's accesses until now; later ones have a larger clock.
  void tick(int id) {
    View& view = views_[id];
    view.generic.resize(std::max<size_t>(view.generic.size(), id % 4 + 1), 0);
    view.async.resize(std::max<size_t>(view.async.size(), id % 4 + 1), 0);
    Clock now = agents_[id / 4].now(id % 4);
    view.generic[id % 4] = full_[id].generic[id] = now;
    if (id % 4 >= 2) view.async[id % 4] = full_[id].async[id] = now;
    agents_[id / 4].tick(id % 4);
  }

  void synchronize(int id) {
    int cluster = id / 4, barrier = 2 * cluster + draw(2), flag = draw(2);
    uint64_t address = COUNTER + 4 * uint64_t(flag);
    int kinds = clusters_ == 1 ? 4 : 7;
    switch (draw(kinds)) {
      case 0:
        tick(id);
        barrier_views_[barrier].join(views_[id]);
        barrier_full_[barrier].join(full_[id]);
        break;
      case 1:
        views_[id].join(barrier_views_[barrier]);
        full_[id].join(barrier_full_[barrier]);
        epochs_[id]++;
        break;
      case 2:
        views_[id].fence_proxy();
        Full::larger(full_[id].async, full_[id].generic);
        break;
      case 3:
        epochs_[id]++;
        break;
      case 4:
        tick(id);
        global_.release(address, uint32_t(cluster), views_[id]);
        flag_full_[flag].join(full_[id]);
        break;
      case 5:
        global_.acquire(address, uint32_t(cluster), views_[id]);
        full_[id].join(flag_full_[flag]);
        break;
      case 6:
        if (draw(8) != 0) break;
        global_.store_relaxed(address);
        flag_full_[flag] = Full(4 * clusters_);
        break;
    }
  }

  std::mt19937& random_;
  int clusters_;
  uint64_t base_;
  int sync_percent_ = 50;
  Shadow shadow_;
  GlobalOrder global_;
  std::vector<View> views_;
  std::vector<Full> full_;
  std::vector<Clock> epochs_;
  std::vector<Agents> agents_;
  std::vector<View> barrier_views_;
  std::vector<Full> barrier_full_;
  std::vector<Full> flag_full_;
  Model model_;
};

void test_random(const char* name, uint32_t seed, int clusters, bool communicates, int programs) {
  Counts counts;
  for (int i = 0; i < programs; i++) {
    std::mt19937 random(seed + uint32_t(i));
    if (Program(random, clusters, communicates).run(counts)) continue;
    failures++;
    printf("failed: %s differs from the model, seed %u\n", name, seed + uint32_t(i));
    return;
  }
  printf("%s: %ld accesses, %ld conflicts\n", name, counts.accesses, counts.conflicts);
  expect(counts.conflicts * 10 > programs && counts.accesses > 5 * counts.conflicts,
         "programs have conflicts and ordered accesses");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    uint32_t seed = uint32_t(strtoul(argv[2], nullptr, 10));
    test_random("shared memory", seed, 1, false, 40000);
    test_random("global memory", seed, 3, true, 15000);
    test_random("clusters without communication", seed, 2, false, 10000);
    return failures != 0;
  }
  test_agents_race();
  test_all_readers_are_remembered();
  test_proxies();
  test_lanes();
  test_bytes();
  test_initialization();
  test_clusters();
  test_publication();
  test_foreign_views();
  return failures != 0;
}
