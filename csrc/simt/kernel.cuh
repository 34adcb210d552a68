// The CUDA-core kernel: any rows and cols, all dtypes, no tensor core, and it runs on sm_60 (newer
// builds use max.NaN, see quantize.cuh).
// A block works on one token at a time. For a chunk of columns at a time
//   U = X @ right[:, chunk]     into shared memory, float
//   Y[:, chunk] = left^T @ U
// each a product in 64 x 32 tiles, a thread holding eight rows of one column. Y stays in shared
// memory until the token's maximum is known; where it does not fit, a second pass computes it
// again. Bound by FMA and shared-memory loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"
#include "quantize.cuh"
#include "simt/config.h"

namespace flatquant::simt {

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

struct SharedMemory {
  float* a;            // (tile_depth, a_pitch): a tile of the first operand, rows contiguous
  float* b;            // (tile_depth, tile_cols)
  float* maxima;       // one for each warp
  float* u;            // (rows, chunk_cols)
  float* transformed;  // (rows, cols), if kept

  __device__ SharedMemory(float* base, int rows, int chunk_cols)
      : a(base),
        b(a + tile_depth * a_pitch),
        maxima(b + tile_depth * tile_cols),
        u(maxima + threads / 32),
        transformed(u + rows * chunk_cols) {}
};

// acc[i] = sum over k of a(k, row + i) * b(k, col) for this thread's eight rows of the tile and its
// column. The loaders return 0 outside their matrix. k_contiguous: neighbouring k of `a` are
// neighbours in memory, else neighbouring rows are.
template <bool k_contiguous, class LoadA, class LoadB>
__device__ void multiply_tile(float (&acc)[8], const SharedMemory& shared, int depth, LoadA load_a,
                              LoadB load_b) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
  for (int k0 = 0; k0 < depth; k0 += tile_depth) {
    __syncthreads();  // the last tile has been used
    for (int i = threadIdx.x; i < tile_rows * tile_depth; i += threads) {
      const int k = k_contiguous ? i % tile_depth : i / tile_rows;
      const int row = k_contiguous ? i / tile_depth : i % tile_rows;
      shared.a[k * a_pitch + row] = load_a(k0 + k, row);
    }
    for (int i = threadIdx.x; i < tile_depth * tile_cols; i += threads) {
      shared.b[i] = load_b(k0 + i / tile_cols, i % tile_cols);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < tile_depth; ++k) {
      const float b = shared.b[k * tile_cols + lane];
      const float4* a = reinterpret_cast<const float4*>(&shared.a[k * a_pitch + 8 * warp]);
      const float4 low = a[0], high = a[1];
      acc[0] = fmaf(low.x, b, acc[0]);
      acc[1] = fmaf(low.y, b, acc[1]);
      acc[2] = fmaf(low.z, b, acc[2]);
      acc[3] = fmaf(low.w, b, acc[3]);
      acc[4] = fmaf(high.x, b, acc[4]);
      acc[5] = fmaf(high.y, b, acc[5]);
      acc[6] = fmaf(high.z, b, acc[6]);
      acc[7] = fmaf(high.w, b, acc[7]);
    }
  }
}

// Calls visit(row, col, y) once for every element of the token's Y, in this thread or another.
template <class Element, class Visit>
__device__ void transform(const Problem& problem, int chunk_cols, const SharedMemory& shared,
                          int64_t token, Visit visit) {
  const int rows = problem.rows, cols = problem.cols;
  const auto* x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const auto* left = static_cast<const Element*>(problem.left);
  const auto* right = static_cast<const Element*>(problem.right);
  const int lane = threadIdx.x % 32;
  const int thread_row = 8 * (threadIdx.x / 32);
  float acc[8];
  for (int col = 0; col < cols; col += chunk_cols) {
    for (int row = 0; row < rows; row += tile_rows) {
      multiply_tile<true>(
          acc, shared, cols,
          [&](int k, int r) {
            return k < cols && row + r < rows ? to_float(x[(row + r) * cols + k]) : 0.0f;
          },
          [&](int k, int c) {
            return k < cols && c < chunk_cols && col + c < cols
                       ? to_float(right[k * cols + col + c])
                       : 0.0f;
          });
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + thread_row + i < rows && lane < chunk_cols) {
          shared.u[(row + thread_row + i) * chunk_cols + lane] = acc[i];
        }
      }
    }
    for (int row = 0; row < rows; row += tile_rows) {
      multiply_tile<false>(
          acc, shared, rows,
          [&](int k, int r) {
            return k < rows && row + r < rows ? to_float(left[k * rows + row + r]) : 0.0f;
          },
          [&](int k, int c) {
            return k < rows && c < chunk_cols ? shared.u[k * chunk_cols + c] : 0.0f;
          });
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + thread_row + i < rows && lane < chunk_cols && col + lane < cols) {
          visit(row + thread_row + i, col + lane, acc[i]);
        }
      }
    }
  }
}

__device__ inline float block_max(float max, float* maxima) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    max = absmax(max, __shfl_xor_sync(0xffffffffu, max, step));
  }
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = max;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) max = absmax(max, maxima[warp]);
  return max;
}

// Codes from the Y kept in shared memory.
__device__ inline void store_codes(const Problem& problem, const TokenScale& scale,
                                   const float* transformed, int64_t token) {
  const int features = problem.rows * problem.cols;
  const bool prepares = scale.needs_prepare;
  auto value = [&](int i) { return prepares ? scale.prepare(transformed[i]) : transformed[i]; };
  if (problem.storage == Storage::int32) {
    auto* words = static_cast<uint32_t*>(problem.codes) + token * (features / 8);
    for (int i = threadIdx.x; i < features / 8; i += threads) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = value(8 * i + j);
      words[i] = pack_int4(values, scale.inverse);
    }
  } else {
    auto* codes = static_cast<int8_t*>(problem.codes) + token * features;
    for (int i = threadIdx.x; i < features; i += threads) {
      codes[i] = static_cast<int8_t>(code_bits(value(i), scale.inverse) & 0xffu);
    }
  }
}

// Codes from Y computed again. Features of one int4 word are computed by different threads.
template <class Element>
__device__ void recompute_codes(const Problem& problem, int chunk_cols, const TokenScale& scale,
                                const SharedMemory& shared, int64_t token) {
  const int features = problem.rows * problem.cols;
  auto* words = static_cast<uint32_t*>(problem.codes) + token * (features / 8);
  auto* codes = static_cast<int8_t*>(problem.codes) + token * features;
  const bool packed = problem.storage == Storage::int32;
  if (packed) {
    for (int i = threadIdx.x; i < features / 8; i += threads) words[i] = 0;
    __syncthreads();
  }
  transform<Element>(problem, chunk_cols, shared, token, [&](int row, int col, float y) {
    const int feature = row * problem.cols + col;
    const uint32_t bits = code_bits(scale.needs_prepare ? scale.prepare(y) : y, scale.inverse);
    if (packed) {
      atomicOr(&words[feature / 8], (bits & 0xfu) << (4 * (feature % 8)));
    } else {
      codes[feature] = static_cast<int8_t>(bits & 0xffu);
    }
  });
}

template <class Element>
__global__ void __launch_bounds__(threads) kernel(const Problem problem, const Plan plan) {
  extern __shared__ float4 memory[];
  const SharedMemory shared(reinterpret_cast<float*>(memory), problem.rows, plan.chunk_cols);
  for (int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    float max = 0.0f;
    transform<Element>(problem, plan.chunk_cols, shared, token, [&](int row, int col, float y) {
      if (plan.keeps_transformed) shared.transformed[row * problem.cols + col] = y;
      max = absmax(max, y);
    });
    const TokenScale scale(block_max(max, shared.maxima), problem.clip_ratio);
    if (threadIdx.x == 0) problem.scales[token] = scale.scale;
    if (plan.keeps_transformed) {
      store_codes(problem, scale, shared.transformed, token);
    } else {
      recompute_codes<Element>(problem, plan.chunk_cols, scale, shared, token);
    }
    __syncthreads();  // the next token's values and maxima replace this one's
  }
}

}  // namespace flatquant::simt
