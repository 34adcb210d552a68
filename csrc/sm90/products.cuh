// The two products of the sm90 kernel, of a warpgroup's 64 rows.
#pragma once

#include "fragment.cuh"
#include "sm90/config.h"
#include "sm90/float32.cuh"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

// Calls multiply(a's part, b's part) for the products that count, the largest last.
template <class Config, class Multiply>
__device__ __forceinline__ void for_each_product(Multiply multiply) {
#pragma unroll
  for (int sum = Config::parts - 1; sum >= 0; --sum) {
#pragma unroll
    for (int part = 0; part <= sum; ++part) multiply(part, sum - part);
  }
}

// Starts W = left^T @ X for 64 rows, or adds what a slice of X or a part of its k gives; or V^T =
// right^T @ X^T for 64 columns. Accumulator 4 * block + 2 * half + e of a lane is row lane / 4 + 8
// * half of its warp's 16, column 8 * block + 2 * (lane % 4) + e.
template <class Config, int first_k = 0, int last_k = Config::slice_k>
__device__ void start_first_product(float (&w)[Config::n / 2], uint64_t factor, uint64_t slice,
                                    bool accumulate = false) {
  using Operand = typename Config::Operand;
  constexpr Major major = Config::is_transposed ? Major::k : Major::n;
  for_each_product<Config>([&](int a, int b) {
#pragma unroll
    for (int k = first_k; k < last_k; k += 16) {
      wgmma<Operand, Config::n, major>(w, advance(factor, a * Config::a_bytes + k * 64 * 2),
                                       advance(slice, b * Config::part_bytes + Config::k_bytes(k)),
                                       accumulate);
      accumulate = true;
    }
  });
  wgmma_commit();
}

// Y = W @ right for 64 rows: an accumulator of W is, in the same order, an A fragment. Or Y^T =
// V^T @ left for 64 columns. Calls meanwhile() while it is at work, and waits for it and for the
// product that this started in `others`.
template <class Config, class Meanwhile, class... Others>
__device__ void second_product(float (&y)[Config::n / 2], float (&w)[Config::n / 2],
                               uint64_t factor, Meanwhile meanwhile, Others&... others) {
  using Operand = typename Config::Operand;
  constexpr int size = Config::n / 4;
  uint32_t a[Config::parts * size];
#pragma unroll
  for (int i = 0; i < size; ++i) {
    if constexpr (Config::is_float32) {
      uint32_t pairs[Config::parts];
      split_pair(pairs, w[2 * i], w[2 * i + 1]);
#pragma unroll
      for (int part = 0; part < Config::parts; ++part) a[part * size + i] = pairs[part];
    } else {
      a[i] = pack_pair(Operand(), w[2 * i], w[2 * i + 1]);
    }
  }
  wgmma_begin(a, y);
  bool accumulate = false;
  for_each_product<Config>([&](int part, int b) {
#pragma unroll
    for (int k = 0; k < Config::n; k += 16) {
      wgmma<Operand, Config::n>(y, a + part * size + k / 4,
                                advance(factor, b * Config::b_bytes + k * Config::b_width * 2),
                                accumulate);
      accumulate = true;
    }
  });
  wgmma_commit();
  meanwhile();
  wgmma_wait(y, others...);
}

}  // namespace flatquant::sm90
