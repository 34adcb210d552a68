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

// The largest magnitude of values, NaN if there is one; and below the extremes: what a kernel
// reduces a token to.
struct Magnitude {
  float max = 0.0f;

  FLATQUANT_HOST_DEVICE void include(const Magnitude& other) { max = absmax(max, other.max); }
  FLATQUANT_HOST_DEVICE float magnitude() const { return max; }
};

// The largest and the smallest of values, or of none: as float bits, which order as signed integers
// do where they are positive and as unsigned ones where they are negative. NaN lies beyond Inf on
// either side.
struct Extremes {
  int32_t high = 0;  // the largest, or +0
  uint32_t low = 0;  // the smallest where that is negative

  FLATQUANT_HOST_DEVICE void include(float value) {
    const uint32_t bits = float_bits(value);
    if (static_cast<int32_t>(bits) > high) high = static_cast<int32_t>(bits);
    if (bits > low) low = bits;
  }
  FLATQUANT_HOST_DEVICE void include(const Extremes& other) {
    if (other.high > high) high = other.high;
    if (other.low > low) low = other.low;
  }
  // max(value, 0), and max(-value, 0), of all values.
  FLATQUANT_HOST_DEVICE float above() const { return bits_float(static_cast<uint32_t>(high)); }
  FLATQUANT_HOST_DEVICE float below() const {
    return bits_float(low >= 0x80000000u ? low & 0x7fffffffu : 0u);
  }
  FLATQUANT_HOST_DEVICE float magnitude() const { return absmax(above(), below()); }
};

// What values outside of -8..7 steps ask for. `saturated` serves all; the others are cheaper:
// `none` where there are no such values, `lanes` up to 2^15 steps.
enum class Clamp : int { none, lanes, saturated };

// How one token is quantised: code_bits() of its values, clamped.
struct TokenScale {
  float scale;
  float inverse;
  // Which Clamp is enough, as two flags: of one of three values the compiler makes a jump table.
  bool clamps;     // not Clamp::none
  bool saturates;  // Clamp::saturated
  // For Clamp::saturated: factor is a power of two, inverse that of scale * factor * 32.
  float factor = 1.0f;
  float multiplier = 32.0f;
  float constant = 0x1.8p23f - 16.0f;

  // `scaled` is the largest of the ratios times their extremes. `has_lanes`: whether the caller
  // knows Clamp::lanes. No value is further than 7 / ratio steps from zero. 7.47 (15/16) still
  // rounds to 7 and -8.45 (53/64) to -8, so that nothing has to be clamped.
  FLATQUANT_HOST_DEVICE TokenScale(float scaled, float max_ratio, float min_ratio, bool has_lanes)
      : scale(divide_by_7(scaled)) {
    const bool is_ordinary = scale >= 0x1p-100f && scale <= 0x1p100f;
    clamps = !(max_ratio >= 15.0f / 16 && min_ratio >= 53.0f / 64);
    saturates = !(is_ordinary && (has_lanes ? fminf(max_ratio, min_ratio) >= 0x1p-12f : !clamps));
    clamps = clamps || saturates;
    inverse = reciprocal(scale);
    if (saturates) {
      // A scale without a normal reciprocal, or none: a maximum of zero, NaN or Inf.
      const bool has_codes = scale > 0.0f && scale - scale == 0.0f;
      if (scale == 0.0f) scale = 1.0f;
      factor = scale < 0x1p-100f ? 0x1p64f : scale > 0x1p100f ? 0x1p-64f : 1.0f;
      inverse = has_codes ? reciprocal(scale * factor) * 0x1p-5f : 0.0f;
      if (!has_codes) {
        multiplier = 0.0f;
        constant = 0x1.8p23f;
      }
    }
  }
};

// a * b + c between 0 and 1; 0 if NaN.
FLATQUANT_HOST_DEVICE float saturated_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
#else
  const float result = fmaf(a, b, c);
  return result > 0.0f ? result < 1.0f ? result : 1.0f : 0.0f;
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FLATQUANT_HAS_LANES 1  // clamps two 16-bit lanes in one instruction
#else
#define FLATQUANT_HAS_LANES 0
#endif

// round_half_even(value / scale) in the low bits: the FFMA rounds at the weight of 1 because
// 1.5 * 2^23 has an ulp of 1. In -16..16 if saturated, in -8..7 if clamped here.
// `offset`, an even number, is added to the code where it is not clamped.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE uint32_t code_bits(float value, const TokenScale& scale, float offset = 0) {
  const float code = clamp == Clamp::saturated
                         ? fmaf(saturated_fma(value * scale.factor, scale.inverse, 0.5f),
                                scale.multiplier, scale.constant)
                         : fmaf(value, scale.inverse, 0x1.8p23f + offset);
  const uint32_t bits = float_bits(code);
  if constexpr (clamp == Clamp::none || FLATQUANT_HAS_LANES) return bits;
  constexpr uint32_t lowest = 0x4b400000u - 8u, highest = 0x4b400000u + 7u;
  return bits < lowest ? lowest : bits > highest ? highest : bits;
}

#if FLATQUANT_HAS_LANES
// Two codes plus 8, clamped to 0..15, in the halves of a word.
__device__ __forceinline__ uint32_t clamped_lanes(uint32_t low, uint32_t high) {
  return __viaddmin_s16x2_relu(__byte_perm(low, high, 0x5410), 0x00080008u, 0x000f000fu);
}
#endif

// Eight codes as one int4 word.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE uint32_t pack_int4(const float (&values)[8], const TokenScale& scale) {
  // With 8 added, codes are 0..15 and shifted sums do not borrow from each other; flipping the top
  // bit of each nibble takes the 8 off again. Each of the eight summands carries the bits of
  // 1.5 * 2^23; what turns their sum into that of the 8s is added to two of the codes where they
  // are not clamped, and at the end where they are.
  constexpr uint32_t bias = (0x4b400000u - 8u) * 0x11111111u;
  constexpr float offsets[] = {static_cast<float>(-bias & 0xffffu),
                               static_cast<float>(-bias >> 16)};
  static_assert((-bias & 0x10001u) == 0, "rounding half to even needs even offsets");
  uint32_t bits[8];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 8; ++i) {
    const bool has_offset = clamp == Clamp::none && i % 4 == 0;
    bits[i] = code_bits<clamp>(values[i], scale, has_offset ? offsets[i / 4] : 0.0f);
  }
#if FLATQUANT_HAS_LANES
  if constexpr (clamp != Clamp::none) {
    const uint32_t sum =
        clamped_lanes(bits[0], bits[4]) + (clamped_lanes(bits[1], bits[5]) << 4) +
        ((clamped_lanes(bits[2], bits[6]) << 8) + (clamped_lanes(bits[3], bits[7]) << 12));
    return sum ^ 0x88888888u;
  }
#endif
  const uint32_t pairs[4] = {bits[0] + (bits[1] << 4), bits[2] + (bits[3] << 4),
                             bits[4] + (bits[5] << 4), bits[6] + (bits[7] << 4)};
  const uint32_t sum = pairs[0] + (pairs[1] << 8) + ((pairs[2] + (pairs[3] << 8)) << 16);
  return (clamp == Clamp::none ? sum : sum - bias) ^ 0x88888888u;
}

// Four codes as one word of int8.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE uint32_t pack_int8(const float (&values)[4], const TokenScale& scale) {
  uint32_t bits[4];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) bits[i] = code_bits<clamp>(values[i], scale);
#if FLATQUANT_HAS_LANES
  if constexpr (clamp != Clamp::none) {
    const uint32_t sum = clamped_lanes(bits[0], bits[2]) + (clamped_lanes(bits[1], bits[3]) << 8);
    return (sum + 0x78787878u) ^ 0x80808080u;
  }
#endif
  return (bits[0] & 0xffu) | (bits[1] & 0xffu) << 8 | (bits[2] & 0xffu) << 16 | bits[3] << 24;
}

// Two neighbouring codes of each of two rows: as an int4 byte of each row, in the low bytes of
// `rows`.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE void pack_int4_pairs(uint32_t (&rows)[2], const float (&even)[2],
                                           const float (&odd)[2], const TokenScale& scale) {
  // With 8 added they do not borrow from each other, see pack_int4.
  constexpr float offset = clamp == Clamp::none ? 8.0f : 0.0f;
  uint32_t low[2], high[2];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 2; ++i) {
    low[i] = code_bits<clamp>(even[i], scale, offset);
    high[i] = code_bits<clamp>(odd[i], scale, offset);
  }
#if FLATQUANT_HAS_LANES
  if constexpr (clamp != Clamp::none) {
    rows[0] = (clamped_lanes(low[0], low[1]) + (clamped_lanes(high[0], high[1]) << 4)) ^ 0x880088u;
    rows[1] = rows[0] >> 16;
    return;
  }
#endif
  constexpr uint32_t rest = clamp == Clamp::none ? 0x00u : 0x88u;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 2; ++i) rows[i] = (low[i] + (high[i] << 4) + rest) ^ 0x88u;
}

// The same as two int8 bytes of each row, in the low halves of `rows`.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE void pack_int8_pairs(uint32_t (&rows)[2], const float (&even)[2],
                                           const float (&odd)[2], const TokenScale& scale) {
  rows[0] = pack_int8<clamp>({even[0], odd[0], even[1], odd[1]}, scale);
  rows[1] = rows[0] >> 16;
}

// Four codes as one int4 half word, for what no full word covers.
template <Clamp clamp>
FLATQUANT_HOST_DEVICE uint16_t pack_int4(const float (&values)[4], const TokenScale& scale) {
  const float eight[8] = {values[0], values[1], values[2], values[3]};
  return static_cast<uint16_t>(pack_int4<clamp>(eight, scale));
}

}  // namespace flatquant
