// Small kernels for the tests of the primitives.
#include "harness.h"

#include <string>

namespace {

// out = A · Bᵀ (+ c) for 64 rows of A, N rows of B and 128 bytes of K. bf16 and fp16 operands may
// also be M-major or N-major.
struct Product {
  char *a, *b;      // K-major: [64, K] and [N, K]; else transposed
  float *c, *out;  // [64, N]; c may be null
  bool fp8, fp16, a_k_major, b_k_major, a_in_registers;
};

// This thread's pairs of bf16 of A [64, 64] in the register layout of WGMMA, from global memory.
void load_pairs(uint32_t (&pairs)[4], const char* a, int k) {
  const int row = thread_index() / 32 * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int offset = (row + i % 2 * 8) * 64 + k + i / 2 * 8 + column;
    pairs[i] = load_global(reinterpret_cast<const uint32_t*>(a + offset * 2));
  }
}

template <int N>
void issue(const Product& p, float (&d)[N / 2], char* a_tile, char* b_tile, int step) {
  const uint64_t a = advance_descriptor(matrix_descriptor(a_tile, p.a_k_major ? 0 : 8192, 1024),
                                        step * (p.a_k_major ? 32 : 2048));
  const uint64_t b = p.b_k_major ? matrix_descriptor(b_tile + step * 32, 0, 1024)
                                : matrix_descriptor(b_tile + step * 2048, 8192, 1024);
  const bool add = step > 0 || p.c;
  if (p.fp8) return wgmma_e4m3<N>(d, a, b, add);
  if (p.a_in_registers) {
    uint32_t pairs[4];
    load_pairs(pairs, p.a, step * 16);
    wgmma_fence();
    if (p.fp16) {
      return p.b_k_major ? wgmma_fp16<N, true>(d, pairs, b, add)
                         : wgmma_fp16<N, false>(d, pairs, b, add);
    }
    if (p.b_k_major) return wgmma_bf16<N, true>(d, pairs, b, add);
    return wgmma_bf16<N, false>(d, pairs, b, add);
  }
  if (p.fp16 && p.a_k_major && p.b_k_major) return wgmma_fp16<N, true, true>(d, a, b, add);
  if (p.fp16 && p.a_k_major) return wgmma_fp16<N, true, false>(d, a, b, add);
  if (p.fp16 && p.b_k_major) return wgmma_fp16<N, false, true>(d, a, b, add);
  if (p.fp16) return wgmma_fp16<N, false, false>(d, a, b, add);
  if (p.a_k_major && p.b_k_major) return wgmma_bf16<N, true, true>(d, a, b, add);
  if (p.a_k_major) return wgmma_bf16<N, true, false>(d, a, b, add);
  if (p.b_k_major) return wgmma_bf16<N, false, true>(d, a, b, add);
  return wgmma_bf16<N, false, false>(d, a, b, add);
}

template <int N>
void product(const Product& p, const TensorMap& a_map, const TensorMap& b_map) {
  char *a_tile = shared_memory(), *b_tile = a_tile + 8192;
  const int boxes = p.b_k_major ? 1 : (N + 63) / 64;
  Barrier* full = new_barrier(b_tile + N * 128 + 8192, 1);
  if (thread_index() == 0) {
    prefetch(&a_map);
    barrier_arrive_expect(full, a_map.box_bytes() + boxes * b_map.box_bytes());
    tma_load(a_tile, &a_map, full, 0, 0);
    for (int i = 0; i < boxes; ++i) tma_load(b_tile + i * 8192, &b_map, full, i * 64, 0);
  }
  const int row = thread_index() / 32 * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  float d[N / 2];
  const auto offset = [&](int i) {
    return (row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2;
  };
  for (int i = 0; i < N / 2; ++i) d[i] = p.c ? load_global(p.c + offset(i)) : NAN;
  barrier_wait(full, 0);
  keep_order(d);
  wgmma_fence();
  for (int step = 0; step < 4; ++step) issue<N>(p, d, a_tile, b_tile, step);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) store_global(p.out + offset(i), d[i]);
}

}  // namespace

extern "C" {

int emulate_product(const Product* p, int N, RunOptions options) {
  const uint32_t size = p->fp8 ? 1 : 2;
  const auto columns = static_cast<uint64_t>(N);
  const TensorMap a{p->a, 128 / size, 64, 128, 128 / size, 64, size, true};
  TensorMap b{p->b, 128 / size, columns, 128, 128 / size, static_cast<uint32_t>(N), size, true};
  if (!p->b_k_major) b = {p->b, columns, 64, columns * 2, 64, 64, 2, true};
  const uint32_t shared = 2 * 8192 + N * 128 + 8;
  return run_checked(options, make_launch(options, 1, 128, shared), [&] {
    if (N == 16) product<16>(*p, a, b);
    if (N == 32) product<32>(*p, a, b);
    if (N == 64) product<64>(*p, a, b);
    if (N == 128) product<128>(*p, a, b);
    if (N == 192) product<192>(*p, a, b);
    if (N == 256) product<256>(*p, a, b);
  });
}

// out[256], 16-bit values: a 16x16 tile stored by store_matrix_x4, value = 16 * row + column.
int emulate_store_matrix(uint16_t* out, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 512), [&] {
    const int lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
    uint32_t parts[4];  // top left, top right, bottom left, bottom right
    for (int m = 0; m < 4; ++m) {
      const uint32_t first = (row + m / 2 * 8) * 16 + column + m % 2 * 8;
      parts[m] = first | (first + 1) << 16;
    }
    char* row_address = shared_memory() + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16;
    const uint32_t offset = shared_address(row_address) - shared_address(shared_memory());
    store_matrix_x4(shared_memory() + offset, parts[0], parts[1], parts[2], parts[3]);
    warp_sync();
    for (int i = lane; i < 256; i += 32) {
      store_global(out + i, load_shared<uint16_t>(shared_memory() + 2 * i));
    }
  });
}

// Copies x [2, 32, 4] in two groups, with zeros for every third lane, to out [2, 32, 4].
int emulate_copy_async(const uint32_t* x, Chunk* out, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 1024), [&] {
    const int lane = lane_index();
    char* memory = shared_memory();
    for (int group = 0; group < 2; ++group) {
      const int at = group * 32 + lane;
      copy_async(memory + at * 16, x + at * 4, lane % 3 > 0);
      copy_async_commit();
    }
    copy_async_wait<1>();
    store_global(out + lane, load_shared<Chunk>(memory + lane * 16));
    copy_async_wait<0>();
    warp_sync();
    const int other = 32 + (lane + 1) % 32;
    store_global(out + other, load_shared<Chunk>(memory + other * 16));
  });
}

// The same, with an arrival by each lane's copies in the place of waits. Each lane reads what
// another one copied, and a number that the other one stored: it arrives once more after that.
// bug: it does not.
int emulate_copy_arrivals(const uint32_t* x, Chunk* out, bool bug, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 1024 + 128 + 8), [&] {
    const int lane = lane_index(), other = 31 - lane;
    char *memory = shared_memory(), *numbers = memory + 1024;
    Barrier* full = new_barrier(numbers + 128, bug ? 32 : 64);
    for (int group = 0; group < 2; ++group) {
      const int at = group * 32 + lane;
      copy_async(memory + at * 16, x + at * 4, lane % 3 > 0);
      if (group == 0) copy_async_commit();
    }
    store_shared(numbers + 4 * lane, lane);
    barrier_arrive_after_copies(full);
    if (!bug) barrier_arrive(full);
    barrier_wait(full, 0);
    const bool stored = load_shared<int>(numbers + 4 * other) == other;
    for (int group = 0; group < 2; ++group) {
      const int at = group * 32 + other;
      const auto chunk = load_shared<Chunk>(memory + at * 16);
      store_global(out + at, stored ? chunk : Chunk{});
    }
  });
}

// out[0:32] = in, by bulk_load; out[32] = their sum, by shuffle_xor; out[33] = in[5], by
// shuffle_from.
int emulate_bulk_load_and_shuffles(const float* in, float* out, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 144), [&] {
    char* memory = shared_memory();
    Barrier* full = new_barrier(memory + 128, 1);
    if (thread_index() == 0) {
      barrier_arrive_expect(full, 128);
      bulk_load(memory, in, 128, full);
    }
    barrier_wait(full, 0);
    const int lane = lane_index();
    const float value = load_shared<float>(memory + 4 * lane);
    float sum = value;
    for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
    store_global(out + lane, value);
    if (lane == 0) store_global(out + 32, sum);
    const int fifth = shuffle_from(static_cast<int>(value), 5);
    if (lane == 31) store_global(out + 33, static_cast<float>(fifth));
  });
}

// Loads a box of 32 rows by 64 columns by TMA: out[r, c] = in[r + row, c + column], 16-bit values
// of a matrix [rows, 64], 0 outside of it. Then stores the box by TMA at the same position of
// `back`.
int emulate_boxes(char* in, char* back, uint16_t* out, int rows, int row, int column, bool swizzle,
                  RunOptions options) {
  const auto num_rows = static_cast<uint64_t>(rows);
  const TensorMap in_map{in, 64, num_rows, 128, 64, 32, 2, swizzle};
  const TensorMap back_map{back, 64, num_rows, 128, 64, 32, 2, swizzle};
  return run_checked(options, make_launch(options, 1, 32, 4104), [&] {
    char* memory = shared_memory();
    Barrier* full = new_barrier(memory + 4096, 1);
    if (elect_one()) {
      barrier_arrive_expect(full, 4096);
      tma_load(memory, &in_map, full, column, row);
    }
    barrier_wait(full, 0);
    for (int i = lane_index(); i < 32 * 64; i += 32) {
      const int r = i / 64, chunk = i % 64 / 8 ^ (swizzle ? r % 8 : 0);
      store_global(out + i, load_shared<uint16_t>(memory + r * 128 + chunk * 16 + i % 8 * 2));
    }
    if (elect_one()) {
      tma_store(&back_map, memory, column, row);
      tma_store_commit();
      tma_store_wait_read<0>();
    }
  });
}

// Stores 8 rows of 32 floats to `out` by TMA, one box each, through two buffers. A buffer is reused
// when all stores except the last one have read theirs. Then one thread reads `out` and writes the
// sum.
int emulate_store_waits(char* out, float* sum, RunOptions options) {
  const TensorMap map{out, 32, 8, 128, 32, 1, 4, false};
  return run_checked(options, make_launch(options, 1, 32, 256), [&] {
    for (int row = 0; row < 8; ++row) {
      char* buffer = shared_memory() + row % 2 * 128;
      if (lane_index() == 0) tma_store_wait_read<1>();
      warp_sync();
      store_shared(buffer + 4 * lane_index(), static_cast<float>(row * 32 + lane_index()));
      fence_async_proxy();
      warp_sync();
      if (lane_index() == 0) {
        tma_store(&map, buffer, 0, row);
        tma_store_commit();
      }
    }
    if (lane_index() == 0) {
      tma_store_wait<0>();
      float total = 0;
      for (int i = 0; i < 256; ++i) {
        total += load_written(reinterpret_cast<const float*>(out) + i);
      }
      store_global(sum, total);
    }
  });
}

// out[10, 32]: warp 0 writes a buffer ten times and arrives at barrier 1. Warp 1 waits for it,
// reads and arrives at barrier 2. Warp 0 waits for barrier 2 before it writes again.
int emulate_named_barriers(int* out, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 64, 128), [&] {
    char* slot = shared_memory() + 4 * lane_index();
    for (int i = 0; i < 10; ++i) {
      if (warp_index() == 0) {
        if (i > 0) named_barrier_sync(2, 64);
        store_shared(slot, i * 32 + lane_index());
        named_barrier_arrive(1, 64);
      } else {
        named_barrier_sync(1, 64);
        const char* other = shared_memory() + 4 * (31 - lane_index());
        store_global(out + i * 32 + lane_index(), load_shared<int>(other));
        if (i < 9) named_barrier_arrive(2, 64);
      }
    }
  });
}

// Four blocks in clusters of two. Each block loads half of a row of 32 floats by multicast to both.
// It stores 100 * rank + the sum of the row after the other block has arrived at its barrier.
int emulate_cluster(char* in, float* out, RunOptions options) {
  const TensorMap map{in, 32, 1, 128, 16, 1, 4, false};
  Launch launch = make_launch(options, 4, 32, 2 * 128 + 16);
  launch.cluster = 2;
  return run_checked(options, launch, [&] {
    char* memory = shared_memory();
    const int rank = cluster_rank();
    auto *full = reinterpret_cast<Barrier*>(memory + 256), *read = full + 1;
    if (elect_one()) {
      barrier_init(full, 1);
      barrier_init(read, 1);
      barrier_init_fence();
    }
    cluster_sync();
    if (elect_one()) {
      barrier_arrive_expect(full, 128);
      tma_load_multicast(memory + rank * 128, &map, full, rank * 16, 0, 3);
    }
    barrier_wait(full, 0);
    float sum = load_shared<float>(memory + lane_index() / 16 * 128 + lane_index() % 16 * 4);
    for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (elect_one()) barrier_arrive_remote(read, 1 - rank);
    barrier_wait(read, 0);
    if (lane_index() == 0) store_global(out + block_index(), 100.0f * rank + sum);
    cluster_arrive();
    cluster_wait();
  });
}

// out[4, 4]: each of the four blocks of a cluster reads 4 floats from the next block's shared
// memory, which signals an mbarrier. bug 1: no cluster barrier before the signal; bug 2: none after
// the read.
int emulate_distributed(float* out, int bug, RunOptions options) {
  Launch launch = make_launch(options, 4, 32, 24);
  launch.cluster = 4;
  return run_checked(options, launch, [&] {
    const int rank = cluster_rank();
    Barrier* written = new_barrier(shared_memory() + 16, 1);
    if (bug != 1) cluster_sync();
    if (lane_index() < 4) {
      store_shared(shared_memory() + 4 * lane_index(), 10.0f * rank + lane_index());
    }
    warp_sync();
    if (elect_one()) barrier_arrive_release_cluster(written, (rank + 3) % 4);
    barrier_wait_acquire_cluster(written, 0);
    const Floats next = load_shared_at(shared_memory(), (rank + 1) % 4);
    for (int i = 0; i < 4; ++i) {
      if (lane_index() == i) store_global(out + rank * 4 + i, next.value[i]);
    }
    if (bug != 2) cluster_sync();
  });
}

// out[2, 2, 4]: the two blocks of a cluster exchange 4 floats twice through one buffer. Bugs: 1:
// the arrival that says that the buffer is full releases in the block's scope; 2: the wait for it
// acquires there; 3, 4: likewise when it is free again.
int emulate_exchange(float* out, int bug, RunOptions options) {
  Launch launch = make_launch(options, 2, 32, 32);
  launch.cluster = 2;
  return run_checked(options, launch, [&] {
    const int rank = cluster_rank(), lane = lane_index();
    char* buffer = shared_memory();
    auto *full = reinterpret_cast<Barrier*>(buffer + 16), *empty = full + 1;
    if (lane == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 1);
      barrier_init_fence();
    }
    cluster_sync();
    const auto tell = [&](Barrier* barrier, bool narrow) {
      warp_sync();
      if (lane != 0) return;
      narrow ? barrier_arrive_remote(barrier, 1 - rank)
             : barrier_arrive_release_cluster(barrier, 1 - rank);
    };
    const auto wait = [&](Barrier* barrier, uint32_t parity, bool narrow) {
      narrow ? barrier_wait(barrier, parity) : barrier_wait_acquire_cluster(barrier, parity);
    };
    for (uint32_t i = 0; i < 2; ++i) {
      if (i > 0) wait(empty, 0, bug == 4);
      if (lane < 4) store_shared(buffer + 4 * lane, 100.0f * i + 10.0f * rank + lane);
      tell(full, bug == 1);
      wait(full, i, bug == 2);
      const Floats other = load_shared_at(buffer, 1 - rank);
      if (i == 0) tell(empty, bug == 3);
      if (lane < 4) store_global(out + (i * 2 + rank) * 4 + lane, other.value[lane]);
    }
    cluster_sync();
  });
}

// out[i] = 31 - i through shared memory, between the lanes of a warp. bug: no warp_sync.
int emulate_neighbours(float* out, bool bug, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 128), [&] {
    char* memory = shared_memory();
    const int lane = lane_index();
    store_shared(memory + 4 * lane, static_cast<float>(lane));
    const float own = load_shared<float>(memory + 4 * lane);
    if (!bug) warp_sync();
    const float other = load_shared<float>(memory + 4 * (31 - lane));
    store_global(out + lane, own == lane ? other : NAN);
  });
}

// out[warp] = 100 * (lanes elected in one of two calls) + (lanes elected in both).
int emulate_elect(int* out, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 128, 0), [&] {
    const bool first = elect_one(), second = elect_one();
    float both = first && second ? 1.0f : 0.0f, any = first || second ? 1.0f : 0.0f;
    for (int lanes = 16; lanes; lanes /= 2) {
      both += shuffle_xor(both, lanes);
      any += shuffle_xor(any, lanes);
    }
    if (first) store_global(out + warp_index(), static_cast<int>(100 * any + both));
  });
}

// Two warpgroups start with 128 registers per thread; one decreases to 40, the other increases to
// 216 or, if too_many, to 224.
int emulate_registers(int* out, bool too_many, RunOptions options) {
  Launch launch = make_launch(options, 1, 256, 0);
  launch.registers = 128;
  return run_checked(options, launch, [&] {
    if (warp_index() < 4) {
      registers_decrease<40>();
    } else if (too_many) {
      registers_increase<224>();
    } else {
      registers_increase<216>();
    }
    if (thread_index() == 255) store_global(out, 1);
  });
}

// The minimum and the maximum of 500 numbers, by 3 blocks of 64 threads.
int emulate_atomics(const int* numbers, int* minimum, int* maximum, RunOptions options) {
  return run_checked(options, make_launch(options, 3, 64, 0), [&] {
    for (int i = block_index() * 64 + thread_index(); i < 500; i += block_count() * 64) {
      atomic_min(minimum, load_global(numbers + i));
      atomic_max(maximum, load_global(numbers + i));
    }
  });
}

// The first grid writes squares [6, 32], the dependent grid their sums [6]. Bugs of the dependent
// grid: 1: does not wait for the first grid; 2: reads through the non-coherent cache; 3: writes
// `squares` before it waits; 4: writes `sums`, which the first grid reads, before it waits.
int emulate_dependent_grid(int* squares, int* sums, int bug, RunOptions options) {
  return run_checked(options, [&] {
    const Launch launch = make_launch(options, 6, 32, 0);
    Machine machine(launch, [&] {
      grid_dependency_launch();
      store_global(squares + block_index() * 32 + lane_index(), lane_index() * lane_index());
      if (bug == 4) load_global(sums);
    });
    machine.add_dependent_grid(launch, [&] {
      if (bug == 3) store_global(squares + block_index() * 32 + lane_index(), 0);
      if (bug == 4 && thread_index() == 0 && block_index() == 0) store_global(sums, 0);
      if (bug != 1) grid_dependency_wait();
      int sum = 0;
      for (int i = 0; i < 32 && lane_index() == 0; ++i) {
        const int* square = squares + block_index() * 32 + i;
        sum += bug == 2 ? load_global(square) : load_written(square);
      }
      if (lane_index() == 0) store_global(sums + block_index(), sum);
    });
    machine.run();
  });
}

// out[i] = function(x[i], y[i], z[i]) for n 32-bit words.
int emulate_numbers(const char* function, const uint32_t* x, const uint32_t* y, const uint32_t* z,
                    uint32_t* out, int n, RunOptions options) {
  const std::string name = function;
  const auto run = [&](uint32_t a, uint32_t b, uint32_t c) -> uint32_t {
    const float u = float_of(a), v = float_of(b), w = float_of(c);
    if (name == "to_bf16") return pack(to_bf16(u), to_bf16(v));
    if (name == "pack_bf16") return pack_bf16(u, v);
    if (name == "pack_fp16") return pack_fp16(u, v);
    if (name == "max_of") return float_bits(max_of(u, v));
    if (name == "min_of") return float_bits(min_of(u, v));
    if (name == "to_fp16") return pack(to_fp16(u), to_fp16(v));
    if (name == "low_bf16") return float_bits(to_float(low_bf16(a)));
    if (name == "high_bf16") return float_bits(to_float(high_bf16(a)));
    if (name == "low_fp16") return float_bits(to_float(low_fp16(a)));
    if (name == "high_fp16") return float_bits(to_float(high_fp16(a)));
    if (name == "e4m3_to_fp16") return e4m3_to_fp16(static_cast<uint16_t>(a));
    if (name == "multiply_fp16") return multiply_fp16(a, b);
    if (name == "divide") return float_bits(divide(u, v));
    if (name == "fused_multiply_add") return float_bits(fused_multiply_add(u, v, w));
    if (name == "exp2_of") return float_bits(exp2_of(u));
    if (name == "log2_of") return float_bits(log2_of(u));
    emulator::fail("emulate_numbers: unknown function " + name);
  };
  return run_checked(options, make_launch(options, 1, 32, 0), [&] {
    for (int i = lane_index(); i < n; i += 32) {
      store_global(out + i, run(load_global(x + i), load_global(y + i), load_global(z + i)));
    }
  });
}

// load_streamed: out[i] = in[i] if valid[i], else zeros; 32 chunks.
int emulate_streamed(const Chunk* in, Chunk* out, const int* valid, RunOptions options) {
  return run_checked(options, make_launch(options, 1, 32, 0), [&] {
    const int i = not_before(lane_index());
    store_global(out + i, load_streamed(in + i, load_global(valid + i) != 0));
  });
}

}  // extern "C"
