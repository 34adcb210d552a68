// ldmatrix, mma.sync.m16n8k16 and m16n8k8 of TF32, by the fragments of the PTX ISA.
#pragma once

#include <cmath>

#include "async_copies.h"
#include "cuda_emulator.h"
#include "element.h"

namespace emulator {

// ldmatrix.x4.trans.m8n8.b16
inline void ldmatrix_transposed(uint32_t (&d)[4], const void* shared) {
  const uint32_t* rows = machine().exchange(0xffffffffu, shared_address(shared), "ldmatrix");
  const int lane = machine().thread() % warp_size;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = rows[8 * matrix + 2 * (lane % 4) + i];
      if (row % 16 != 0) fail("ldmatrix of a row at %#x, not aligned to 16 bytes", row);
      const unsigned char* element = machine().shared().generic_view(row, 16) + lane / 4 * 2;
      std::memcpy(reinterpret_cast<unsigned char*>(&d[matrix]) + 2 * i, element, 2);
    }
  }
}

// mma.sync.m16n8k16: D (16 x 8, float) += A (16 x 16) @ B (16 x 8).
class Mma {
 public:
  void multiply(ElementType type, float* d, const uint32_t* a, const uint32_t* b) {
    const Operands* const all = exchange(a, b);
    const int lane = machine().thread() % warp_size;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      // In the order of wgmma.h, as hardware gives both the same bits.
      float sum = d[i];
      for (int k = 0; k < 16; ++k) {
        const int quad_lane = k % 8 / 2, shift = k % 2 * 16;
        const uint32_t pair_a = all[row % 8 * 4 + quad_lane].a[row / 8 + k / 8 * 2];
        const uint32_t pair_b = all[col * 4 + quad_lane].b[k / 8];
        sum += to_float(type, static_cast<uint16_t>(pair_a >> shift)) *
               to_float(type, static_cast<uint16_t>(pair_b >> shift));
      }
      d[i] = sum;
    }
  }

  // mma.sync.m16n8k8: D (16 x 8, float) += A (16 x 8) @ B (8 x 8), of whose bits TF32's count. Sums
  // are cut off as hardware does, which float32 is accurate enough to show.
  void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b) {
    const Operands* const all = exchange(a, b);
    const int lane = machine().thread() % warp_size;
    const auto to_float = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < 8; ++k) {
        sum += double{to_float(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2])} *
               to_float(all[col * 4 + k % 4].b[k / 4]);
      }
      d[i] = static_cast<float>(sum);
      if (std::abs(d[i]) > std::abs(sum)) d[i] = std::nextafter(d[i], 0.0f);
    }
  }

 private:
  struct Operands {
    uint32_t a[4], b[2];
  };
  // Those of all lanes of this one's warp.
  const Operands* exchange(const uint32_t* a, const uint32_t* b) {
    const int thread = machine().thread(), lane = thread % warp_size;
    // A lane may be one operation ahead of another that still reads.
    const int set = ahead_[thread] ^= 1;
    Operands* const all = operands_[set] + (thread - lane);
    std::memcpy(all[lane].a, a, sizeof all[lane].a);
    std::memcpy(all[lane].b, b, sizeof all[lane].b);
    machine().exchange(0xffffffffu, 0, "mma");
    return all;
  }
  Operands operands_[2][1024];
  int ahead_[1024] = {};
};

inline Mma& mma_unit() {
  static Mma unit;
  return unit;
}

// Lets the machine's blocks begin and end with these units.
inline void attach_sm80() {
  machine().block_starts = [] { async_copies().block_starts(); };
  machine().block_ended = [] { async_copies().block_ended(); };
}

}  // namespace emulator
