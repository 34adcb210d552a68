// The 16-bit elements that tensor cores multiply.
#pragma once

#include <vector>

#include "cuda_emulator.h"

namespace emulator {

enum class ElementType { half, bfloat16 };

inline float to_float(ElementType type, uint16_t bits) {
  static const std::vector<float> halves = [] {
    std::vector<float> table(65536);
    for (int i = 0; i < 65536; ++i) table[i] = __half2float(__half(__half_raw{uint16_t(i)}));
    return table;
  }();
  return type == ElementType::half ? halves[bits] : __uint_as_float(uint32_t{bits} << 16);
}

}  // namespace emulator
