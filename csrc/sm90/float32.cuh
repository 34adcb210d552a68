// float32 in the sm90 kernel: each matrix, times a power of two that brings it into float16's
// range, is the sum of two float16 matrices (or rounded to one, see Config), and a product that of
// their products but for the smallest. A token is split in place, by its group, once it has
// arrived. One whose Y lies so far below what its X and the factors could make that float16's
// smallest number would show is computed again exactly.
#pragma once

#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm90/block.cuh"
#include "sm90/config.h"
#include "sm90/factors.cuh"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

// The exponent of the power of two that brings `magnitude` just below 2^top; that or a little less
// where the power would be too large. Any for NaN and Inf.
__device__ __forceinline__ int scale_exponent(float magnitude, int top) {
  const int exponent = 126 + top - static_cast<int>(float_bits(magnitude) >> 23);
  return magnitude == 0.0f ? 0 : exponent > 126 ? 126 : exponent;
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float((exponent + 127) << 23);
}

// A pair of values as the sum of `parts` pairs of float16.
template <int parts>
__device__ __forceinline__ void split_pair(uint32_t (&pairs)[parts], float low, float high) {
  pairs[0] = pack_pair(__half(), low, high);
  if constexpr (parts == 2) {
    const float2 rounded = __half22float2(reinterpret_cast<const __half2&>(pairs[0]));
    pairs[1] = pack_pair(__half(), low - rounded.x, high - rounded.y);
  }
}

// Below which powers of two tokens and factors are brought: W, of up to 128 products, then stays in
// float16's range.
constexpr int token_top = 4, left_top = 4, right_top = 15;

// Where max|Y| so scaled is less, the 2^-25 that an element may lose to float16's smallest number
// could show in Y by more than 2^-18 of max|Y|: a factor undoes what some rows of its operand have
// too much of. Orthogonal factors keep max|Y| eight times larger, even with tokens of one outlier.
__device__ __forceinline__ float least_magnitude(const Problem& problem) {
  return problem.right == nullptr ? 0x1p1f : 0x1p16f;
}

// To the same element of each part, `part_bytes` apart.
template <class Config>
__device__ __forceinline__ void store_split(unsigned char* matrix, int part_bytes, int element,
                                            float low, float high) {
  uint32_t pairs[Config::parts];
  split_pair(pairs, low, high);
#pragma unroll
  for (int i = 0; i < Config::parts; ++i) {
    *reinterpret_cast<uint32_t*>(matrix + i * part_bytes + 2 * element) = pairs[i];
  }
}

// Brings both factors to shared memory, scaled and split. Returns the sum of the scales' exponents.
template <class Config>
__device__ int stage_split_factors(const Problem& problem, const SharedMemory<Config>& shared) {
  uint32_t* const magnitudes = shared.storage->factor_magnitudes;
  if (threadIdx.x < 2) magnitudes[threadIdx.x] = 0;
  __syncthreads();
  const auto find_magnitude = [&](const void* factor, int size, uint32_t* magnitude) {
    Magnitude largest{factor == nullptr ? 1.0f : 0.0f};
#pragma unroll 8
    for (int i = threadIdx.x; factor != nullptr && i < size * size; i += Config::threads) {
      largest.include({static_cast<const float*>(factor)[i]});
    }
    largest = warp_reduce(largest);
    if (threadIdx.x % 32 == 0) atomicMax(magnitude, float_bits(largest.max));
  };
  find_magnitude(problem.left, problem.left_size(), &magnitudes[0]);
  find_magnitude(problem.right, problem.right_size(), &magnitudes[1]);
  __syncthreads();
  const int left_exponent = scale_exponent(bits_float(magnitudes[0]), left_top);
  const float left_scale = power_of_two(left_exponent);
  for_each<Config, Config::depth, 32 * Config::row_tiles>([&](int k, int pair) {
    store_split<Config>(shared.left, Config::left_bytes, left_position<Config>(k, 2 * pair),
                        left_scale * left_element<float>(problem, k, 2 * pair),
                        left_scale * left_element<float>(problem, k, 2 * pair + 1));
  });
  if (problem.right == nullptr) return left_exponent;  // W is Y
  const int right_exponent = scale_exponent(bits_float(magnitudes[1]), right_top);
  const float right_scale = power_of_two(right_exponent);
  for_each<Config, Config::cols, Config::cols / 2>([&](int k, int pair) {
    store_split<Config>(shared.right, Config::right_bytes, right_position<Config>(k, 2 * pair),
                        right_scale * right_element<float>(problem, k, 2 * pair),
                        right_scale * right_element<float>(problem, k, 2 * pair + 1));
  });
  return left_exponent + right_exponent;
}

// How a float32 token was scaled.
struct TokenSplit {
  int exponent;
  bool is_zero;
};

// Scales and splits a token that has arrived, in place.
template <class Config>
__device__ TokenSplit split_token(unsigned char* stage, const SharedMemory<Config>& shared,
                                  int group) {
  constexpr int quads = Config::depth * Config::cols / 4 / Config::group_threads;
  static_assert(quads * 4 * Config::group_threads == Config::depth * Config::cols);
  const int thread = threadIdx.x % Config::group_threads;
  float4 values[quads];
  Magnitude magnitude;
#pragma unroll
  for (int i = 0; i < quads; ++i) {
    values[i] = reinterpret_cast<const float4*>(stage)[thread + i * Config::group_threads];
    magnitude.include({values[i].x});
    magnitude.include({values[i].y});
    magnitude.include({values[i].z});
    magnitude.include({values[i].w});
  }
  // Past its barrier all of the token is in registers.
  magnitude = reduce_group<Config>(magnitude, shared.storage->token_magnitudes[group], group);
  const int exponent = scale_exponent(magnitude.max, token_top);
  const float scale = power_of_two(exponent);
#pragma unroll
  for (int i = 0; i < quads; ++i) {
    const int element = 4 * (thread + i * Config::group_threads);
    const int offset =
        Panel::offset(Config::width, Config::depth, element / Config::cols, element % Config::cols);
    uint32_t low[Config::parts], high[Config::parts];
    split_pair(low, scale * values[i].x, scale * values[i].y);
    split_pair(high, scale * values[i].z, scale * values[i].w);
#pragma unroll
    for (int part = 0; part < Config::parts; ++part) {
      *reinterpret_cast<uint2*>(stage + part * Config::part_bytes + 2 * offset) =
          make_uint2(low[part], high[part]);
    }
  }
  fence_proxy_async();
  named_barrier_sync(group, Config::group_threads);
  return {exponent, magnitude.max == 0.0f};
}

// Takes the scales off Y again. Returns below which max|Y| the token is to be computed again; Y is
// NaN where float32 has no such power of two.
template <class Config>
__device__ __forceinline__ float scale_back(float (&y)[Config::n / 2], const TokenSplit& token,
                                            int factor_exponents, const Problem& problem) {
  const int exponent = -(token.exponent + factor_exponents);
  const float scale = exponent >= -126 && exponent <= 127 ? power_of_two(exponent) : NAN;
#pragma unroll
  for (float& value : y) value *= scale;
  return token.is_zero ? 0.0f : scale * least_magnitude(problem);
}

}  // namespace flatquant::sm90
