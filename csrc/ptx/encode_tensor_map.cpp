// cuTensorMapEncodeTiled: checks a tensor map by the rules of its documentation and encodes it.
//
// The formula that the documentation gives for strides describes a tensor with padded rows. It is
// no rule here: a tensor with permuted dimensions, or with rows that overlap, does not satisfy it.
// Source: CUDA driver API documentation, version 13.1, cuTensorMapEncodeTiled.
#include <cstring>

#include "driver.h"
#include "tensor_map.h"

using namespace deepkern::ptx;

namespace {

constexpr int MAX_RANK = 5;
constexpr int ELEMENT_BITS[] = {8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6};
constexpr int SWIZZLE_BYTES[] = {0, 32, 64, 128, 128, 128, 128};

struct Arguments {
  int type, rank;
  uint64_t address;
  const uint64_t* dim;
  const uint64_t* stride;
  const uint32_t* box;
  const uint32_t* element_stride;
  int interleave, swizzle, l2_promotion, fill;

  bool align_16b() const {
    return type == CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B ||
           type == CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B;
  }
  bool packed() const { return type >= CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B; }
  bool is_float() const {
    return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
  }
};

std::string number(const char* name, uint64_t value) {
  return std::string(name) + " " + std::to_string(value) + ": ";
}

std::string at(const char* name, int i, uint64_t value) {
  return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(value) + ": ";
}

std::string check_enums(const Arguments& a) {
  if (a.type < 0 || a.type > CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B) {
    return "tensorDataType " + std::to_string(a.type) + " is unknown";
  }
  if (a.interleave < 0 || a.interleave > 2) {
    return "interleave " + std::to_string(a.interleave) + " is unknown";
  }
  if (a.swizzle < 0 || a.swizzle > 6) {
    return "swizzle " + std::to_string(a.swizzle) + " is unknown";
  }
  if (a.l2_promotion < 0 || a.l2_promotion > 3) {
    return "l2Promotion " + std::to_string(a.l2_promotion) + " is unknown";
  }
  if (a.fill < 0 || a.fill > 1) return "oobFill " + std::to_string(a.fill) + " is unknown";
  if (a.fill == 1 && !a.is_float()) {
    return "oobFill NaN needs a floating-point tensorDataType, got " + std::to_string(a.type);
  }
  if (a.rank < 1 || a.rank > MAX_RANK) {
    return "tensorRank " + std::to_string(a.rank) + ": 1 to 5";
  }
  if (a.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE && a.rank < 3) {
    return "tensorRank " + std::to_string(a.rank) + ": at least 3 with an interleaved layout";
  }
  return "";
}

std::string check_modes(const Arguments& a) {
  bool is_6_bit = a.type == CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B;
  if (a.interleave == CU_TENSOR_MAP_INTERLEAVE_32B && a.swizzle != CU_TENSOR_MAP_SWIZZLE_32B) {
    return "interleave 32B needs swizzle 32B";
  }
  if (is_6_bit && a.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
    return "16U6_ALIGN16B needs interleave NONE";
  }
  bool plain = a.swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || a.swizzle == CU_TENSOR_MAP_SWIZZLE_128B ||
               a.swizzle == CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B;
  bool atom_64 = a.swizzle == CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B;
  if (a.align_16b() && !plain && !(is_6_bit && atom_64)) {
    return "swizzle " + std::to_string(a.swizzle) + " does not go with tensorDataType " +
           std::to_string(a.type);
  }
  return "";
}

std::string check_tensor(const Arguments& a) {
  bool wide = a.interleave == CU_TENSOR_MAP_INTERLEAVE_32B || a.align_16b();
  uint64_t alignment = wide ? 32 : 16;
  std::string multiple = "a multiple of " + std::to_string(alignment);
  if (a.address % alignment != 0) {
    return number("globalAddress", a.address) + multiple + " is required";
  }
  for (int i = 0; i < a.rank; ++i) {
    if (a.dim[i] == 0 || a.dim[i] > uint64_t(1) << 32) {
      return at("globalDim", i, a.dim[i]) + "1 to 2^32";
    }
  }
  if (a.align_16b() && a.dim[0] % 128 != 0) {
    return at("globalDim", 0, a.dim[0]) + "a multiple of 128 for this tensorDataType";
  }
  if (a.type == CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B && a.dim[0] % 2 != 0) {
    return at("globalDim", 0, a.dim[0]) + "a multiple of 2 for this tensorDataType";
  }
  for (int i = 0; i + 1 < a.rank; ++i) {
    if (a.stride[i] % alignment != 0) return at("globalStrides", i, a.stride[i]) + multiple;
    if (a.stride[i] >= uint64_t(1) << 40) {
      return at("globalStrides", i, a.stride[i]) + "less than 2^40";
    }
  }
  return "";
}

std::string check_box(const Arguments& a) {
  for (int i = 0; i < a.rank; ++i) {
    if (a.box[i] == 0 || a.box[i] > 256) return at("boxDim", i, a.box[i]) + "1 to 256";
    bool ignored = i == 0 && a.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
    if (!ignored && (a.element_stride[i] == 0 || a.element_stride[i] > 8)) {
      return at("elementStrides", i, a.element_stride[i]) + "1 to 8";
    }
  }
  if (a.align_16b() && a.box[0] != 128) {
    return at("boxDim", 0, a.box[0]) + "128 for this tensorDataType";
  }
  if (a.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return "";
  uint64_t bits = uint64_t(a.box[0]) * ELEMENT_BITS[a.type];
  if (bits % 128 != 0) {
    return at("boxDim", 0, a.box[0]) + "its " + std::to_string(bits / 8) +
           " bytes are no multiple of 16";
  }
  uint64_t limit = static_cast<uint64_t>(SWIZZLE_BYTES[a.swizzle]);
  // Shared memory holds 8 (or 12) bytes of packed elements in each 16, so a row of 128 has 128.
  if (limit != 0 && !a.align_16b() && bits / 8 > limit) {
    return at("boxDim", 0, a.box[0]) + "its " + std::to_string(bits / 8) +
           " bytes exceed the swizzle of " + std::to_string(limit);
  }
  return "";
}

std::string check(const Arguments& a) {
  for (auto rules : {check_enums, check_modes, check_tensor, check_box}) {
    std::string problem = rules(a);
    if (!problem.empty()) return problem;
  }
  return "";
}

TensorMap encode(const Arguments& a) {
  TensorMap map = {};
  map.magic = TensorMap::MAGIC;
  map.address = a.address;
  for (int i = 0; i < MAX_RANK; ++i) {
    bool used = i < a.rank;
    map.size_minus_1[i] = used ? static_cast<uint32_t>(a.dim[i] - 1) : 0;
    map.box[i] = static_cast<uint16_t>(used ? a.box[i] : 1);
    map.element_stride[i] = static_cast<uint8_t>(used ? a.element_stride[i] : 1);
    if (i + 1 < a.rank) map.stride[i] = a.stride[i];
  }
  if (a.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) map.element_stride[0] = 1;
  map.rank = static_cast<uint8_t>(a.rank);
  map.type = static_cast<uint8_t>(a.type);
  map.interleave = static_cast<uint8_t>(a.interleave);
  map.swizzle = static_cast<uint8_t>(a.swizzle);
  map.fill_nan = static_cast<uint8_t>(a.fill);
  map.element_bytes = static_cast<uint8_t>(ELEMENT_BITS[a.type] / 8);  // 0 for packed types
  return map;
}

}  // namespace

DEEPKERN_API CUresult cuTensorMapEncodeTiled(void* tensor_map, int type, uint32_t rank,
                                             void* address, const uint64_t* dim,
                                             const uint64_t* strides, const uint32_t* box,
                                             const uint32_t* element_strides, int interleave,
                                             int swizzle, int l2_promotion, int fill) {
  const char* api = "cuTensorMapEncodeTiled";
  int capability = Driver::get().device().capability;
  if (capability < 90) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, api,
                  "sm_" + std::to_string(capability) + " has no tensor maps, sm_90 and newer have");
  }
  Arguments arguments = {type,
                         rank <= MAX_RANK ? static_cast<int>(rank) : MAX_RANK + 1,
                         reinterpret_cast<uint64_t>(address),
                         dim,
                         strides,
                         box,
                         element_strides,
                         interleave,
                         swizzle,
                         l2_promotion,
                         fill};
  std::string problem = reinterpret_cast<uint64_t>(tensor_map) % 64 != 0
                            ? "tensorMap: an address that is a multiple of 64 is required"
                            : check(arguments);
  if (!problem.empty()) return refuse(CUDA_ERROR_INVALID_VALUE, api, problem);
  TensorMap map = encode(arguments);
  std::memcpy(tensor_map, &map, sizeof(map));
  return CUDA_SUCCESS;
}

DEEPKERN_API CUresult cuTensorMapEncodeIm2col(void*, int, uint32_t, void*, const uint64_t*,
                                              const uint64_t*, const int*, const int*, uint32_t,
                                              uint32_t, const uint32_t*, int, int, int, int) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "cuTensorMapEncodeIm2col",
                "this machine has tiled tensor maps, no im2col ones");
}
