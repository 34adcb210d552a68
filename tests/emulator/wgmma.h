// wgmma.mma_async: D (64 x n, float) = A (64 x 16) @ B (16 x n) (+ D), with 16-bit A and B, B and a
// shared-memory A contiguous along N and M ("MN-major") or B along K, by the fragments and
// canonical layouts of the PTX ISA. A warp's 16 rows are computed some time after its 32 threads
// have issued the operation and before they have waited for it, whatever the other warps of the
// warpgroup do; in between, the accumulators hold NaNs, and a changed register is an error.
#pragma once

#include <deque>
#include <memory>

#include "async_copies.h"
#include "cuda_emulator.h"
#include "descriptor.h"
#include "element.h"
#include "tensor_map.h"

namespace emulator {

struct WgmmaOperation {
  ElementType type;
  int n;
  bool a_in_registers;
  uint64_t a, b;   // descriptors
  bool b_along_k;  // where it is contiguous
  bool accumulate;
  bool operator==(const WgmmaOperation& other) const {
    return type == other.type && n == other.n && a_in_registers == other.a_in_registers &&
           a == other.a && b == other.b && b_along_k == other.b_along_k &&
           accumulate == other.accumulate;
  }
};

class Wgmma {
 public:
  void block_starts() {
    for (Warpgroup& group : groups_) group = Warpgroup();
    for (Warp& warp : warps_) warp = Warp();
    for (ThreadState& thread : threads_) thread = ThreadState();
  }
  void block_ended() {
    for (const ThreadState& thread : threads_) {
      if (!thread.chains.empty()) fail("the block ended before a wgmma was waited for");
    }
  }

  // wgmma.fence: registers written before it may be operands after it. These are the ones the
  // program names; that all others are fenced too is not relied on.
  void fence(const void* registers, size_t bytes) { self().fenced.emplace_back(registers, bytes); }

  // One thread's part; `d` are its n / 2 accumulators, `a` its 4 registers of A if they are there.
  void issue(const WgmmaOperation& operation, float* d, const uint32_t* a) {
    if (operation.n % 8 != 0 || operation.n < 8 || operation.n > 256) fail("wgmma n");
    ThreadState& thread = self();
    Warpgroup& group = own_group();
    Part& part = find_part(thread, group, operation, d);
    Chain& chain = *part.chain;
    if (operation.n != chain.n) fail("wgmma of another shape on accumulators that are in flight");
    check_in_flight(part);
    if (a) check_fenced(thread, a, 4 * sizeof *a);

    const size_t index = part.issued++;
    if (index == chain.operations.size()) chain.operations.push_back({operation, {}, {}, {}});
    Entry& entry = chain.operations[index];
    if (!(entry.operation == operation)) {
      fail("threads of a warpgroup disagree on wgmma %zu of a chain", index);
    }
    const int lane = machine().thread() % warpgroup_size;
    entry.a[lane] = a;
    if (a) std::memcpy(entry.a_then[lane], a, sizeof entry.a_then[lane]);
    if (++entry.issued[lane / warp_size] == warp_size) {
      Warp& warp = own_warp();
      warp.push_back({part.chain, index});
      machine().post([&warp, quarter = lane / warp_size] { execute_next(warp, quarter); });
    }
    if (machine().random().below(4) == 0) machine().yield();
  }

  // wgmma.commit_group
  void commit() {
    for (Part& part : self().chains) {
      part.committed_before = part.committed;
      part.committed = part.issued;
    }
  }

  // wgmma.wait_group 1: for all that the thread has committed but the last group, which must be on
  // the same accumulators, so that those stay in flight.
  void wait_previous() {
    ThreadState& thread = self();
    if (thread.chains.size() != 1) fail("waited for one of several chains of wgmma");
    const Part& part = thread.chains[0];
    wait_for(part, part.committed_before);
  }

  // wgmma.wait_group 0: for all that the thread has committed. `named` are the accumulators that
  // the program names; were there others too, the compiler would not know that they have changed.
  void wait(std::initializer_list<float*> named) {
    ThreadState& thread = self();
    for (Part& part : thread.chains) {
      if (part.committed == 0) continue;
      float* const d = part.d;
      if (std::find(named.begin(), named.end(), d) == named.end()) {
        fail("waited for wgmma whose accumulators are not named");
      }
      Chain& chain = *part.chain;
      const int lane = machine().thread() % warpgroup_size;
      wait_for(part, part.committed);
      if (part.committed < part.issued) continue;
      check_in_flight(part);
      for (const Entry& entry : chain.operations) {
        if (entry.a[lane] && std::memcmp(entry.a[lane], entry.a_then[lane], 16) != 0) {
          fail("a register of A changed while wgmma could read it");
        }
      }
      for (int i = 0; i < chain.n / 2; ++i) d[i] = chain.d[row(lane, i)][column(lane, i)];
      part.d = nullptr;
    }
    auto done = [](const Part& part) { return part.d == nullptr; };
    thread.chains.erase(std::remove_if(thread.chains.begin(), thread.chains.end(), done),
                        thread.chains.end());
    thread.fenced.clear();
  }

 private:
  struct Entry {
    WgmmaOperation operation;
    const uint32_t* a[warpgroup_size];
    uint32_t a_then[warpgroup_size][4];
    int issued[4];  // by threads of each warp
  };
  // Operations on the same accumulators, without a wait in between.
  struct Chain {
    int n;
    std::vector<Entry> operations;
    int joined = 0;
    size_t executed[4] = {};  // by each warp
    WaitQueue queues[4];
    float d[64][256];
  };
  struct Warpgroup {
    std::deque<std::shared_ptr<Chain>> chains;  // that not all threads have started
    size_t first = 0;                           // number of the first of them
  };
  // What a warp has issued and not executed: chains and operations in them.
  using Warp = std::deque<std::pair<std::shared_ptr<Chain>, size_t>>;
  // A thread's part in a chain that it has not waited for.
  struct Part {
    std::shared_ptr<Chain> chain;
    float* d;
    size_t issued = 0, committed = 0, committed_before = 0;
  };
  struct Fenced {
    Fenced(const void* registers, size_t bytes)
        : begin(static_cast<const unsigned char*>(registers)), then(begin, begin + bytes) {}
    const unsigned char* begin;
    std::vector<unsigned char> then;
  };
  struct ThreadState {
    std::vector<Part> chains;
    size_t started = 0;
    std::vector<Fenced> fenced;
  };

  static constexpr uint32_t in_flight = 0xfff5dead;  // a NaN

  // The accumulator fragment: warp w has rows 16 w.., a lane two columns of each eight in two rows.
  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
  static int column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

  static void wait_for(const Part& part, size_t operations) {
    Chain& chain = *part.chain;
    const int quarter = machine().thread() % warpgroup_size / warp_size;
    const size_t& executed = chain.executed[quarter];
    machine().wait(
        chain.queues[quarter],
        [&] {
          return format("wgmma: %zu of %zu done, %d threads of the warp issued the next", executed,
                        operations, chain.operations[executed].issued[quarter]);
        },
        [&] { return executed >= operations; });
  }

  ThreadState& self() { return threads_[machine().thread()]; }
  Warp& own_warp() { return warps_[machine().thread() / warp_size]; }
  Warpgroup& own_group() {
    const int group = machine().thread() / warpgroup_size;
    if ((group + 1) * warpgroup_size > machine().cluster_threads()) {
      fail("wgmma in a partial warpgroup");
    }
    return groups_[group];
  }

  // The thread's part in the chain on `d`; begins one if there is none.
  Part& find_part(ThreadState& thread, Warpgroup& group, const WgmmaOperation& operation,
                  float* d) {
    for (Part& part : thread.chains) {
      if (part.d == d) return part;
    }
    const size_t number = thread.started++ - group.first;
    if (number == group.chains.size()) {
      group.chains.push_back(std::make_shared<Chain>());
      group.chains.back()->n = operation.n;
    }
    thread.chains.push_back({group.chains[number], d});
    Part& part = thread.chains.back();
    if (++part.chain->joined == warpgroup_size) {
      group.chains.pop_front();
      ++group.first;
    }
    check_fenced(thread, d, operation.n / 2 * sizeof *d);
    const int lane = machine().thread() % warpgroup_size;
    for (int i = 0; i < operation.n / 2; ++i) {
      part.chain->d[row(lane, i)][column(lane, i)] = d[i];
      std::memcpy(&d[i], &in_flight, sizeof in_flight);
    }
    return part;
  }

  static void check_fenced(const ThreadState& thread, const void* registers, size_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(registers);
    for (const Fenced& fenced : thread.fenced) {
      if (begin < fenced.begin || begin + bytes > fenced.begin + fenced.then.size()) continue;
      if (std::memcmp(begin, &fenced.then[begin - fenced.begin], bytes) != 0) {
        fail("a register of wgmma was written after the fence");
      }
      return;
    }
    fail("registers of wgmma without a fence");
  }
  static void check_in_flight(const Part& part) {
    for (int i = 0; i < part.chain->n / 2; ++i) {
      if (std::memcmp(&part.d[i], &in_flight, sizeof in_flight) != 0) {
        fail("accumulator %d was written while wgmma had it", i);
      }
    }
  }

  static void execute_next(Warp& warp, int quarter) {
    const auto [chain, index] = warp.front();
    warp.pop_front();
    execute(*chain, chain->operations[index], quarter);
    ++chain->executed[quarter];
    machine().notify(chain->queues[quarter]);
  }

  // Element (mn, k) of an operand with a swizzle span of W 16-byte chunks of T elements, the
  // swizzle on the address that this gives: an MN-major one
  // ((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO)), a K-major one
  // ((8, m), (T, W)) : ((W T, SBO), (1, T)).
  static uint16_t element(const Descriptor& matrix, int mn, int k, bool along_k = false) {
    const int span = matrix.swizzle_span, in_span = mn * 2 % span, panel = mn * 2 / span;
    const uint32_t offset =
        along_k ? mn / 8 * matrix.stride + mn % 8 * span + k * 2
                : panel * matrix.leading + k / 8 * matrix.stride + k % 8 * span + in_span;
    uint16_t bits;
    const uint32_t address = swizzle(matrix.start + offset, span);
    std::memcpy(&bits, machine().shared().async_view(address, 2), 2);
    return bits;
  }

  static Descriptor decode(uint64_t bits, bool along_k = false) {
    const Descriptor matrix = Descriptor::decode(bits);
    if (matrix.encode() != bits) fail("reserved bits in wgmma descriptor %#llx", 0ull + bits);
    if (matrix.swizzle_span == 16) fail("wgmma operand without swizzle: not modelled");
    // Then base_offset is 0 by definition; an operand that starts inside the pattern is not
    // modelled, but for a K-major one that starts inside its first row.
    const uint32_t into_pattern = matrix.start % (8 * matrix.swizzle_span);
    const bool starts = along_k ? into_pattern < static_cast<uint32_t>(matrix.swizzle_span) &&
                                      into_pattern % 32 == 0
                                : into_pattern == 0;
    if (matrix.base_offset != 0 || !starts) {
      fail("wgmma operand at %#x with base offset %d does not start a swizzle pattern",
           matrix.start, matrix.base_offset);
    }
    return matrix;
  }

#if defined(__GNUC__) && !defined(__clang__)
  __attribute__((optimize("O3")))
#endif
  static void execute(Chain& chain, const Entry& entry, int quarter) {
    const WgmmaOperation& operation = entry.operation;
    const int n = operation.n, first_row = 16 * quarter;
    float a[16][16], b[16][256];
    if (operation.a_in_registers) {
      // Registers 0..3 hold two k each: rows lane / 4 and + 8, then the same eight k further on.
      for (int lane = 0; lane < warp_size; ++lane) {
        const uint32_t* registers = entry.a[quarter * warp_size + lane];
        for (int i = 0; i < 8; ++i) {
          const int m = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
          const uint32_t bits = registers[i / 2] >> i % 2 * 16;
          a[m][k] = to_float(operation.type, static_cast<uint16_t>(bits));
        }
      }
    } else {
      const Descriptor matrix = decode(operation.a);
      for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
          a[m][k] = to_float(operation.type, element(matrix, first_row + m, k));
        }
      }
    }
    const Descriptor matrix = decode(operation.b, operation.b_along_k);
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < n; ++col) {
        b[k][col] = to_float(operation.type, element(matrix, col, k, operation.b_along_k));
      }
    }
    for (int m = 0; m < 16; ++m) {
      float* d = chain.d[first_row + m];
      for (int col = 0; col < n; ++col) d[col] = operation.accumulate ? d[col] : 0.0f;
      for (int k = 0; k < 16; ++k) {
        for (int col = 0; col < n; ++col) d[col] += a[m][k] * b[k][col];
      }
    }
  }

  Warpgroup groups_[8];
  Warp warps_[32];
  ThreadState threads_[1024];
};

inline Wgmma& wgmma_unit() {
  static Wgmma instance;
  return instance;
}

// Makes the units of sm_90 follow the blocks of the machine.
inline void attach_sm90() {
  machine().block_starts = [] {
    async_copies().block_starts();
    bulk_stores().block_starts();
    mbarriers().block_starts();
    wgmma_unit().block_starts();
  };
  machine().block_ended = [] {
    async_copies().block_ended();
    wgmma_unit().block_ended();
  };
}

}  // namespace emulator
