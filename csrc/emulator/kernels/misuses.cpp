// Kernels with one error each, which the emulator must report.
#include <stdexcept>
#include <string>

#include "harness.h"

extern "C" {

// Runs the kernel with the error named `misuse`. numbers: [8], writable; constants: [8], read-only.
int emulate_misuse(const char* misuse, int* numbers, const int* constants, RunOptions options) {
  const std::string name = misuse;
  Launch launch = make_launch(options, 1, 256, 16384);
  if (name == "too much shared memory") launch.shared_bytes = 232449;
  if (name == "too many registers") launch.registers = 256;
  if (name == "too large a cluster") launch.blocks = launch.cluster = 16;
  if (name == "two blocks write") launch.blocks = 2;
  if (name == "one block reads, one writes") launch.blocks = 2;
  if (name == "atomic and plain") launch.blocks = 2;
  TensorMap map{reinterpret_cast<char*>(numbers), 8, 1, 32, 8, 1, 4, false};
  if (name == "a map past its tensor") map.rows = 2;
  if (name == "a map with too small a row stride") map.row_bytes = 16;
  if (name == "a map of rows of 24 bytes") map.row_bytes = 24, map.rows = 1, map.columns = 4;
  if (name == "a box of 257 rows") map.box_rows = 257;
  if (name == "a swizzled box of 32 bytes") map.swizzle = true;
  if (name == "a TMA store to a read-only tensor") {
    map.base = reinterpret_cast<char*>(const_cast<int*>(constants));
  }
  const auto kernel = [&] {
    char* memory = shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(memory + 4096);
    const int thread = thread_index();
    const bool first = thread == 0;
    const auto init_barrier = [&](int count) {
      if (first) barrier_init(barrier, count);
      if (first) barrier_init_fence();
      block_sync();
    };
    const auto load = [&](char* tile) {
      init_barrier(1);
      if (first) barrier_arrive_expect(barrier, 32);
      if (first) tma_load(tile, &map, barrier, 0, 0);
      barrier_wait(barrier, 0);
    };
    const auto multiply = [&](uint64_t a, uint64_t b) {
      float d[8];
      wgmma_fence();
      wgmma_e4m3<16>(d, a, b, false);
      wgmma_commit();
      wgmma_wait<0>();
    };
    // Barriers in shared memory.
    if (name == "a barrier not initialized" && first) barrier_arrive(barrier);
    if (name == "barrier count 0" && first) barrier_init(barrier, 0);
    if (name == "a barrier initialized twice" && first) {
      barrier_init(barrier, 1);
      barrier_init(barrier, 1);
    }
    if (name == "a barrier not aligned" && first) {
      barrier_init(reinterpret_cast<Barrier*>(memory + 4), 1);
    }
    if (name == "a barrier without an arrival") {
      init_barrier(1);
      barrier_wait(barrier, 0);
    }
    if (name == "parity 2") {
      init_barrier(1);
      barrier_wait(barrier, 2);
    }
    if (name == "too many arrivals") {
      init_barrier(64);
      if (thread < 65) barrier_arrive(barrier);  // 64 complete the phase, 1 is part of the next
      barrier_wait(barrier, 0);
      barrier_wait(barrier, 1);
    }
    if (name == "too many bytes") {
      init_barrier(2);
      if (first) barrier_arrive_expect(barrier, 1 << 20);
    }
    if (name == "fewer bytes than expected") {
      init_barrier(1);
      if (first) barrier_arrive_expect(barrier, 16);
      barrier_wait(barrier, 0);
    }
    if (name == "a store to a barrier") {
      init_barrier(1);
      if (first) store_shared(memory + 4100, 0);
    }
    if (name == "a box over a barrier") load(memory + 4096);
    if (name == "a copy over a barrier") {
      init_barrier(1);
      if (first) bulk_load(memory + 4096 - 16, constants, 32, barrier);
    }
    // Named barriers.
    if (name == "half of a named barrier's threads" && thread < 128) named_barrier_sync(3, 256);
    if (name == "named barrier 16") named_barrier_sync(16, 256);
    if (name == "named barrier 0") named_barrier_sync(0, 256);
    if (name == "a named barrier of two sizes") named_barrier_sync(2, thread < 128 ? 128 : 160);
    if (name == "a named barrier of 100 threads") named_barrier_sync(2, 100);
    if (name == "two arrivals of one thread" && thread < 32) {
      named_barrier_arrive(1, 64);
      named_barrier_arrive(1, 64);
    }
    if (name == "warp_sync without one lane" && thread < 31) warp_sync();
    if (name == "block_sync without one thread" && thread < 255) block_sync();
    if (name == "half a warp at a named barrier" && thread < 16) named_barrier_sync(1, 32);
    if (name == "a warp at two named barriers" && thread < 32) {
      named_barrier_sync(thread < 16 ? 1 : 2, 32);
    }
    if (name == "one lane at a barrier it need not wait for" && first) named_barrier_arrive(1, 64);
    if (name == "cluster_arrive without one lane" && thread < 255) cluster_arrive();
    if (name == "cluster_wait without cluster_arrive") cluster_wait();
    if (name == "cluster_arrive without cluster_wait") {
      cluster_arrive();
      cluster_arrive();
    }
    if (name == "a missing rank") {
      init_barrier(1);
      barrier_arrive_remote(barrier, 1);
    }
    if (name == "multicast to a missing rank") {
      init_barrier(1);
      if (first) tma_load_multicast(memory, &map, barrier, 0, 0, 2);
    }
    // Shared memory.
    if (name == "a store past shared memory" && first) store_shared(memory + 16384, 1.0f);
    if (name == "a load before shared memory" && first) load_shared<int>(memory - 4);
    if (name == "a plain store past shared memory" && first) *(memory + 16388) = 0;
    if (name == "a store not aligned" && first) store_shared(memory + 2, 1.0f);
    if (name == "a load not aligned" && first) load_shared<Chunk>(memory + 8);
    if (name == "four floats not aligned" && first) load_shared_at(memory + 8, 0);
    if (name == "a matrix not aligned" && thread < 32) store_matrix_x4(memory + 8, 0, 0, 0, 0);
    if (name == "lane 32" && thread < 32) shuffle_from(1, 32);
    if (name == "lane mask 32" && thread < 32) shuffle_xor(1.0f, 32);
    // TMA.
    if (name.rfind("a map ", 0) == 0 || name.rfind("a box of", 0) == 0) load(memory);
    if (name == "a swizzled box of 32 bytes") load(memory);
    if (name == "a box not aligned") load(memory + 64);
    if (name == "a copy of 24 bytes" && first) {
      barrier_init(barrier, 1);
      barrier_init_fence();
      bulk_load(memory, constants, 24, barrier);
    }
    if (name == "a copy without barrier_init_fence" && first) {
      barrier_init(barrier, 1);
      bulk_load(memory, constants, 32, barrier);
    }
    if (name == "a copy past its tensor") {
      init_barrier(1);
      if (first) bulk_load(memory, constants, 48, barrier);
    }
    if (name == "an asynchronous copy not aligned" && first) {
      copy_async(memory + 8, constants, true);
    }
    if (name == "an asynchronous copy past its tensor" && first) {
      copy_async(memory, constants + 8, true);
    }
    if (name == "an asynchronous copy over a barrier") {
      init_barrier(1);
      if (first) copy_async(memory + 4096, constants, true);
    }
    if (name == "copies that arrive at no barrier" && first) {
      barrier_arrive_after_copies(barrier);
    }
    if (name == "copies that arrive once too often") {
      init_barrier(64);
      if (thread < 65) barrier_arrive_after_copies(barrier);
      barrier_wait(barrier, 0);
      barrier_wait(barrier, 1);
    }
    if (name.rfind("copies that arrived", 0) == 0) {
      init_barrier(1);
      if (first) copy_async(memory, constants, true);
      if (first) barrier_arrive_after_copies(barrier);
      if (name == "copies that arrived, read without a wait" && first) load_shared<int>(memory);
      barrier_wait(barrier, 0);
      if (first && name == "copies that arrived, overwritten by a copy") {
        bulk_load(memory, constants, 32, barrier);
      }
      if (first && name == "copies that arrived, stored by TMA") tma_store(&map, memory, 0, 0);
    }
    if (name == "a copy over stores without a fence") {
      init_barrier(1);
      if (first) store_shared(memory, 1);
      if (first) bulk_load(memory, constants, 32, barrier);
    }
    if (name == "a load of a copy without a wait") {
      init_barrier(2);
      if (first) bulk_load(memory, constants, 32, barrier);
      if (first) load_shared<int>(memory);
    }
    if (name == "a store over a copy without a wait") {
      init_barrier(2);
      if (first) bulk_load(memory, constants, 32, barrier);
      if (first) store_shared(memory, 1);
    }
    if (name == "a copy that one of two warps waits for") {
      init_barrier(1);
      if (first) barrier_arrive_expect(barrier, 32);
      if (first) bulk_load(memory, constants, 32, barrier);
      if (thread < 32) barrier_wait(barrier, 0);
      if (thread >= 32) load_shared<int>(memory);
    }
    if (name == "more bytes than announced") {
      init_barrier(2);
      for (int i = 0; first && i < 1 << 15; ++i) bulk_load(memory, constants, 32, barrier);
    }
    if (name == "a TMA store without a fence" && first) {
      store_shared(memory, 1);
      tma_store(&map, memory, 0, 0);
    }
    if (name == "a TMA store not committed" && first) tma_store(&map, memory, 0, 0);
    if (name == "a TMA store not waited for" && first) {
      tma_store(&map, memory, 0, 0);
      tma_store_commit();
    }
    if (name == "a TMA store to a read-only tensor" && first) tma_store(&map, memory, 0, 0);
    // WGMMA.
    if (name == "an operand from row 1" && thread < 128) {
      multiply(matrix_descriptor(memory, 0, 1024), matrix_descriptor(memory + 128, 0, 1024));
    }
    if (name == "an operand without swizzle" && thread < 128) {
      multiply(matrix_descriptor(memory, 0, 1024) & ~(uint64_t{3} << 62),
               matrix_descriptor(memory, 0, 1024));
    }
    if (name == "a reserved bit in a descriptor" && thread < 128) {
      const uint64_t b = matrix_descriptor(memory, 0, 1024);
      multiply(b | uint64_t{1} << 47, b);
    }
    if (name == "a base offset" && thread < 128) {
      const uint64_t b = matrix_descriptor(memory, 0, 1024);
      multiply(b | uint64_t{1} << 49, b);
    }
    if (name == "an operand copied without a wait") {
      init_barrier(2);
      if (first) bulk_load(memory, constants, 32, barrier);
      block_sync();
      const uint64_t b = matrix_descriptor(memory, 0, 1024);
      if (thread < 128) multiply(b, b);
    }
    if (name == "an operand not aligned" && first) matrix_descriptor(memory + 8, 0, 1024);
    if (name == "too large a stride" && first) matrix_descriptor(memory, 0, 1 << 18);
    if (name == "different operands in a warpgroup" && thread < 128) {
      multiply(matrix_descriptor(memory, 0, 1024),
               matrix_descriptor(memory + (first ? 1024 : 0), 0, 1024));
    }
    if (name == "an operand not fenced" && thread < 128) {
      if (first) store_shared(memory, 0);
      named_barrier_sync(1, 128);
      multiply(matrix_descriptor(memory, 0, 1024), matrix_descriptor(memory, 0, 1024));
    }
    if (name.rfind("an operand copied asynchronously", 0) == 0 && thread < 128) {
      if (first) copy_async(memory, constants, true);
      copy_async_commit();
      if (name == "an operand copied asynchronously, fenced before the wait") fence_async_proxy();
      if (name != "an operand copied asynchronously, without a wait") copy_async_wait<0>();
      named_barrier_sync(1, 128);
      multiply(matrix_descriptor(memory, 0, 1024), matrix_descriptor(memory, 0, 1024));
    }
    if (name.rfind("an operand that arrived", 0) == 0) {
      init_barrier(1);
      if (first) copy_async(memory, constants, true);
      if (first) barrier_arrive_after_copies(barrier);
      if (name == "an operand that arrived, fenced before the wait") fence_async_proxy();
      if (name != "an operand that arrived, without a wait") barrier_wait(barrier, 0);
      const bool one_warp = name == "an operand that arrived, fenced by one warp";
      if (one_warp && thread < 32) fence_async_proxy();
      const uint64_t b = matrix_descriptor(memory, 0, 1024);
      if (thread < 128) multiply(b, b);
    }
    if (name.rfind("wgmma", 0) == 0 && thread < 128) {
      float d[8] = {};
      const uint32_t a[4] = {1, 2, 3, 4};
      const uint64_t b = matrix_descriptor(memory, 0, 1024);
      if (name != "wgmma without a fence") wgmma_fence(d);
      if (name == "wgmma fenced before its sums are set") d[3] = static_cast<float>(thread);
      wgmma_bf16<16>(d, a, b, false);
      if (name != "wgmma without one lane's commit" || thread != 5) wgmma_commit();
      if (name == "wgmma on its result without a fence") {
        wgmma_wait<0>();
        wgmma_bf16<16>(d, a, b, true);
      }
      if (name != "wgmma never waited for") wgmma_wait<0>();
    }
    // Registers.
    if (name == "100 registers") set_registers(100, false);
    if (name == "20 registers") set_registers(20, false);
    if (name == "an increase to fewer registers") set_registers(40, true);
    // Global memory.
    if (name == "a read past a tensor" && first) load_global(constants + 8);
    if (name == "a read before a tensor" && first) load_written(numbers - 1);
    if (name == "a write past a tensor" && first) store_global(numbers + 8, 0);
    if (name == "a write to a read-only tensor" && first) {
      store_global(const_cast<int*>(constants), 0);
    }
    if (name == "a read not aligned" && first) {
      load_global(reinterpret_cast<const int*>(reinterpret_cast<const char*>(constants) + 2));
    }
    if (name == "two blocks write" && first) store_global(numbers, block_index());
    if (name == "one block reads, one writes" && first) {
      block_index() == 0 ? store_global(numbers, 1) : (void)load_written(numbers);
    }
    if (name == "atomic and plain" && first) {
      block_index() == 0 ? store_global(numbers, 1) : atomic_max(numbers, 2);
    }
    if (name == "a constant read of written memory" && first) {
      load_global(numbers);
      store_global(numbers, 1);
    }
    if (name == "an exception of the kernel" && first) {
      throw std::runtime_error("message of the kernel");
    }
  };
  return run_checked(options, launch, kernel);
}

}  // extern "C"
