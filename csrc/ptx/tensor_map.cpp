// tensormap.replace, tensormap.cp_fenceproxy and fence.proxy.tensormap: maps made by a kernel.
//
// A kernel fills 128 bytes of shared memory field by field, copies them to global memory with a
// release, and acquires them before a copy uses the map. The fields are as this machine's
// cuTensorMapEncodeTiled writes them, and the copy checks what that function would refuse.
// Source: PTX ISA 9.0, sections 9.7.9.26 (tensormap.replace) and 9.7.13.16 (cp_fenceproxy).
#include "tensor_map.h"

#include "machine.h"

namespace deepkern::ptx {
namespace {

enum Field { ADDRESS, RANK, BOX, SIZE, STRIDE, STEP, TYPE, INTERLEAVE, SWIZZLE, FILL };

struct FieldName {
  const char* name;
  Field field;
  bool indexed;  // an operand tells the dimension
};
constexpr FieldName FIELDS[] = {{"global_address", ADDRESS, false},
                                {"rank", RANK, false},
                                {"box_dim", BOX, true},
                                {"global_dim", SIZE, true},
                                {"global_stride", STRIDE, true},
                                {"element_stride", STEP, true},
                                {"elemtype", TYPE, false},
                                {"interleave_layout", INTERLEAVE, false},
                                {"swizzle_mode", SWIZZLE, false},
                                {"fill_mode", FILL, false}};

// By the number of .elemtype: the number in CUtensorMapDataType, and the bytes of an element.
constexpr uint8_t DATA_TYPE[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};
constexpr uint8_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};

// An operand of a field as one of 32 bits, checked against the greatest value.
uint32_t at_most(Warp& warp, const Instruction& i, int lane, uint64_t value, uint64_t most) {
  if (value > most)
    warp.fail(i, lane,
              "writes " + std::to_string(value) + " to a field of a tensor map, at most " +
                  std::to_string(most) + " is possible");
  return static_cast<uint32_t>(value);
}

void set_field(Warp& warp, const Instruction& i, int lane, TensorMap& map, uint64_t value) {
  int at = static_cast<int>(i.mode >> 16);
  auto limited = [&](uint64_t most) { return at_most(warp, i, lane, value, most); };
  switch (static_cast<Field>(i.second_immediate)) {
    case ADDRESS:
      map.address = value;
      break;
    case RANK:
      map.rank = static_cast<uint8_t>(limited(4) + 1);
      break;
    case BOX:
      map.box[at] = static_cast<uint16_t>(limited(256));
      break;
    case SIZE:
      map.size_minus_1[at] = static_cast<uint32_t>(value) - 1;
      break;
    case STRIDE:
      map.stride[at] = value;
      break;
    case STEP:
      map.element_stride[at] = static_cast<uint8_t>(limited(8));
      break;
    case TYPE:
      map.type = DATA_TYPE[limited(std::size(DATA_TYPE) - 1)];
      map.element_bytes = ELEMENT_BYTES[value];
      break;
    case INTERLEAVE:
      map.interleave = static_cast<uint8_t>(limited(2));
      break;
    case SWIZZLE:
      map.swizzle = static_cast<uint8_t>(limited(3));
      break;
    case FILL:
      map.fill_nan = static_cast<uint8_t>(limited(1));
      break;
  }
}

// The bytes of a map, which are zeros before the first field is written.
TensorMap read_bytes(Warp& warp, const Instruction& i, int lane, const Target& target) {
  TensorMap map;
  std::memcpy(&map, target.data, sizeof(map));
  bool is_new = true;
  for (size_t k = 0; k < sizeof(map); k++) is_new = is_new && target.data[k] == 0;
  if (!is_new && map.magic != TensorMap::MAGIC)
    warp.fail(i, lane, "the bytes are neither a tensor map nor zeros");
  map.magic = TensorMap::MAGIC;
  return map;
}

uint64_t address_in(Warp& warp, const Instruction& i, int slot, int bits, int lane) {
  uint64_t base = bits == 64 ? warp.u64(slot)[lane] : warp.u32(slot)[lane];
  return base + static_cast<uint64_t>(slot == i.a ? i.immediate : 0);
}

// a: address, b: value, mode: bits of the address and of the value, and the dimension.
Status replace_field(Warp& warp, const Instruction& i, uint32_t mask) {
  int address_bits = i.mode & 0xff, value_bits = i.mode >> 8 & 0xff;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = first_lane(rest);
    uint64_t address = address_in(warp, i, i.a, address_bits, lane);
    Target target = translate_shared(warp, i, lane, static_cast<uint32_t>(address),
                                     sizeof(TensorMap), "writes a tensor map to");
    touch_shared(warp, i, lane, *target.block, target.offset, sizeof(TensorMap), Touch::READ);
    touch_shared(warp, i, lane, *target.block, target.offset, sizeof(TensorMap), Touch::WRITE);
    TensorMap map = read_bytes(warp, i, lane, target);
    set_field(warp, i, lane, map, value_bits == 64 ? warp.u64(i.b)[lane] : warp.u32(i.b)[lane]);
    std::memcpy(target.data, &map, sizeof(map));
  }
  return Status::NEXT;
}

// What cuTensorMapEncodeTiled refuses.
void check_map_is_valid(Warp& warp, const Instruction& i, const TensorMap& map) {
  auto require = [&](bool holds, const char* rule) {
    if (!holds) warp.fail(i, -1, std::string("an invalid tensor map: ") + rule);
  };
  require(map.magic == TensorMap::MAGIC && map.rank > 0, "its rank was not written");
  require(map.address && map.address % 16 == 0, "16 does not divide its address");
  for (int d = 0; d < map.rank; d++) {
    require(map.box[d] > 0, "a dimension of its box is 0");
    require(map.element_stride[d] > 0, "an element stride is 0");
    require(d == 0 || map.stride[d - 1] % 16 == 0, "16 does not divide a stride");
  }
  uint32_t row = map.box[0] * map.element_bytes;
  require(row % 16 == 0, "16 does not divide the bytes of a row of its box");
  require(map.swizzle == 0 || row <= 16u << map.swizzle, "a row of its box exceeds the swizzle");
}

// a: global address, b: shared address, mode: bits of the shared address.
Status copy_map(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != ~0u) warp.fail(i, -1, "is not executed by the whole warp");
  uint64_t to = address_in(warp, i, i.a, 64, 0), from = address_in(warp, i, i.b, i.mode, 0);
  if (to % 128) warp.fail(i, -1, "copies a tensor map to an address that 128 does not divide");
  Target source = translate_shared(warp, i, 0, static_cast<uint32_t>(from) + i.second_immediate,
                                   sizeof(TensorMap), "reads a tensor map of");
  touch_shared(warp, i, -1, *source.block, source.offset, sizeof(TensorMap), Touch::READ);
  TensorMap map;
  std::memcpy(&map, source.data, sizeof(map));
  check_map_is_valid(warp, i, map);
  for (int d = map.rank; d < 5; d++) map.box[d] = map.element_stride[d] = 1;
  for (uint32_t at = 0; at < sizeof(map); at += 16) {
    Target target = translate(warp, i, 0, to + at, 16, Space::GLOBAL, "writes a tensor map to");
    touch_global(warp, i, -1, to + at, 16, Touch::WRITE);
    std::memcpy(target.data, reinterpret_cast<const uint8_t*>(&map) + at, 16);
  }
  warp.grid->order.release(to, warp.block->cluster->number, warp.publish());
  return Status::NEXT;
}

// a: global address.
Status acquire_map(Warp& warp, const Instruction& i, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    uint64_t address = address_in(warp, i, i.a, 64, first_lane(rest));
    warp.grid->order.acquire(address, warp.block->cluster->number, warp.view());
  }
  return Status::NEXT;
}

void bind_replace(Binder& b) {
  Instruction& i = b.instruction;
  const auto& op = b.statement.opcode;
  if (op.size() != 7 || op[2] != "tile" || op[4] != "shared::cta" || op[5] != "b1024")
    b.fail("unknown modifier");
  const FieldName* field = nullptr;
  for (const FieldName& known : FIELDS)
    if (op[3] == known.name) field = &known;
  if (!field) b.fail("unknown field ." + op[3]);
  int bits = op[6] == "b64" ? 64 : 32;
  if (bits != (field->field == ADDRESS || field->field == STRIDE ? 64 : 32))
    b.fail("unknown modifier ." + op[6]);
  if (b.count() != (field->indexed ? 3u : 2u)) b.fail("wrong number of operands");
  int address_bits = b.width(0) == 32 ? 32 : 64;
  i.a = b.address(0, address_bits, i.immediate);
  i.b = b.source(field->indexed ? 2 : 1, bits);
  int64_t dimension = field->indexed ? b.immediate(1) : 0;
  if (dimension < 0 || dimension > (field->field == STRIDE ? 3 : 4)) b.fail("no such dimension");
  i.second_immediate = field->field;
  i.mode = static_cast<uint32_t>(address_bits | bits << 8 | dimension << 16);
  i.run = replace_field;
}

}  // namespace

bool bind_tensor_map(Binder& b) {
  Instruction& i = b.instruction;
  const std::string text = b.statement.text();
  i.kind = Class::OTHER;
  if (text.rfind("tensormap.replace.", 0) == 0) {
    bind_replace(b);
  } else if (text ==
             "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu."
             "sync.aligned") {
    if (b.immediate(2) != 128) b.fail("its size is not 128");
    i.mode = b.width(1) == 32 ? 32 : 64;
    i.a = b.address(0, 64, i.immediate);
    i.b = b.address(1, static_cast<int>(i.mode), i.second_immediate);
    i.run = copy_map;
  } else if (text == "fence.proxy.tensormap::generic.acquire.gpu") {
    if (b.immediate(1) != 128) b.fail("its size is not 128");
    i.a = b.address(0, 64, i.immediate);
    i.run = acquire_map;
  } else {
    b.fail("unknown modifier");
  }
  if (i.run != replace_field) b.kernel().communicates = true;
  return true;
}

}  // namespace deepkern::ptx
