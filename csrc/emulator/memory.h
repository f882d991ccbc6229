// Global memory of the emulator: the tensors a kernel may access, and which blocks accessed them.
//
// How: the host registers the tensors of a launch. Each byte of a writable tensor has a record of
// the blocks that read and wrote it, so that every unordered pair of accesses fails, in each order
// in which a run may do the two.
//
// Limit: 8 bytes of records per byte of writable memory, and a loop over the bytes of an access.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// A range of memory that kernels may read or write.
struct Allocation {
  const char* tensor;  // its name, for messages
  const void* begin;
  int64_t bytes;
  bool writable;
};

// How a kernel accesses memory. `constant`: load_global and TMA loads. Their cache is not coherent,
// so no running grid may write that memory.
enum class Access { constant, read, write, atomic };

// The block that accesses memory. `unordered`: its thread has not called grid_dependency_wait.
struct Accessor {
  int grid = 0, block = 0;
  bool unordered = false;
};

// Checks nothing until allocations are registered.
class Memory {
 public:
  void register_allocations(const Allocation* allocations, int count);  // replaces earlier ones
  void disable_checks();
  void add_allocation(const Allocation& scratch);  // if checks are enabled
  void clear_records();  // for a new launch
  // Fails unless the bytes at `p` are in one registered tensor and, for a write, it is writable.
  void check(const void* p, int64_t bytes, bool write, const char* what);
  // Checks and records an access; fails if it is a race. `value`: the bytes to be written. Two
  // blocks may write equal bytes.
  void record(Access access, const Accessor& accessor, const void* p, int64_t bytes,
              const char* what, const void* value = nullptr);

 private:
  struct Range {
    const char *begin, *end;
    int tensor;
  };
  // For each grid, index + 1 of a block that wrote the byte and of one that read it; 0: none.
  struct Record {
    uint16_t writer[2] = {0, 0}, reader[2] = {0, 0};
  };
  struct Tensor {
    std::string name;
    const char* begin;
    bool writable;
    std::vector<Record> records;  // per byte from `begin` on, if writable
  };
  bool checks_ = false;
  std::vector<Range> ranges_;  // ascending
  std::vector<Tensor> tensors_;
  size_t last_ = 0;  // index of the range that the last look-up found

  const Range* find(const char* p);
  std::string describe(const char* p);
};

Memory& memory();

}  // namespace emulator
