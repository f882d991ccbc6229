// Instructions in which the lanes of a warp exchange registers.
//
// Every lane that executes one names the lanes that execute it with it. The machine executes the
// lanes of one path together, so each live lane of the member mask must be among them.
// Source: PTX ISA 9.0, sections 9.7.9.6 (shfl.sync) and 9.7.13 (vote, match, redux, elect).
#include <cstdio>

#include "floats.h"
#include "lanes.h"

namespace deepkern::ptx {
namespace {

std::string hex(uint32_t bits) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", bits);
  return text;
}

std::string name_of(const Warp& warp, const Instruction& instruction) {
  const std::vector<std::string>& words = warp.kernel->statements[instruction.statement].opcode;
  return words.size() > 1 ? words[0] + "." + words[1] : words[0];
}

// Checks a member mask and returns the lanes of `mask` that give it.
uint32_t check_group(Warp& warp, const Instruction& instruction, uint32_t mask, uint32_t members,
                     const uint32_t* given, int first) {
  const uint32_t absent = members & warp.live & ~mask;
  if (absent) {
    warp.fail(instruction, first,
              name_of(warp, instruction) + ": lanes " + hex(absent) + " of the member mask " +
                  hex(members) + " do not execute it");
  }
  if (!(members >> first & 1)) {
    warp.fail(instruction, first,
              name_of(warp, instruction) + ": the lane is not in its member mask " + hex(members));
  }
  const uint32_t group = members & mask;
  for (uint32_t rest = group; rest; rest &= rest - 1) {
    const int lane = first_lane(rest);
    if (given[lane] == members) continue;
    warp.fail(instruction, lane,
              name_of(warp, instruction) + ": the lane gives the member mask " + hex(given[lane]) +
                  ", lane " + std::to_string(first) + " gives " + hex(members));
  }
  return group;
}

// Calls f(group) for each set of lanes that give one member mask, in register `slot`.
template <class F>
void for_each_group(Warp& warp, const Instruction& instruction, int slot, uint32_t mask, F f) {
  uint32_t given[LANES];  // a copy: the destination may be the same register
  std::memcpy(given, warp.u32(slot), sizeof(given));
  uint32_t rest = mask;
  while (rest) {
    const int first = first_lane(rest);
    const uint32_t group = check_group(warp, instruction, mask, given[first], given, first);
    f(group);
    rest &= ~group;
  }
}

// ---- shfl.sync d|p, a, b, c, membermask; e holds the member mask, list[0] the predicate

enum ShuffleMode : uint32_t { UP, DOWN, BFLY, IDX };

template <ShuffleMode M>
int shuffle_source(int lane, uint32_t b, uint32_t c, bool& valid) {
  const int value = b & 31;
  const int clamp = c & 31;
  const int segment = c >> 8 & 31;
  const int last = (lane & segment) | (clamp & ~segment);
  const int first = lane & segment;
  int source = 0;
  switch (M) {
    case UP:
      source = lane - value;
      break;
    case DOWN:
      source = lane + value;
      break;
    case BFLY:
      source = lane ^ value;
      break;
    case IDX:
      source = first | (value & ~segment);
      break;
  }
  valid = M == UP ? source >= last : source <= last;
  return valid ? source : lane;
}

bool all_equal(const uint32_t* lanes) {
  uint32_t difference = 0;
  for (int lane = 1; lane < LANES; ++lane) difference |= lanes[lane] ^ lanes[0];
  return difference == 0;
}

// All lanes execute it with one xor mask, which is how a warp reduces: no lane can be absent.
bool shuffle_full_butterfly(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t* b = warp.u32(instruction.b);
  const uint32_t* c = warp.u32(instruction.c);
  const uint32_t* members = warp.u32(instruction.e);
  if (mask != ALL_LANES || members[0] != ALL_LANES || (c[0] & 0x1f1f) != 0x1f) return false;
  if (!all_equal(b) || !all_equal(c) || !all_equal(members)) return false;
  uint32_t source[LANES];
  std::memcpy(source, warp.u32(instruction.a), sizeof(source));
  const int distance = b[0] & 31;
  if (instruction.d >= 0) {
    uint32_t* d = warp.u32(instruction.d);
    for (int lane = 0; lane < LANES; ++lane) d[lane] = source[lane ^ distance];
  }
  if (!instruction.list.empty()) set_predicate(warp, instruction.list[0], mask, ALL_LANES);
  return true;
}

template <ShuffleMode M>
Status shuffle(Warp& warp, const Instruction& instruction, uint32_t mask) {
  if (M == BFLY && shuffle_full_butterfly(warp, instruction, mask)) return Status::NEXT;
  const uint32_t* a = warp.u32(instruction.a);
  const uint32_t* b = warp.u32(instruction.b);
  const uint32_t* c = warp.u32(instruction.c);
  uint32_t result[LANES] = {};
  uint32_t in_range = 0;
  for_each_group(warp, instruction, instruction.e, mask, [&](uint32_t group) {
    for (uint32_t rest = group; rest; rest &= rest - 1) {
      const int lane = first_lane(rest);
      bool valid;
      const int source = shuffle_source<M>(lane, b[lane], c[lane], valid);
      if (!(group >> source & 1)) {
        warp.fail(instruction, lane,
                  name_of(warp, instruction) + ": the lane reads lane " + std::to_string(source) +
                      ", which does not execute it");
      }
      result[lane] = a[source];
      in_range |= uint32_t(valid) << lane;
    }
  });
  if (instruction.d >= 0) blend(warp.u32(instruction.d), result, mask);
  if (!instruction.list.empty()) set_predicate(warp, instruction.list[0], mask, in_range);
  return Status::NEXT;
}

// ---- vote.sync d, {!}a, membermask; match.sync d|p, a, membermask; elect.sync d|p, membermask

enum Vote { BALLOT, ANY, ALL, UNIFORM };

template <Vote V>
Status vote(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const uint32_t votes = predicate_of(warp, instruction.a, instruction.mode & INVERT);
  uint32_t result[LANES] = {};
  uint32_t holds = 0;
  for_each_group(warp, instruction, instruction.b, mask, [&](uint32_t group) {
    const uint32_t yes = votes & group;
    const bool uniform = yes == 0 || yes == group;
    if (V == ANY ? yes != 0 : V == ALL ? yes == group : uniform) holds |= group;
    for (int lane = 0; lane < LANES; ++lane) {
      if (group >> lane & 1) result[lane] = yes;
    }
  });
  if (V == BALLOT) {
    blend(warp.u32(instruction.d), result, mask);
  } else {
    set_predicate(warp, instruction.d, mask, holds);
  }
  return Status::NEXT;
}

template <class L, bool ALL_EQUAL>
Status match(Warp& warp, const Instruction& instruction, uint32_t mask) {
  const L* a = lanes_of<L>(warp, instruction.a);
  uint32_t result[LANES] = {};
  uint32_t equal_groups = 0;
  for_each_group(warp, instruction, instruction.b, mask, [&](uint32_t group) {
    for (int lane = 0; lane < LANES; ++lane) {
      if (!(group >> lane & 1)) continue;
      uint32_t equal = 0;
      for (int other = 0; other < LANES; ++other) {
        equal |= uint32_t(a[other] == a[lane]) << other;
      }
      equal &= group;
      if (ALL_EQUAL && equal != group) equal = 0;
      if (equal == group) equal_groups |= 1u << lane;
      result[lane] = equal;
    }
  });
  if (instruction.d >= 0) blend(warp.u32(instruction.d), result, mask);
  if (!instruction.list.empty()) set_predicate(warp, instruction.list[0], mask, equal_groups);
  return Status::NEXT;
}

Status elect(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint32_t result[LANES] = {};
  uint32_t leaders = 0;
  for_each_group(warp, instruction, instruction.a, mask, [&](uint32_t group) {
    leaders |= 1u << first_lane(group);
    for (int lane = 0; lane < LANES; ++lane) {
      if (group >> lane & 1) result[lane] = first_lane(group);
    }
  });
  if (instruction.d >= 0) blend(warp.u32(instruction.d), result, mask);
  if (!instruction.list.empty()) set_predicate(warp, instruction.list[0], mask, leaders);
  return Status::NEXT;
}

Status activemask(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint32_t result[LANES];
  for (uint32_t& lane : result) lane = mask;
  blend(warp.u32(instruction.d), result, mask);
  return Status::NEXT;
}

// ---- redux.sync d, a, membermask

template <class T>
T reduce_add(T a, T b) {
  return static_cast<T>(uint32_t(a) + uint32_t(b));
}
template <class T>
T reduce_min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T reduce_max(T a, T b) {
  return a > b ? a : b;
}
uint32_t reduce_and(uint32_t a, uint32_t b) { return a & b; }
uint32_t reduce_or(uint32_t a, uint32_t b) { return a | b; }
uint32_t reduce_xor(uint32_t a, uint32_t b) { return a ^ b; }

template <bool MAX, bool NAN_WINS>
float reduce_float(float a, float b) {
  return extremum<MAX, NAN_WINS>(a, b);
}

template <class T, T (*F)(T, T), bool ABSOLUTE>
Status reduce(Warp& warp, const Instruction& instruction, uint32_t mask) {
  uint32_t a[LANES];
  std::memcpy(a, warp.u32(instruction.a), sizeof(a));
  if (ABSOLUTE) {
    for (uint32_t& lane : a) lane &= 0x7fffffffu;
  }
  uint32_t result[LANES] = {};
  for_each_group(warp, instruction, instruction.b, mask, [&](uint32_t group) {
    T total = from_lane<T>(a[first_lane(group)]);
    for (uint32_t rest = group & (group - 1); rest; rest &= rest - 1) {
      total = F(total, from_lane<T>(a[first_lane(rest)]));
    }
    if constexpr (std::is_same_v<T, float>) total = canonical(total);
    for (int lane = 0; lane < LANES; ++lane) {
      if (group >> lane & 1) result[lane] = to_lane<T>(total);
    }
  });
  blend(warp.u32(instruction.d), result, mask);
  return Status::NEXT;
}

using Handlers = std::unordered_map<std::string, Handler>;

template <bool MAX, bool NAN_WINS>
void add_float_reductions(Handlers& table, const std::string& name, const std::string& nan) {
  constexpr auto F = reduce_float<MAX, NAN_WINS>;
  table["redux.sync." + name + nan + ".f32"] = reduce<float, F, false>;
  table["redux.sync." + name + ".abs" + nan + ".f32"] = reduce<float, F, true>;
}

template <class T>
void add_reductions(Handlers& table, const std::string& type) {
  table["redux.sync.add" + type] = reduce<T, reduce_add<T>, false>;
  table["redux.sync.min" + type] = reduce<T, reduce_min<T>, false>;
  table["redux.sync.max" + type] = reduce<T, reduce_max<T>, false>;
}

const Handlers& handlers() {
  static const Handlers all = [] {
    Handlers table = {
        {"shfl.sync.up.b32", shuffle<UP>},
        {"shfl.sync.down.b32", shuffle<DOWN>},
        {"shfl.sync.bfly.b32", shuffle<BFLY>},
        {"shfl.sync.idx.b32", shuffle<IDX>},
        {"vote.sync.ballot.b32", vote<BALLOT>},
        {"vote.sync.any.pred", vote<ANY>},
        {"vote.sync.all.pred", vote<ALL>},
        {"vote.sync.uni.pred", vote<UNIFORM>},
        {"match.any.sync.b32", match<uint32_t, false>},
        {"match.any.sync.b64", match<uint64_t, false>},
        {"match.all.sync.b32", match<uint32_t, true>},
        {"match.all.sync.b64", match<uint64_t, true>},
        {"elect.sync", elect},
        {"activemask.b32", activemask},
        {"redux.sync.and.b32", reduce<uint32_t, reduce_and, false>},
        {"redux.sync.or.b32", reduce<uint32_t, reduce_or, false>},
        {"redux.sync.xor.b32", reduce<uint32_t, reduce_xor, false>},
    };
    add_reductions<uint32_t>(table, ".u32");
    add_reductions<int32_t>(table, ".s32");
    add_float_reductions<false, false>(table, "min", "");
    add_float_reductions<false, true>(table, "min", ".NaN");
    add_float_reductions<true, false>(table, "max", "");
    add_float_reductions<true, true>(table, "max", ".NaN");
    return table;
  }();
  return all;
}

// `d` or `d|p`; the predicate goes to list[0].
void bind_pair(Binder& binder) {
  const OperandText& operand = binder.statement.operands.at(0);
  const bool pair = operand.kind == OperandText::PAIR;
  binder.instruction.d = binder.destination(pair ? operand.parts.at(0) : operand, 32);
  if (pair) binder.instruction.list = {binder.predicate(operand.parts.at(1))};
}

void bind_sources(Binder& binder, const std::string& name) {
  Instruction& instruction = binder.instruction;
  const std::string& last = binder.statement.opcode.back();
  if (name == "shfl") {
    bind_pair(binder);
    instruction.a = binder.source(1, 32);
    instruction.b = binder.source(2, 32);
    instruction.c = binder.source(3, 32);
    instruction.e = binder.source(4, 32);
  } else if (name == "vote") {
    instruction.d = last == "pred" ? binder.predicate(0) : binder.destination(0, 32);
    instruction.a = bind_predicate_source(binder, 1, true);
    instruction.b = binder.source(2, 32);
  } else if (name == "elect") {
    bind_pair(binder);
    instruction.a = binder.source(1, 32);
  } else if (name == "match") {
    bind_pair(binder);
    instruction.a = binder.source(1, last == "b64" ? 64 : 32);
    instruction.b = binder.source(2, 32);
  } else {
    instruction.d = binder.destination(0, 32);
    if (name == "activemask") return;
    instruction.a = binder.source(1, 32);
    instruction.b = binder.source(2, 32);
  }
}

size_t operand_count(const std::string& name) {
  return name == "activemask" ? 1 : name == "elect" ? 2 : name == "shfl" ? 5 : 3;
}

}  // namespace

bool bind_warp(Binder& binder) {
  const std::string& name = binder.statement.opcode.at(0);
  if (name != "shfl" && name != "vote" && name != "match" && name != "elect" &&
      name != "activemask" && name != "redux") {
    return false;
  }
  const auto handler = handlers().find(binder.statement.text());
  if (handler == handlers().end()) {
    binder.fail("this combination of modifiers is unknown (the forms without .sync are obsolete)");
  }
  if (binder.count() != operand_count(name)) binder.fail("it has a wrong number of operands");
  bind_sources(binder, name);
  const bool optional = name == "shfl" || name == "elect" || name == "match";
  if (binder.instruction.d < 0 && !optional) binder.fail("its destination is not a register");
  binder.instruction.run = handler->second;
  binder.instruction.kind = Class::SHUFFLE;
  return true;
}

}  // namespace deepkern::ptx
