// Operands in shared memory: descriptors, canonical layouts and swizzles.
//
// How: the layouts move units of 16 bytes. A unit has consecutive k of one row in a K-major matrix,
// consecutive rows at one k in an MN-major one. The swizzle exchanges the units of a row of
// `row_bytes` by bits of the address: bit 4 (32 bytes), 4-5 (64) or 4-6 (128) ^= bits 7 and above.
//
// Source: PTX ISA 9.0, sections 9.7.16.5.1 and 9.7.17.4.1; the strides of the canonical layouts are
// tabulated in CUTLASS, mma_sm90_desc.hpp and mma_sm100_desc.hpp.
#include "matrix_descriptor.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"

namespace deepkern::ptx {
namespace {

constexpr uint32_t UNIT = 16, OPERAND_BYTES = 32;

[[noreturn]] void fail(const char* what, const std::string& message) {
  throw OperandError(std::string(what) + ": " + message);
}

MatrixDescriptor read_common(uint64_t descriptor, const char* what) {
  if (descriptor >> 49 & 7) fail(what, "a base offset other than 0 is not supported");
  MatrixDescriptor d{};
  d.start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  d.leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  d.stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  return d;
}

uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / UNIT - 1)) << 4;
}

// Unit `c` of 16 bytes of row `r`.
uint32_t k_major_unit(const MatrixDescriptor& d, uint32_t r, uint32_t c) {
  const uint32_t along_k = d.row_bytes == UNIT ? d.leading : UNIT;
  return swizzled(d.start + r % 8 * d.row_bytes + r / 8 * d.stride + c * along_k, d.row_bytes);
}

// Rows 16 / size * g and up at one k.
uint32_t mn_major_unit(const MatrixDescriptor& d, uint32_t g, uint32_t k) {
  if (d.row_bytes == UNIT) return d.start + g * d.stride + k % 8 * UNIT + k / 8 * d.leading;
  const uint32_t units = d.row_bytes / UNIT;
  return swizzled(
      d.start + g % units * UNIT + g / units * d.leading + k % 8 * d.row_bytes + k / 8 * d.stride,
      d.row_bytes);
}

// Calls touch once for each run of consecutive units.
void touch_ranges(std::vector<uint32_t>& units, const SharedReader& shared) {
  std::sort(units.begin(), units.end());
  for (size_t i = 0; i < units.size();) {
    const uint32_t begin = units[i];
    uint32_t end = begin;
    for (; i < units.size() && units[i] <= end; ++i) end = units[i] + UNIT;
    shared.touch(shared.context, begin, end - begin);
  }
}

}  // namespace

MatrixDescriptor read_wgmma_descriptor(uint64_t descriptor, const char* what) {
  MatrixDescriptor d = read_common(descriptor, what);
  constexpr uint32_t ROW_BYTES[] = {16, 128, 64, 32};
  d.row_bytes = ROW_BYTES[descriptor >> 62];
  return d;
}

MatrixDescriptor read_tcgen05_descriptor(uint64_t descriptor, const char* what) {
  MatrixDescriptor d = read_common(descriptor, what);
  if ((descriptor >> 46 & 7) != 1) fail(what, "descriptor: expected 1 in bits 46 to 48");
  if (descriptor >> 52 & 1) fail(what, "descriptor: an absolute leading address is not supported");
  if (descriptor >> 53 & 0xff) fail(what, "descriptor: expected 0 in bits 53 to 60");
  switch (descriptor >> 61) {
    case 0:
      d.row_bytes = 16;
      break;
    case 2:
      d.row_bytes = 128;
      break;
    case 4:
      d.row_bytes = 64;
      break;
    case 6:
      d.row_bytes = 32;
      break;
    case 1:
      fail(what, "descriptor: the 128-byte swizzle of 32-byte units is not supported");
    default:
      fail(what, "descriptor: swizzle mode " + std::to_string(descriptor >> 61) + " is not valid");
  }
  return d;
}

void read_operand(const MatrixDescriptor& descriptor, int rows, Element element, bool mn_major,
                  const SharedReader& shared, const char* what, uint8_t* codes) {
  const int size = element_bytes(element), K = OPERAND_BYTES / size;
  if (mn_major && size == 4) fail(what, "an MN-major operand of tf32 is not supported");
  const int group = mn_major ? UNIT / size : 1;  // rows of one unit
  if (rows % group) fail(what, "an MN-major operand needs a multiple of 16 bytes of rows");
  const int groups = rows / group, along_k = mn_major ? K : static_cast<int>(OPERAND_BYTES / UNIT);
  std::vector<uint32_t> units;
  units.reserve(static_cast<size_t>(groups) * along_k);
  for (int g = 0; g < groups; ++g) {
    for (int k = 0; k < along_k; ++k) {
      const uint32_t address =
          mn_major ? mn_major_unit(descriptor, g, k) : k_major_unit(descriptor, g, k);
      if (address + UNIT > shared.size) {
        fail(what, "reads shared memory at " + std::to_string(address) + ", outside its " +
                       std::to_string(shared.size) + " bytes");
      }
      units.push_back(address);
      const uint8_t* unit = shared.bytes + address;
      if (!mn_major) {
        std::memcpy(codes + g * OPERAND_BYTES + k * UNIT, unit, UNIT);
        continue;
      }
      for (int r = 0; r < group; ++r) {
        std::memcpy(codes + (g * group + r) * OPERAND_BYTES + k * size, unit + r * size, size);
      }
    }
  }
  if (shared.touch) touch_ranges(units, shared);
}

void negate(Element element, uint8_t* codes, int bytes) {
  const int size = element_bytes(element);
  for (int i = size - 1; i < bytes; i += size) codes[i] ^= 0x80;
}

}  // namespace deepkern::ptx
