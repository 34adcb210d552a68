// What is stored of a token: codes by the scale of an output, or Y itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"
#include "quantize.cuh"

namespace flatquant {

// The clip ratios of an output, wherever they are.
struct Ratios {
  float max, min;

  __device__ explicit Ratios(const Output& output)
      : max(output.device_max_ratio ? *output.device_max_ratio : output.max_ratio),
        min(output.device_min_ratio ? *output.device_min_ratio : output.min_ratio) {}

  // `has_lanes`: whether the caller knows Clamp::lanes.
  __device__ TokenScale scale(const Extremes& extremes, bool has_lanes) const {
    return TokenScale(absmax(max * extremes.above(), min * extremes.below()), max, min, has_lanes);
  }
};

__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// `count` 32-bit words (1, 2, 4 or 8) to global memory, at an address aligned to their size, 16
// bytes at most, if `condition` holds. As predicated instructions: a branch would take the
// computation of the words with it and cost more than it.
template <int count>
__device__ __forceinline__ void store_if(bool condition, void* global,
                                         const uint32_t (&words)[count]) {
#if defined(__CUDA_ARCH__)
  const int predicate = condition;
  if constexpr (count == 1) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b32 [%1], %2;}" ::"r"(predicate),
        "l"(global), "r"(words[0])
        : "memory");
  } else if constexpr (count == 2) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"(
                     predicate),
                 "l"(global), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else if constexpr (count == 4) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(
            predicate),
        "l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
  } else {
    static_assert(count == 8);
    store_if(condition, global, {words[0], words[1], words[2], words[3]});
    store_if(condition, static_cast<uint4*>(global) + 1, {words[4], words[5], words[6], words[7]});
  }
#else
  struct alignas(count < 4 ? 4 * count : 16) Vector {  // as -fsanitize=alignment checks it
    uint32_t words[count];
  } vector;
  std::memcpy(&vector, words, sizeof words);
  if (condition) *static_cast<Vector*>(global) = vector;
#endif
}
__device__ __forceinline__ void store_if(bool condition, void* global, uint16_t half_word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b16 [%1], %2;}" ::"r"(
                   static_cast<int>(condition)),
               "l"(global), "h"(half_word)
               : "memory");
#else
  if (condition) *static_cast<uint16_t*>(global) = half_word;
#endif
}

// Eight, four or two neighbouring values of Y, of which the first `count` exist, rounded to
// `dtype`.
template <int size>
__device__ __forceinline__ void store_values(Dtype dtype, void* all_values, int64_t element,
                                             const float (&values)[size], int count) {
  if (dtype == Dtype::float32) {
    auto* target = static_cast<float*>(all_values) + element;
    if (count >= size && element % (size < 4 ? size : 4) == 0) {
      uint32_t words[size];
#pragma unroll
      for (int i = 0; i < size; ++i) words[i] = float_bits(values[i]);
      store_if(true, target, words);
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (i < count) target[i] = values[i];
      }
    }
    return;
  }
  uint32_t pairs[size / 2];
#pragma unroll
  for (int i = 0; i < size / 2; ++i) {
    pairs[i] = dtype == Dtype::float16
                   ? pack_pair(__half(), values[2 * i], values[2 * i + 1])
                   : pack_pair(__nv_bfloat16(), values[2 * i], values[2 * i + 1]);
  }
  auto* target = static_cast<uint16_t*>(all_values) + element;
  if (count >= size && element % size == 0) {
    store_if(true, target, pairs);
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i < count) target[i] = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
    }
  }
}

}  // namespace flatquant
