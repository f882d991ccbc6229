// Layouts of tensor memory and the product of tcgen05.mma.
//
// How: with M = 128 row r of D is lane r. With M = 64 the rows 16 w to 16 w + 15 are lanes of warp
// w: its first 16, or its last 16 if the address has lane 16. An element of D is a cell; the K
// elements of a row of A are 8 cells.
//
// Source: PTX ISA 9.0, section 9.7.17.
#include "tcgen05_layout.h"

#include <cstring>
#include <string>
#include <vector>

#include "api.h"

namespace deepkern::ptx {
namespace {

constexpr int ROW_BYTES = 32;  // of K elements

[[noreturn]] void fail(const std::string& message) {
  throw OperandError("tcgen05.mma: " + message);
}

uint32_t bits(uint32_t word, int first, int count) { return word >> first & ((1u << count) - 1); }

Element element_of(uint32_t code, TensorKind kind, const char* operand) {
  switch (kind) {
    case TensorKind::F16:
      if (code < 2) return code ? Element::BF16 : Element::F16;
      break;
    case TensorKind::TF32:
      if (code == 2) return Element::TF32;
      break;
    case TensorKind::F8F6F4:
      if (code < 2) return code ? Element::E5M2 : Element::E4M3;
      if (code == 3) fail(std::string(operand) + ": elements of type e2m3 are not supported");
      if (code == 4) fail(std::string(operand) + ": elements of type e3m2 are not supported");
      if (code == 5) fail(std::string(operand) + ": elements of type e2m1 are not supported");
      break;
  }
  fail("instruction descriptor: " + std::string(operand) + ": type " + std::to_string(code) +
       " is not valid for this kind");
}

int lane_of_row(int M, int row) { return M == 128 ? row : row / 16 * 32 + row % 16; }

// Checks that rows x columns of an operand at `address` are in tensor memory.
void check_place(const char* what, int M, uint32_t address, int columns) {
  const int lane = lane_of(address), column = column_of(address);
  if (lane != 0 && (M == 128 || lane != 16)) {
    fail(std::string(what) + ": lane " + std::to_string(lane) + " of its address is not valid");
  }
  if (column + columns > TENSOR_COLUMNS) {
    fail(std::string(what) + ": columns " + std::to_string(column) + " to " +
         std::to_string(column + columns - 1) + " are outside the tensor memory");
  }
}

void touch(const TensorMemory& tensor, int M, uint32_t address, int columns, bool write) {
  if (!tensor.touch) return;
  const int lanes = M == 128 ? 128 : 16;
  for (int lane = 0; lane < TENSOR_LANES; lane += M == 128 ? 128 : 32) {
    tensor.touch(tensor.context, lane + lane_of(address), lanes, column_of(address), columns,
                 write);
  }
}

void check_instruction(const TensorInstruction& i) {
  const int step = i.M == 64 ? 8 : 16;
  if (i.M != 64 && i.M != 128) {
    fail("instruction descriptor: M: expected 64 or 128, got " + std::to_string(i.M));
  }
  if (i.N < step || i.N > 256 || i.N % step) {
    fail("instruction descriptor: N: expected a multiple of " + std::to_string(step) +
         " up to 256, got " + std::to_string(i.N));
  }
}

}  // namespace

int tensor_registers(TensorShape shape, int number) {
  return shape == TensorShape::T16x256b   ? 4 * number
         : shape == TensorShape::T16x128b ? 2 * number
                                          : number;
}

TensorCell tensor_cell(TensorShape shape, int lane, int reg, int half_offset) {
  switch (shape) {
    case TensorShape::T32x32b:
      return {lane, reg};
    case TensorShape::T16x32bx2:
      return {lane % 16, reg + lane / 16 * half_offset};
    case TensorShape::T16x64b:  // two columns for each register
      return {lane / 4 + lane % 2 * 8, 2 * reg + lane / 2 % 2};
    case TensorShape::T16x128b:  // four columns for each two registers
      return {lane / 4 + reg % 2 * 8, reg / 2 * 4 + lane % 4};
    default:  // T16x256b: eight columns for each four registers
      return {lane / 4 + reg / 2 % 2 * 8, reg / 4 * 8 + lane % 4 * 2 + reg % 2};
  }
}

TensorInstruction read_instruction_descriptor(uint32_t descriptor, TensorKind kind) {
  if (bits(descriptor, 2, 1)) fail("sparse matrices are not supported");
  if (bits(descriptor, 3, 1)) fail("saturation is not supported");
  if (bits(descriptor, 0, 2) || bits(descriptor, 6, 1) || bits(descriptor, 23, 1) ||
      bits(descriptor, 29, 1)) {
    fail("instruction descriptor: expected 0 in bits 0, 1, 6, 23 and 29");
  }
  if (bits(descriptor, 30, 2)) fail("instruction descriptor: a maximum shift needs .ws");
  const uint32_t d = bits(descriptor, 4, 2);
  if (d == 0 && kind != TensorKind::TF32) fail("f16 accumulators are not supported");
  if (d != 1) fail("instruction descriptor: D: type " + std::to_string(d) + " is not valid");
  TensorInstruction i{};
  i.a = element_of(bits(descriptor, 7, 3), kind, "A");
  i.b = element_of(bits(descriptor, 10, 3), kind, "B");
  i.negate_a = bits(descriptor, 13, 1);
  i.negate_b = bits(descriptor, 14, 1);
  i.a_mn_major = bits(descriptor, 15, 1);
  i.b_mn_major = bits(descriptor, 16, 1);
  i.N = static_cast<int>(bits(descriptor, 17, 6)) * 8;
  i.M = static_cast<int>(bits(descriptor, 24, 5)) * 16;
  i.K = ROW_BYTES / element_bytes(i.a);
  check_instruction(i);
  return i;
}

void tcgen05_mma(const TensorInstruction& instruction, uint32_t d, bool a_in_tensor_memory,
                 uint64_t a, uint64_t b, bool accumulate, const SharedReader& shared,
                 const TensorMemory& tensor, const Sums& sums) {
  const int M = instruction.M, N = instruction.N;
  uint8_t left[128 * ROW_BYTES], right[256 * ROW_BYTES];
  check_place("D", M, d, N);
  if (a_in_tensor_memory) {
    const auto address = static_cast<uint32_t>(a);
    // The ISA's figures of A in tensor memory leave open which lanes hold it with M = 64.
    if (M != 128) fail("A in tensor memory with M = 64 is not supported");
    if (instruction.a_mn_major) fail("A in tensor memory cannot be MN-major");
    check_place("A", M, address, ROW_BYTES / 4);
    touch(tensor, M, address, ROW_BYTES / 4, false);
    for (int m = 0; m < M; ++m) {
      std::memcpy(left + m * ROW_BYTES, tensor.row(m) + column_of(address), ROW_BYTES);
    }
  } else {
    read_operand(read_tcgen05_descriptor(a, "tcgen05.mma: A"), M, instruction.a,
                 instruction.a_mn_major, shared, "tcgen05.mma: A", left);
  }
  read_operand(read_tcgen05_descriptor(b, "tcgen05.mma: B"), N, instruction.b,
               instruction.b_mn_major, shared, "tcgen05.mma: B", right);
  if (instruction.negate_a) negate(instruction.a, left, M * ROW_BYTES);
  if (instruction.negate_b) negate(instruction.b, right, N * ROW_BYTES);
  std::vector<float> D(static_cast<size_t>(M) * N);
  const auto cells = [&](int m) {
    return tensor.row(lane_of_row(M, m) + lane_of(d)) + column_of(d);
  };
  if (accumulate) {
    touch(tensor, M, d, N, false);
    for (int m = 0; m < M; ++m) std::memcpy(&D[m * N], cells(m), N * 4);
  }
  multiply_add(M, N, instruction.K, instruction.a, instruction.b, left, right, D.data(), sums);
  touch(tensor, M, d, N, true);
  for (int m = 0; m < M; ++m) std::memcpy(cells(m), &D[m * N], N * 4);
}

void touch_tcgen05_mma(const TensorInstruction& instruction, uint32_t d, bool a_in_tensor_memory,
                       uint64_t a, uint64_t b, bool accumulate, const SharedReader& shared,
                       const TensorMemory& tensor) {
  const int M = instruction.M, N = instruction.N;
  uint8_t codes[256 * ROW_BYTES];
  check_place("D", M, d, N);
  if (a_in_tensor_memory) {
    const auto address = static_cast<uint32_t>(a);
    check_place("A", M, address, ROW_BYTES / 4);
    touch(tensor, M, address, ROW_BYTES / 4, false);
  } else {
    read_operand(read_tcgen05_descriptor(a, "tcgen05.mma: A"), M, instruction.a,
                 instruction.a_mn_major, shared, "tcgen05.mma: A", codes);
  }
  read_operand(read_tcgen05_descriptor(b, "tcgen05.mma: B"), N, instruction.b,
               instruction.b_mn_major, shared, "tcgen05.mma: B", codes);
  if (accumulate) touch(tensor, M, d, N, false);
  touch(tensor, M, d, N, true);
}

}  // namespace deepkern::ptx
