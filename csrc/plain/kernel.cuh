// Quantisation alone, Y = X: any number of features (problem.cols, in one row), all dtypes, and it
// runs on sm_60.
// A token belongs to one warp or to all of a block (config.h). Its threads load octets, eight
// neighbouring elements, into registers; reduce the extremes, by shuffles and, where there are
// several warps, through shared memory; and store the octets' codes for each output, an int4 word
// or two of int8 at a time. Only tokens too long for the registers are read twice, in chunks. Bound
// by memory: many loads are on their way at once, in blocks that are at different stages.
#pragma once

#include "elements.cuh"
#include "outputs.cuh"
#include "plain/config.h"
#include "problem.h"
#include "quantize.cuh"

namespace flatquant::plain {

// Of all of a token's threads. `warp_extremes` has a place for each warp of the block; the block is
// one token's if `warps`, the token's, are several.
__device__ __forceinline__ Extremes token_extremes(Extremes extremes, int2* warp_extremes,
                                                   int warps) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    extremes.include(Extremes{__shfl_xor_sync(0xffffffffu, extremes.high, lanes),
                              __shfl_xor_sync(0xffffffffu, extremes.low, lanes)});
  }
  if (warps == 1) return extremes;
  if (threadIdx.x % 32 == 0) {
    warp_extremes[threadIdx.x / 32] = make_int2(extremes.high, static_cast<int>(extremes.low));
  }
  __syncthreads();
  for (int warp = 0; warp < warps; ++warp) {
    const int2 other = warp_extremes[warp];
    extremes.include(Extremes{other.x, static_cast<uint32_t>(other.y)});
  }
  return extremes;
}

// Keeps the compiler from computing what follows from `word` before this point.
__device__ __forceinline__ void hide(uint32_t& word) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(word));
#endif
}

// Eight codes as int8, of which the first `count` exist.
__device__ __forceinline__ void store_int8(uint8_t* to, uint2 codes, int count) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) to[i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
  }
}

// The codes of a thread's octets, every threads-th of a token's, the first at feature `first`.
template <Clamp clamp, class Element, int size>
__device__ __forceinline__ void store_codes(const Elements<Element, 8> (&octets)[size],
                                            const TokenScale& scale, Storage storage, void* codes,
                                            int64_t token, int features, int first, int threads) {
  const int64_t element = token * features + first;
  const int left = features - first;
  float values[8];
  if (storage == Storage::int32) {
    uint32_t* const words = static_cast<uint32_t*>(codes) + element / 8;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (8 * i * threads >= left) break;
      to_floats(values, octets[i]);
      words[i * threads] = pack_int4<clamp>(values, scale);
    }
  } else {
    uint8_t* const bytes = static_cast<uint8_t*>(codes) + element;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (8 * i * threads >= left) break;
      to_floats(values, octets[i]);
      const uint2 eight =
          make_uint2(pack_int8<clamp>({values[0], values[1], values[2], values[3]}, scale),
                     pack_int8<clamp>({values[4], values[5], values[6], values[7]}, scale));
      store_int8(bytes + 8 * i * threads, eight, left - 8 * i * threads);
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(max_threads, 2) kernel(const Problem problem, const int chunks) {
  extern __shared__ int2 warp_extremes[];
  constexpr int size = thread_octets(sizeof(Element));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= problem.tokens) return;  // a whole warp, in a block that does not synchronise

  const int features = problem.cols;
  const auto* const x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const bool in_octets = features % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int chunk_features = 8 * size * threads;

  Extremes extremes;
  for (int step = 0; step < 2 * chunks - 1; ++step) {
    // First all chunks for the extremes, then back from the last, which still is in the registers.
    const int chunk = smaller(step, 2 * (chunks - 1) - step);
    const int first = chunk * chunk_features + 8 * thread;

    const Element* from = x + first;
    Elements<Element, 8> octets[size] = {};
    if (in_octets) {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (8 * i * threads < features - first) octets[i] = load<8>(from);
        from += 8 * threads;
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        octets[i] = load_up_to<8>(from, features - first - 8 * i * threads);
        from += 8 * threads;
      }
    }

    if (step < chunks) {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        float values[8];
        to_floats(values, octets[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) extremes.include(values[j]);
      }
    }
    if (step < chunks - 1) continue;
    if (step == chunks - 1) extremes = token_extremes(extremes, warp_extremes, threads / 32);

#pragma unroll 1
    for (int i = 0; i < problem.output_count; ++i) {
      const Output& output = problem.outputs[i];
      const TokenScale scale = Ratios(output).scale(extremes, false);
      if (step == chunks - 1 && thread == 0) output.scales[token] = scale.scale;
      // Converted and indexed once for all outputs, octets would take more registers than there
      // are.
#pragma unroll
      for (auto& octet : octets) {
#pragma unroll
        for (uint32_t& word : octet.words) hide(word);
      }
      uint32_t begin = first;
      hide(begin);
      if (!scale.clamps) {
        store_codes<Clamp::none>(octets, scale, problem.storage, output.codes, token, features,
                                 begin, threads);
      } else {
        store_codes<Clamp::saturated>(octets, scale, problem.storage, output.codes, token, features,
                                      begin, threads);
      }
    }
  }
}

}  // namespace flatquant::plain
