// Neighbouring elements of a tensor on their way from memory to float registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantize.cuh"

namespace flatquant {

// As they lie in memory; one load brings up to 16 bytes.
template <class Element, int count>
struct alignas(count * sizeof(Element) < 16 ? count * sizeof(Element) : 16) Elements {
  uint32_t words[count * sizeof(Element) / 4];
};

template <int count>
__device__ __forceinline__ void to_floats(float (&values)[count],
                                          const Elements<float, count>& elements) {
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = bits_float(elements.words[i]);
}
template <int count>
__device__ __forceinline__ void to_floats(float (&values)[count],
                                          const Elements<__half, count>& elements) {
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(elements.words[i / 2]));
    values[i] = pair.x;
    values[i + 1] = pair.y;
  }
}
template <int count>
__device__ __forceinline__ void to_floats(float (&values)[count],
                                          const Elements<__nv_bfloat16, count>& elements) {
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    values[i] = bits_float(elements.words[i / 2] << 16);
    values[i + 1] = bits_float(elements.words[i / 2] & 0xffff0000u);
  }
}

// From an address that is aligned as Elements is.
template <int count, class Element>
__device__ __forceinline__ Elements<Element, count> load(const Element* from) {
  return *reinterpret_cast<const Elements<Element, count>*>(from);
}
// From any address, and only the first `existing`; the rest are zeros.
template <int count, class Element>
__device__ __forceinline__ Elements<Element, count> load_up_to(const Element* from, int existing) {
  Elements<Element, count> elements = {};
  if constexpr (sizeof(Element) == 4) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i < existing) elements.words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  } else {
    uint32_t halves[count] = {};  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i < existing) halves[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
#pragma unroll
    for (int i = 0; i < count; i += 2) elements.words[i / 2] = halves[i] | halves[i + 1] << 16;
  }
  return elements;
}

}  // namespace flatquant
