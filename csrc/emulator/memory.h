// Global memory as kernels may touch it: what the host registered, and who has touched each byte.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// A piece of memory that the host lets kernels read or write.
struct Allocation {
  const char* tensor;  // its name, for messages
  const void* begin;
  int64_t bytes;
  bool writable;
};

// How memory is touched. A constant is what no grid that runs at the same time writes: load_global
// may take it from a cache that nobody keeps up to date.
enum class Touch { constant, read, write, atomic };

// Who touches it: a block of the first grid or of the one that depends on it (1), and whether that
// one's thread has waited for the first.
struct Toucher {
  int grid = 0, block = 0;
  bool early = false;
};

// Nothing is checked while nothing is registered.
class Memory {
 public:
  void register_only(const Allocation* allocations, int count);  // and nothing else from now on
  void unregister();
  void also(const Allocation& scratch);  // what the host itself has
  void forget();  // who touched what: a new launch begins
  // Fails unless `bytes` at `p` lie in one registered tensor and, for a write, in a writable one.
  void check(const void* p, int64_t bytes, bool write, const char* what);
  // Notes it, too, and fails if that is a race. `value`: what is written, to be compared with what
  // another block has written there.
  void touch(Touch how, const Toucher& who, const void* p, int64_t bytes, const char* what,
             const void* value = nullptr);

 private:
  struct Range {
    const char *begin, *end;
    int tensor;
  };
  // Of each grid, a block + 1 that wrote and one that read; 0: none.
  struct Marks {
    uint16_t writer[2] = {0, 0}, reader[2] = {0, 0};
  };
  struct Tensor {
    std::string name;
    const char* begin;
    bool writable;
    std::vector<Marks> marks;  // by byte from `begin`, if writable
  };
  bool checks_ = false;
  std::vector<Range> ranges_;  // ascending
  std::vector<Tensor> tensors_;
  size_t last_ = 0;  // found here last time

  const Range* find(const char* p);
  std::string place(const char* p);
};

Memory& memory();

}  // namespace emulator
