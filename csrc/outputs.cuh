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

// Eight or four neighbouring values of Y, of which the first `count` exist, rounded to `dtype`.
template <int size>
__device__ __forceinline__ void store_values(Dtype dtype, void* all_values, int64_t element,
                                             const float (&values)[size], int count) {
  if (dtype == Dtype::float32) {
    auto* target = static_cast<float*>(all_values) + element;
    if (count >= size && element % 4 == 0) {
#pragma unroll
      for (int i = 0; i < size; i += 4) {
        *reinterpret_cast<float4*>(target + i) =
            make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
      }
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
    if constexpr (size == 8) {
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      *reinterpret_cast<uint2*>(target) = make_uint2(pairs[0], pairs[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i < count) target[i] = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
    }
  }
}

}  // namespace flatquant
