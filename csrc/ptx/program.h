// A PTX module in the form that the machine executes.
//
// read_module parses the text once into statements. bind_kernel turns each statement into an
// Instruction: a handler and the register slots of its operands. Immediates, special registers and
// addresses of symbols become slots as well, so that a handler reads only slots.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace deepkern::ptx {

constexpr int LANES = 32;

// The PTX text has something that the machine does not know or that is not valid PTX.
struct InvalidProgram : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One operand as written.
struct OperandText {
  enum Kind { REGISTER, IMMEDIATE, SYMBOL, ADDRESS, LIST, PAIR, SINK };
  Kind kind = SINK;
  std::string name;      // register (%r1, %tid.x), symbol or label; base of an address
  bool negated = false;  // !%p1
  uint64_t bits = 0;     // the immediate; its offset for an address
  int float_bits = 0;    // 32 for 0f..., 64 for 0d..., 0 for an integer
  // {a, b}; a|b; for an address, the coordinates after the comma of [base, {x, y}]
  std::vector<OperandText> parts;
};

// One instruction as written: `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`
struct Statement {
  std::string guard;  // %p1, or empty
  bool guard_negated = false;
  std::vector<std::string> opcode;  // {"ld", "global", "v2", "b32"}
  std::vector<OperandText> operands;
  int line = 0;       // 1-based, in the PTX text
  int location = -1;  // index in Kernel::locations, -1 before the first .loc

  std::string text() const;  // the opcode with its dots
  bool has(const char* modifier) const;
};

// A place in the source: a .loc with the calls it was inlined at, innermost first.
struct Location {
  std::string text;  // "fp8_gemm_nt.py:150 (called at moe.py:20)"
  std::string file;
  int line = 0;
};

struct Parameter {
  std::string name;
  int bytes = 0;
  int align = 1;
  int offset = 0;  // in the parameter space
};

// A .shared, .global or .const variable.
struct Variable {
  std::string name;
  std::string space;  // "shared", "global", "const", "local"
  int64_t bytes = 0;  // 0 for the dynamic shared memory
  int align = 1;
  int64_t offset = 0;  // in the static shared memory, or in the block's local memory of a thread
  std::vector<uint8_t> content;  // of .global and .const variables
};

struct Warp;
struct Instruction;

// NEXT: go on with the next instruction. JUMPED: the handler has set the program counter.
// BLOCKED: the warp waits and executes the same instruction again when it is woken.
enum class Status { NEXT, JUMPED, BLOCKED };
using Handler = Status (*)(Warp&, const Instruction&, uint32_t mask);

// What an instruction costs the hardware; the profile counts by class.
enum class Class : uint8_t {
  INTEGER,
  FLOAT,
  HALF,
  SPECIAL,
  CONVERT,
  MOVE,
  PREDICATE,
  SHUFFLE,
  BRANCH,
  GLOBAL,
  SHARED,
  MATRIX_MOVE,
  ATOMIC,
  ASYNC_COPY,
  TENSOR_CORE,
  BARRIER,
  OTHER,
  COUNT
};

struct Instruction {
  Handler run = nullptr;
  int32_t d = -1, a = -1, b = -1, c = -1, e = -1;  // slots: destination, then sources
  std::vector<int32_t> list;     // slots of a vector operand, or more destinations
  std::vector<int32_t> more;     // slots of a second vector operand
  int64_t immediate = 0;         // address offset, barrier number, ...
  int64_t second_immediate = 0;  // offset of a second address
  uint32_t mode = 0;             // a handler's own: rounding, comparison, cache operator
  int32_t guard = -1;            // predicate slot
  bool guard_negated = false;
  int32_t target = -1;      // of a branch: instruction index
  int32_t reconverge = -1;  // of a branch: where its lanes meet again; -1: at the exit
  Class kind = Class::OTHER;
  std::vector<int32_t> reads, writes;  // slots of registers, without constants and predicates
  int32_t statement = -1;              // index in Kernel::statements
  std::shared_ptr<void> extra;         // a handler's own description, for example of an MMA
};

// A slot that holds the same bits in every lane from the start of a warp.
struct Constant {
  int slot;
  int bits;  // 32 or 64
  uint64_t value;
};

// A special register that some instruction reads: %tid.x and others.
struct SpecialUse {
  std::string name;
  int slot;
  int bits;
};

struct Kernel {
  std::string name;
  int target = 0;  // 90 for sm_90a
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int required_threads[3] = {0, 0, 0};  // .reqntid, 0 where it is absent
  int max_threads = 0;                  // .maxntid
  int cluster[3] = {0, 0, 0};           // .reqnctapercluster
  int max_registers = 0;
  int static_shared_bytes = 0;
  int dynamic_shared_offset = 0;  // where the .extern .shared array starts
  int local_bytes = 0;            // for each thread
  std::vector<Statement> statements;
  std::vector<Location> locations;
  std::map<std::string, int> labels;          // -> index of the statement that follows
  std::map<std::string, Variable> variables;  // of the module and of the kernel

  // Filled by bind_kernel.
  std::vector<Instruction> instructions;
  std::vector<Constant> constants;
  std::vector<SpecialUse> specials;
  int slots = 0;  // a slot is 32 lanes of 4 bytes; a 64-bit register takes two
  int predicates = 0;
  bool has_wgmma = false;
  bool communicates = false;  // has global atomics, acquire, release or volatile accesses
  std::map<std::string, int> registers;  // name -> slot, or index of a predicate
  std::map<std::string, int> widths;     // name -> bits; 1 for a predicate
};

struct Module {
  std::map<std::string, std::shared_ptr<Kernel>> kernels;
  std::map<std::string, std::vector<uint8_t>> globals;  // storage of .global and .const variables
  std::string text;
};

// Resolves the operands of one statement while it is bound.
class Binder {
 public:
  Binder(Kernel& kernel, Module& module, const Statement& statement, Instruction& instruction);

  const Statement& statement;
  Instruction& instruction;

  size_t count() const { return statement.operands.size(); }
  bool has(const char* modifier) const { return statement.has(modifier); }

  // The slot of operand `i`. `bits` is the width that the instruction reads or writes: 8, 16 and 32
  // take a slot of 32-bit lanes, 64 one of 64-bit lanes. A register may be wider than `bits` where
  // PTX allows that (ld, st, cvt). A source may be an immediate, a special register or a symbol.
  int source(size_t i, int bits) { return source(statement.operands.at(i), bits); }
  int source(const OperandText& operand, int bits);
  int destination(size_t i, int bits) { return destination(statement.operands.at(i), bits); }
  int destination(const OperandText& operand, int bits);  // -1 for `_`
  int predicate(size_t i) { return predicate(statement.operands.at(i)); }
  // A predicate of -1 (true), 0 and !%p are constants or an InvalidProgram; -1 for `_`.
  int predicate(const OperandText& operand);
  // [base+offset]: the slot of the base (64-bit lanes if `bits` is 64) and the offset.
  int address(size_t i, int bits, int64_t& offset);
  // {a, b, c}, or a single operand as a list of one.
  std::vector<int> sources(size_t i, int bits);
  std::vector<int> destinations(size_t i, int bits);
  // The value of an integer immediate.
  int64_t immediate(size_t i) const;
  // Declared width of a register operand; 0 for any other operand.
  int width(size_t i) const { return width(statement.operands.at(i)); }
  int width(const OperandText& operand) const;
  int target() const { return kernel_.target; }
  Kernel& kernel() { return kernel_; }
  Module& module() { return module_; }

  [[noreturn]] void fail(const std::string& message) const;  // InvalidProgram with the statement

 private:
  int constant(uint64_t value, int bits);
  Kernel& kernel_;
  Module& module_;
};

// Each sets instruction.run, its slots and its class, and returns true, if it knows the opcode
// (the first word of statement.opcode). A known opcode with an unknown modifier fails.
bool bind_arithmetic(Binder&);  // arithmetic.cpp: add ... xor, setp, selp, mov, ex2, prmt, ...
bool bind_convert(Binder&);     // convert.cpp: cvt, cvta
bool bind_warp(Binder&);        // warp.cpp: shfl, vote, redux, elect, match, activemask
bool bind_control(Binder&);     // control.cpp: bra, ret, exit, bar, barrier, nop-like instructions
bool bind_memory(Binder&);      // memory.cpp: ld, st, atom, red, fence, membar, prefetch
bool bind_async(Binder&);       // async.cpp: cp, mbarrier, fence.proxy, griddepcontrol
bool bind_matrix(Binder&);      // matrix.cpp: ldmatrix, stmatrix, mma, wgmma
bool bind_tcgen05(Binder&);     // tcgen05.cpp

std::shared_ptr<Module> read_module(const std::string& text);  // parser.cpp; throws InvalidProgram
void bind_kernel(Kernel& kernel, Module& module);              // bind.cpp; throws InvalidProgram

}  // namespace deepkern::ptx
