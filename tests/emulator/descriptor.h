// The 64-bit matrix descriptor of wgmma, field by field as the PTX ISA defines it.
#pragma once

#include <cstdint>

namespace emulator {

struct Descriptor {
  uint32_t start;    // byte address in the shared window
  int leading;       // leading-dimension byte offset
  int stride;        // stride-dimension byte offset
  int base_offset;   // 0..7
  int swizzle_span;  // bytes: 128, 64 or 32, 16 without swizzle

  static uint64_t field(uint32_t bytes) { return (bytes & 0x3ffff) >> 4; }

  uint64_t encode() const {
    const uint64_t mode = swizzle_span == 128  ? 1
                          : swizzle_span == 64 ? 2
                          : swizzle_span == 32 ? 3
                                               : 0;
    return field(start) | field(leading) << 16 | field(stride) << 32 |
           static_cast<uint64_t>(base_offset) << 49 | mode << 62;
  }

  static Descriptor decode(uint64_t bits) {
    constexpr int spans[] = {16, 128, 64, 32};
    return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<int>(bits >> 16 & 0x3fff) << 4,
            static_cast<int>(bits >> 32 & 0x3fff) << 4, static_cast<int>(bits >> 49 & 7),
            spans[bits >> 62]};
  }
};

}  // namespace emulator
