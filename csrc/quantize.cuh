// From transformed values to codes, the same for every kernel: max -> scale -> codes -> words.
// Everything here also compiles for the host, where the tests check it bit by bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FLATQUANT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLATQUANT_HOST_DEVICE inline
#endif

namespace flatquant {

FLATQUANT_HOST_DEVICE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FLATQUANT_HOST_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// max(|max|, |value|) in which NaN wins. Without their sign, float bits order as unsigned integers
// do, NaN above Inf; sm_80 and later have one instruction for it.
FLATQUANT_HOST_DEVICE float absmax(float max, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(max)), "f"(fabsf(value)));
  return result;
#else
  const uint32_t a = float_bits(max) & 0x7fffffffu, b = float_bits(value) & 0x7fffffffu;
  return bits_float(a > b ? a : b);
#endif
}

// value / 7, correctly rounded for normal results, without the branch of a general division.
FLATQUANT_HOST_DEVICE float divide_by_7(float value) {
  const float quotient = value * (1.0f / 7.0f);
  const float corrected = fmaf(fmaf(-7.0f, quotient, value), 1.0f / 7.0f, quotient);
  return quotient - quotient == 0.0f ? corrected : quotient;  // Inf and NaN stay what they are
}

// 1 / value for normal values with a normal reciprocal, without a branch; exact at powers of two.
FLATQUANT_HOST_DEVICE float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(value));
  return fmaf(guess, fmaf(-value, guess, 1.0f), guess);
#else
  return 1.0f / value;
#endif
}

// How one token is quantised: q = round_half_even(value * inverse), if needs_prepare of
// prepare(value).
struct TokenScale {
  float scale;
  float inverse;
  // Set for the tokens of which a code costs more than one FFMA: those without codes (a maximum of
  // zero, NaN or Inf), a scale whose reciprocal might not be a normal number, and clipping.
  bool needs_prepare;
  bool has_codes = true;
  float factor = 1.0f;  // a power of two
  float limit = 0.0f;   // the scale of prepared values

  FLATQUANT_HOST_DEVICE TokenScale(float token_max, float clip_ratio)
      : scale(divide_by_7(clip_ratio * token_max)) {
    needs_prepare = clip_ratio < 1.0f || !(scale >= 0x1p-100f && scale <= 0x1p100f);
    inverse = reciprocal(scale);
    if (needs_prepare) {
      has_codes = scale > 0.0f && scale - scale == 0.0f;
      if (scale == 0.0f) scale = 1.0f;
      factor = scale < 0x1p-100f ? 0x1p64f : scale > 0x1p100f ? 0x1p-64f : 1.0f;
      limit = scale * factor;
      inverse = has_codes ? reciprocal(limit) : 0.0f;
    }
  }

  // Clamps without clipping too: a subnormal scale may be rounded far down.
  FLATQUANT_HOST_DEVICE float prepare(float value) const {
    return has_codes ? fminf(fmaxf(value * factor, -8.0f * limit), 7.0f * limit) : 0.0f;
  }
};

// round_half_even(value * inverse) in the low bits: the FFMA rounds at the weight of 1 because
// 1.5 * 2^23 has an ulp of 1.
FLATQUANT_HOST_DEVICE uint32_t code_bits(float value, float inverse) {
  return float_bits(fmaf(value, inverse, 0x1.8p23f));
}

// Eight codes as one int4 word. With 8 added, codes are 0..15 and shifted sums do not borrow from
// each other; flipping the top bit of each nibble takes the 8 off again.
FLATQUANT_HOST_DEVICE uint32_t pack_int4(const float (&values)[8], float inverse) {
  uint32_t pairs[4];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) {
    pairs[i] = code_bits(values[2 * i], inverse) + (code_bits(values[2 * i + 1], inverse) << 4);
  }
  const uint32_t sum = pairs[0] + (pairs[1] << 8) + ((pairs[2] + (pairs[3] << 8)) << 16);
  // Each of the eight summands carried the bits of 1.5 * 2^23; the 8s are added in the same step.
  constexpr uint32_t bias = (0x4b400000u - 8u) * 0x11111111u;
  return (sum - bias) ^ 0x88888888u;
}

// Four codes as one word of int8.
FLATQUANT_HOST_DEVICE uint32_t pack_int8(const float (&values)[4], float inverse) {
  return (code_bits(values[0], inverse) & 0xffu) | (code_bits(values[1], inverse) & 0xffu) << 8 |
         (code_bits(values[2], inverse) & 0xffu) << 16 | code_bits(values[3], inverse) << 24;
}

// Four codes as one int4 half word, for what no full word covers.
FLATQUANT_HOST_DEVICE uint16_t pack_int4(const float (&values)[4], float inverse) {
  return static_cast<uint16_t>(
      (code_bits(values[0], inverse) & 0xfu) | (code_bits(values[1], inverse) & 0xfu) << 4 |
      (code_bits(values[2], inverse) & 0xfu) << 8 | (code_bits(values[3], inverse) & 0xfu) << 12);
}

}  // namespace flatquant
