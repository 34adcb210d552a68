// The CUDA-core kernel: any rows and cols, all dtypes, no tensor core, and it runs on sm_60 (newer
// builds use max.NaN, see quantize.cuh).
// A block computes the tokens of a group (config.h says how many, and how they are cut):
//   W = left^T @ X     tiles of left's rows and of X's rows pass through shared memory
//   Y = W @ right      W lies in shared memory, transposed, in float; right's rows pass through
// Both are sums over k of a[k]^T b[k], rows of a and b being contiguous. Each thread holds 8 x 8
// sums of one token: 64 FMAs share four 16-byte loads, and the FMA units are what binds it. Two
// stages let the next tile arrive while one is used; codes leave from the registers, for one output
// after the other. The product with a factor that is not there is left out.
#pragma once

#include "elements.cuh"
#include "outputs.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "simt/config.h"

namespace flatquant::simt {

// Whether a row of `cols` elements can be loaded four at a time from this element on, and the rows
// after it.
template <class Element>
__device__ __forceinline__ bool in_fours(const Element* from, int cols) {
  return cols % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Elements<Element, 4>) == 0;
}

// Brings tiles of a row-major matrix to shared memory, as float. This thread brings two groups of
// four columns of one row of each tile.
template <class Element>
class Courier {
 public:
  // `col` counts in the tile, which begins at column `first_col` of the matrix.
  __device__ Courier(const Element* matrix, int rows, int cols, int first_col, int row, int col,
                     int group_step, int tile_pitch, bool takes_part)
      : from_(matrix + row * cols + first_col + col),
        cols_(cols),
        rows_left_(takes_part ? rows - row : 0),
        cols_left_(cols - first_col - col),
        group_step_(group_step),
        to_(takes_part ? row * tile_pitch + col : -1),
        in_fours_(in_fours(from_, cols)) {}

  // From the tile that begins at row k to registers. What is outside the matrix stays as it was:
  // sums that it takes part in are not used.
  __device__ void fetch(int k) {
    if (k >= rows_left_) return;
    const Element* from = from_ + k * cols_;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int begin = group * group_step_;
      if (begin >= cols_left_) break;
      groups_[group] =
          in_fours_ ? load<4>(from + begin) : load_up_to<4>(from + begin, cols_left_ - begin);
    }
  }

  __device__ void deliver(float* stage) const {
    if (to_ < 0) return;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float values[4];
      to_floats(values, groups_[group]);
      *reinterpret_cast<float4*>(stage + to_ + group * group_step_) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
  }

 private:
  const Element* from_;
  int cols_, rows_left_, cols_left_, group_step_, to_;
  bool in_fours_;
  Elements<Element, 4> groups_[2] = {};
};

using Sums = float[tile][tile];

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int i = 0; i < tile * tile; ++i) sums[i / tile][i % tile] = 0.0f;
}

// sums[r][c] += a[k][r] * b[k][c] for k = 0 .. depth - 1, in this order. The columns of b are
// 0..3 and half_b .. half_b + 3.
__device__ __forceinline__ void multiply(Sums& sums, const float* a, int a_pitch, const float* b,
                                         int b_pitch, int half_b, int depth) {
#pragma unroll 2
  for (int k = 0; k < depth; ++k, a += a_pitch, b += b_pitch) {
    const float4 a0 = *reinterpret_cast<const float4*>(a);
    const float4 a1 = *reinterpret_cast<const float4*>(a + 4);
    const float4 b0 = *reinterpret_cast<const float4*>(b);
    const float4 b1 = *reinterpret_cast<const float4*>(b + half_b);
    const float rows[tile] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
    const float cols[tile] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
    for (int r = 0; r < tile; ++r) {
#pragma unroll
      for (int c = 0; c < tile; ++c) sums[r][c] = fmaf(rows[r], cols[c], sums[r][c]);
    }
  }
}

// use(stage, k, depth) for every tile of a matrix of `rows` rows, after fetch(k) has brought it to
// registers and deliver(stage, k) to stage 0 or 1.
template <class Fetch, class Deliver, class Use>
__device__ __forceinline__ void for_each_tile(int rows, int depth, Fetch fetch, Deliver deliver,
                                              Use use) {
  fetch(0);
  deliver(0, 0);
  __syncthreads();
  int stage = 0;
  for (int k = 0; k < rows; k += depth) {
    const int next = k + depth;
    if (next < rows) fetch(next);
    use(stage, k, smaller(depth, rows - k));
    stage ^= 1;
    if (next < rows) deliver(stage, next);
    __syncthreads();
  }
}

// Four neighbouring codes of a row whose length is no multiple of four: the group begins anywhere
// in a word, the words began as zero. The first `count` exist, the others are zero.
__device__ __noinline__ inline void store_unaligned(void* token_codes, bool packed, int feature,
                                                    int count, uint32_t codes) {
  if (packed) {
    auto* const words = static_cast<uint32_t*>(token_codes);
    const uint64_t shifted = static_cast<uint64_t>(codes) << (4 * (feature % 8));
    const auto low = static_cast<uint32_t>(shifted), high = static_cast<uint32_t>(shifted >> 32);
    atomicOr(&words[feature / 8], low);
    if (high != 0) atomicOr(&words[feature / 8 + 1], high);
  } else {
    auto* const bytes = static_cast<uint8_t*>(token_codes);
    for (int i = 0; i < smaller(count, 4); ++i) {
      bytes[feature + i] = static_cast<uint8_t>(codes >> (8 * i));
    }
  }
}

__device__ __forceinline__ uint32_t pack_four(const float (&values)[4], const TokenScale& scale,
                                              bool packed) {
  if (!scale.clamps) {
    return packed ? pack_int4<Clamp::none>(values, scale) : pack_int8<Clamp::none>(values, scale);
  }
  return packed ? pack_int4<Clamp::saturated>(values, scale)
                : pack_int8<Clamp::saturated>(values, scale);
}

template <class Element>
__global__ void __launch_bounds__(max_threads) kernel(const Problem problem, const Plan plan) {
  extern __shared__ float4 memory[];
  const int rows = problem.rows, cols = problem.cols;
  const int thread = static_cast<int>(threadIdx.x);
  const int a_pitch = tile * plan.tile_rows, b_pitch = tile * plan.tile_cols;
  const int half_b = b_pitch / 2;  // between the two groups of columns of a thread

  // Which token of the group, and which tile of the chunk. The threads that fill up the last warp
  // repeat the last token's tiles and store nothing.
  const int token_threads = plan.tile_rows * plan.tile_cols;
  const int member = smaller(thread / token_threads, plan.tokens - 1);
  const int tile_row = thread % token_threads / plan.tile_cols, tile_col = thread % plan.tile_cols;
  const bool has_tile = thread < plan.tokens * token_threads;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * plan.tokens + member;
  const bool has_token = has_tile && token < problem.tokens;

  auto* const highs = reinterpret_cast<int32_t*>(memory);  // Extremes of Y of each token
  auto* const lows = reinterpret_cast<uint32_t*>(highs + plan.tokens);
  float* const stages = reinterpret_cast<float*>(memory) + plan.extremes_size;
  float* const w = stages + 2 * plan.stage_size + member * plan.w_size;  // (cols, w_pitch)
  // A stage holds `depth` rows of the first factor (a_pitch) and then of the second (b_pitch).
  auto stage_a = [&](int stage) { return stages + stage * plan.stage_size; };
  auto stage_b = [&](int stage, int depth) { return stage_a(stage) + depth * a_pitch; };

  const auto* const x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const auto* const left = static_cast<const Element*>(problem.left);
  const auto* const right = static_cast<const Element*>(problem.right);

  if (thread < plan.tokens) highs[thread] = lows[thread] = 0;
  const bool packed = problem.storage == Storage::int32;
  const int token_bytes = packed ? rows * cols / 2 : rows * cols;
  if (packed && cols % 4 != 0 && has_token) {
    for (int output = 0; output < problem.output_count; ++output) {
      auto* const words =
          static_cast<uint32_t*>(problem.outputs[output].codes) + token * (token_bytes / 4);
      for (int i = thread % token_threads; i < token_bytes / 4; i += token_threads) words[i] = 0;
    }
  }

  Sums sums;
  const bool keeps_w = plan.w_size != 0, stores_y = problem.output_count == 0;
  const int chunks = plan.row_chunks * plan.col_chunks;
  for (int step = 0; step < (stores_y ? chunks : 2 * chunks - 1); ++step) {
    // First all chunks for the extremes, then back from the last, which still is in the registers.
    const int chunk = smaller(step, 2 * (chunks - 1) - step);
    const int first_row = chunk / plan.col_chunks * a_pitch;
    const int first_col = chunk % plan.col_chunks * b_pitch;
    const int row = first_row + tile * tile_row, col = first_col + 4 * tile_col;

    clear(sums);
    if (left == nullptr && keeps_w) {
#pragma unroll
      for (int i = 0; i < 2 * tile; ++i) {
        const int x_row = row + i / 2, x_col = col + i % 2 * half_b;
        if (!has_token || x_row >= rows || x_col >= cols) continue;
        const Element* const from = x + x_row * cols + x_col;
        float values[4];
        to_floats(values, in_fours(from, cols) ? load<4>(from) : load_up_to<4>(from, cols - x_col));
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i / 2][4 * (i % 2) + c] = values[c];
      }
    } else if (right == nullptr || keeps_w) {
      const int depth = plan.left_depth;
      Courier<Element> left_rows(left, rows, rows, first_row, thread / plan.tile_rows,
                                 4 * (thread % plan.tile_rows), a_pitch / 2, a_pitch,
                                 thread < depth * plan.tile_rows);
      Courier<Element> x_rows(x, rows, cols, first_col, tile_row, 4 * tile_col, half_b, b_pitch,
                              has_token && tile_row < depth);
      auto stage_x = [&](int stage) { return stage_b(stage, depth) + member * depth * b_pitch; };
      for_each_tile(
          rows, depth,
          [&](int k) {
            left_rows.fetch(k);
            x_rows.fetch(k);
          },
          [&](int stage, int) {
            left_rows.deliver(stage_a(stage));
            x_rows.deliver(stage_x(stage));
          },
          [&](int stage, int, int count) {
            multiply(sums, stage_a(stage) + tile * tile_row, a_pitch, stage_x(stage) + 4 * tile_col,
                     b_pitch, half_b, count);
          });
    }
    if (right != nullptr && keeps_w) {
#pragma unroll
      for (int c = 0; c < tile; ++c) {
        const int w_col = col + (c < 4 ? c : half_b + c - 4);
        if (!has_tile || w_col >= cols) continue;
        auto* const to = reinterpret_cast<float4*>(w + w_col * plan.w_pitch + tile * tile_row);
        to[0] = make_float4(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
        to[1] = make_float4(sums[4][c], sums[5][c], sums[6][c], sums[7][c]);
      }
    }

    if (right != nullptr) {
      const int depth = plan.right_depth;
      Courier<Element> right_rows(right, cols, cols, first_col, thread / plan.tile_cols,
                                  4 * tile_col, half_b, b_pitch, thread < depth * plan.tile_cols);
      clear(sums);
      for_each_tile(
          cols, depth, [&](int k) { right_rows.fetch(k); },
          [&](int stage, int k) {
            right_rows.deliver(stage_b(stage, depth));
            if (keeps_w) return;
            // There is no room for W: compute the columns of it that this tile needs.
            for (int i = thread; i < depth * a_pitch; i += plan.threads) {
              const int w_row = first_row + i % a_pitch, w_col = k + i / a_pitch;
              float sum = 0.0f;
              if (w_row < rows && w_col < cols) {
                if (left == nullptr) sum = static_cast<float>(x[w_row * cols + w_col]);
                for (int j = 0; left != nullptr && j < rows; ++j) {
                  sum = fmaf(static_cast<float>(left[j * rows + w_row]),
                             static_cast<float>(x[j * cols + w_col]), sum);
                }
              }
              stage_a(stage)[i] = sum;
            }
          },
          [&](int stage, int k, int count) {
            multiply(sums, (keeps_w ? w + k * plan.w_pitch : stage_a(stage)) + tile * tile_row,
                     keeps_w ? plan.w_pitch : a_pitch, stage_b(stage, depth) + 4 * tile_col,
                     b_pitch, half_b, count);
          });
    }

    // Calls use(values, feature, count) for all groups of four neighbouring sums, of which the
    // first `count` exist.
    auto for_each_four = [&](auto use) {
#pragma unroll
      for (int i = 0; i < 2 * tile; ++i) {
        const int group = i % 2, y_row = row + i / 2, y_col = col + group * half_b;
        if (y_row >= rows || y_col >= cols) continue;
        const float (&sums_of_row)[tile] = sums[i / 2];
        const float values[4] = {sums_of_row[4 * group], sums_of_row[4 * group + 1],
                                 sums_of_row[4 * group + 2], sums_of_row[4 * group + 3]};
        use(values, y_row * cols + y_col, cols - y_col);
      }
    };
    if (stores_y) {
      if (!has_token) continue;
      for_each_four([&](const float (&values)[4], int feature, int count) {
        store_values(problem.transformed_dtype, problem.transformed, token * rows * cols + feature,
                     values, count);
      });
      continue;
    }

    Extremes own;
#pragma unroll
    for (int r = 0; r < tile; ++r) {
#pragma unroll
      for (int c = 0; c < tile; ++c) {
        const bool inside = row + r < rows && col + (c < 4 ? c : half_b + c - 4) < cols;
        if (!inside) sums[r][c] = 0.0f;
        own.include(sums[r][c]);
      }
    }
    if (step < chunks && has_token) {
      atomicMax(&highs[member], own.high);
      atomicMax(&lows[member], own.low);
    }
    if (step < chunks - 1) continue;
    if (step == chunks - 1) __syncthreads();
    if (!has_token) continue;

    const Extremes extremes{highs[member], lows[member]};
#pragma unroll 1
    for (int i = 0; i < problem.output_count; ++i) {
      const Output& output = problem.outputs[i];
      const TokenScale scale = Ratios(output).scale(extremes, false);
      if (chunk == 0 && tile_row == 0 && tile_col == 0) output.scales[token] = scale.scale;
      auto* const codes = static_cast<unsigned char*>(output.codes) + token * token_bytes;
      for_each_four([&](const float (&values)[4], int feature, int count) {
        const uint32_t four = pack_four(values, scale, packed);
        if (cols % 4 != 0) {
          store_unaligned(codes, packed, feature, count, four);
        } else if (packed) {
          reinterpret_cast<uint16_t*>(codes)[feature / 4] = static_cast<uint16_t>(four);
        } else {
          reinterpret_cast<uint32_t*>(codes)[feature / 4] = four;
        }
      });
    }
  }
}

}  // namespace flatquant::simt
