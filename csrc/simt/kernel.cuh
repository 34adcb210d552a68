// The CUDA-core kernel: any rows and cols, all dtypes, no tensor core, and it runs on sm_60 (newer
// builds use max.NaN, see quantize.cuh).
// A block computes the tokens of a group (config.h says how many, and how they are cut):
//   W = left^T @ X     stages of left's and of X's rows pass through shared memory
//   Y = W @ right      W lies in shared memory, transposed, in float; right's rows pass through
// Both are sums over k of a[k]^T b[k], a and b lying there in panels of eight columns, k after k.
// Each thread holds 8 x 8 sums of one token: 64 FMAs share four 16-byte loads, and the FMA units
// are what binds it. Two stages let the next rows arrive while some are used; codes leave from the
// registers, for one output after the other. The product with a factor that is not there is left
// out.
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

// Brings stages of a row-major matrix to shared memory, as panels of float, one after the other.
// This thread brings one row of one panel of each. With `is_whole` all of them are inside the
// matrix, and aligned to be loaded four elements at a time.
template <class Element, bool is_whole>
class Courier {
 public:
  // The panels begin at column `first_col` of the matrix, and at `panels` in the first stage.
  __device__ Courier(const Element* matrix, int rows, int cols, int first_col, int row, int panel,
                     bool takes_part, int depth, float* panels, int pitch)
      : from_(matrix + row * cols + first_col + tile * panel),
        depth_(is_whole ? max_depth : depth),
        step_(depth_ * cols),
        rows_left_(takes_part ? rows - row : 0),
        cols_left_(cols - first_col - tile * panel),
        to_(panels + panel * pitch + row * tile) {
    if (cols_left_ >= tile && in_fours(from_, cols)) cols_left_ = in_fours_;
  }

  // From the next stage to registers. What is outside the matrix stays as it was: sums that it
  // takes part in are not used.
  __device__ __forceinline__ void fetch() {
    if (rows_left_ > 0) {
      if (is_whole || cols_left_ == in_fours_) {
        fours_[0] = load<4>(from_);
        fours_[1] = load<4>(from_ + 4);
      } else {
        fours_[0] = load_up_to<4>(from_, cols_left_);
        fours_[1] = load_up_to<4>(from_ + 4, cols_left_ - 4);
      }
    }
    if (!is_whole) rows_left_ -= depth_;
    from_ += step_;
  }

  __device__ __forceinline__ void deliver(int stage_offset) const {
    if (rows_left_ + (is_whole ? 0 : depth_) <= 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float values[4];
      to_floats(values, fours_[i]);
      *reinterpret_cast<float4*>(to_ + stage_offset + 4 * i) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
  }

 private:
  static constexpr int in_fours_ = 2 * max_size;  // as cols_left_: whole rows by fours

  const Element* from_;
  int depth_, step_, rows_left_, cols_left_;
  float* to_;
  Elements<Element, 4> fours_[2] = {};
};

using Sums = float[tile][tile];

// By what was measured (benchmarks/NOTES.md), even and odd registers are a bank each, which gives
// one operand a cycle. An FMA here takes a[r] and sums[r][c] from there, so they should not be in
// the same bank. 16-byte loads and stores decide that, as they take four registers in a row: a[r]
// is in bank r % 2. Sums therefore begin as zeros that are loaded, and W is stored, with the rows
// of each pair in each other's place; Y's rows then come out of W like that, too.
constexpr int other_of_pair(int row) { return row ^ 1; }

__device__ __forceinline__ void clear(Sums& sums, const float4* zeros) {
#pragma unroll
  for (int i = 0; i < tile * tile / 4; ++i) {
    const int first = i % 2 * 4, c = i / 2;
    float four[4];
#if defined(__CUDA_ARCH__)  // volatile, else it would become one load and many moves
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(zeros))));
#else
    reinterpret_cast<float4&>(four) = *zeros;
#endif
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[first + other_of_pair(r)][c] = four[r];
  }
}

// Puts rows that have come out of W in order. It takes no instruction.
__device__ __forceinline__ void swap_pairs(Sums& sums) {
#pragma unroll
  for (int i = 0; i < tile * tile / 2; ++i) {
    float &even = sums[2 * (i / tile)][i % tile], &odd = sums[2 * (i / tile) + 1][i % tile];
    const float value = even;
    even = odd;
    odd = value;
  }
}

// To registers of either bank, as it takes an instruction that the compiler cannot leave out.
__device__ __forceinline__ void move(Sums& sums) {
#pragma unroll
  for (int i = 0; i < tile * tile; ++i) {
    float& sum = sums[i / tile][i % tile];
    sum = __shfl_sync(0xffffffffu, sum, static_cast<int>(threadIdx.x % 32));
  }
}

// What one k brings to a thread's sums.
struct Edges {
  alignas(16) float a[tile], b[tile];

  __device__ __forceinline__ void load(const float* from_a, const float* from_b) {
#pragma unroll
    for (int i = 0; i < tile; i += 4) {
      reinterpret_cast<float4&>(a[i]) = *reinterpret_cast<const float4*>(from_a + i);
      reinterpret_cast<float4&>(b[i]) = *reinterpret_cast<const float4*>(from_b + i);
    }
  }
  // Column after column, up and down: b[c] is then kept from one FMA to the next.
  __device__ __forceinline__ void add_to(Sums& sums) const {
#pragma unroll
    for (int c = 0; c < tile; ++c) {
#pragma unroll
      for (int i = 0; i < tile; ++i) {
        const int r = c % 2 == 0 ? i : tile - 1 - i;
        sums[r][c] = fmaf(a[r], b[c], sums[r][c]);
      }
    }
  }
};

// sums[r][c] += a[k][r] * b[k][c] for k = 0 .. depth - 1, in this order.
__device__ __forceinline__ void multiply(Sums& sums, const float* a, const float* b, int depth) {
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
    Edges edges;
    edges.load(a + k * tile, b + k * tile);
    edges.add_to(sums);
  }
}

// The same for k = 0 .. rows - 1, in stages. fetch() brings the next one to registers,
// deliver(offset) to shared memory; this thread's panels of the first are at a and b. The second
// stage lies stage_size behind it, the third in its place; but if a_step is not 0, all of a is
// there, a_step apart. Full stages have a loop of their own, of a constant count. Unrolled more
// than twice, the compiler lets sums change their registers.
template <bool is_whole, class Fetch, class Deliver>
__device__ __forceinline__ void accumulate(Sums& sums, int rows, int depth, const float* a,
                                           const float* b, int a_step, int stage_size, Fetch fetch,
                                           Deliver deliver) {
  fetch();
  deliver(0);
  __syncthreads();
  int step = stage_size;
#pragma unroll 1
  for (int k = 0; k < rows; k += depth) {
    const bool is_last = rows - k <= depth;
    const bool is_full = is_whole || (depth == max_depth && rows - k >= max_depth);
    if (!is_last) fetch();
    if (is_full) {
#pragma unroll 2
      for (int i = 0; i < max_depth; ++i) {
        Edges edges;
        edges.load(a + i * tile, b + i * tile);
        edges.add_to(sums);
      }
    } else {
      multiply(sums, a, b, smaller(depth, rows - k));
    }
    if (!is_last) deliver(step > 0 ? step : 0);
    __syncthreads();
    a += a_step == 0 ? step : a_step;
    b += step;
    step = -step;
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

template <Clamp clamp, bool is_whole>
__device__ __forceinline__ void store_codes(unsigned char* codes, bool packed, const Sums& sums,
                                            int row, int col, int rows, int cols,
                                            const TokenScale& scale) {
  if (!is_whole && col >= cols) return;
#pragma unroll
  for (int r = 0; r < tile; ++r) {
    if (!is_whole && row + r >= rows) return;
    const int feature = (row + r) * cols + col;
    const float (&values)[tile] = sums[r];
    if (packed && (is_whole || cols % tile == 0)) {
      reinterpret_cast<uint32_t*>(codes)[feature / 8] = pack_int4<clamp>(values, scale);
      continue;
    }
#pragma unroll
    for (int i = 0; i < tile; i += 4) {
      if (!is_whole && col + i >= cols) break;
      const float four_values[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      const uint32_t four =
          packed ? pack_int4<clamp>(four_values, scale) : pack_int8<clamp>(four_values, scale);
      if (!is_whole && cols % 4 != 0) {
        store_unaligned(codes, packed, feature + i, cols - col - i, four);
      } else if (packed) {
        reinterpret_cast<uint16_t*>(codes)[(feature + i) / 4] = static_cast<uint16_t>(four);
      } else {
        reinterpret_cast<uint32_t*>(codes)[(feature + i) / 4] = four;
      }
    }
  }
}

// With `is_whole` for problems of needs_no_padding() only: then little code is left, and registers
// suffice for it.
template <class Element, bool is_whole>
__global__ void __launch_bounds__(max_threads) kernel(const Problem problem, const Plan plan) {
  extern __shared__ float4 memory[];
  const int rows = problem.rows, cols = problem.cols;
  const int thread = static_cast<int>(threadIdx.x);
  const int a_pitch = tile * plan.tile_rows, b_pitch = tile * plan.tile_cols;

  // Which token of the group, and which tile of the chunk. The threads that fill up the last warp
  // repeat the last token's tiles and store nothing.
  const int token_threads = plan.tile_rows * plan.tile_cols;
  const int member = smaller(thread / token_threads, plan.tokens - 1);
  const int place = thread % token_threads;  // in the token
  // Two tile rows side by side, neighbouring lanes in one column: half a warp then takes each
  // 16-byte load of either edge in one go.
  const int pair_row = place / (2 * plan.tile_cols) * 2, in_pair = place % (2 * plan.tile_cols);
  const int pair_rows = smaller(2, plan.tile_rows - pair_row);
  const int tile_row = pair_row + in_pair % pair_rows, tile_col = in_pair / pair_rows;
  const bool has_tile = thread < plan.tokens * token_threads;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * plan.tokens + member;
  const bool has_token = has_tile && token < problem.tokens;

  float4* const zeros = memory;
  auto* const highs = reinterpret_cast<int32_t*>(memory + 1);  // Extremes of Y of each token
  auto* const lows = reinterpret_cast<uint32_t*>(highs + plan.tokens);
  float* const stages = reinterpret_cast<float*>(memory + 1) + plan.extremes_size;
  float* const w = stages + 2 * plan.stage_size + member * plan.w_size;
  // A stage holds the panels of the first factor, unless that is W, and then of the second.
  const auto* const x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const auto* const left = static_cast<const Element*>(problem.left);
  const auto* const right = static_cast<const Element*>(problem.right);

  if (thread == 0) *zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();
  if (thread < plan.tokens) highs[thread] = lows[thread] = 0;
  const bool has_left = is_whole || left != nullptr, has_right = is_whole || right != nullptr;
  const bool packed = problem.storage == Storage::int32;
  const int token_bytes = packed ? rows * cols / 2 : rows * cols;
  if (!is_whole && packed && cols % 4 != 0 && has_token) {
    for (int output = 0; output < problem.output_count; ++output) {
      auto* const words =
          static_cast<uint32_t*>(problem.outputs[output].codes) + token * (token_bytes / 4);
      for (int i = place; i < token_bytes / 4; i += token_threads) words[i] = 0;
    }
  }

  const bool keeps_w = is_whole || plan.w_size != 0;
  const bool stores_y = !is_whole && problem.output_count == 0;
  const int chunks = is_whole ? 1 : plan.row_chunks * plan.col_chunks;
  for (int step = 0; step < (stores_y ? chunks : 2 * chunks - 1); ++step) {
    // First all chunks for the extremes, then back from the last, which still is in the registers.
    const int chunk = smaller(step, 2 * (chunks - 1) - step);
    const int first_row = chunk / plan.col_chunks * a_pitch;
    const int first_col = chunk % plan.col_chunks * b_pitch;
    const int row = first_row + tile * tile_row, col = first_col + tile * tile_col;

    Sums sums;
    clear(sums, zeros);  // not in its branch, where the compiler would give product 2 other banks
    if (!has_left && keeps_w) {
#pragma unroll
      for (int i = 0; i < 2 * tile; ++i) {
        const int x_row = row + i / 2, x_col = col + i % 2 * 4;
        float values[4] = {};
        if (has_token && x_row < rows && x_col < cols) {
          const Element* const from = x + x_row * cols + x_col;
          to_floats(values,
                    in_fours(from, cols) ? load<4>(from) : load_up_to<4>(from, cols - x_col));
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i / 2][4 * (i % 2) + c] = values[c];
      }
      move(sums);
    } else if (!has_right || keeps_w) {
      const int depth = is_whole ? max_depth : plan.left_depth;
      const int pitch = panel_pitch(depth);
      float* const x_panels = stages + (plan.tile_rows + member * plan.tile_cols) * pitch;
      Courier<Element, is_whole> left_rows(left, rows, rows, first_row, thread / plan.tile_rows,
                                           thread % plan.tile_rows, thread < depth * plan.tile_rows,
                                           depth, stages, pitch);
      // From the other end: few warps then bring both.
      const int x_place = token_threads - 1 - place;
      Courier<Element, is_whole> x_rows(
          x, rows, cols, first_col, x_place / plan.tile_cols, x_place % plan.tile_cols,
          has_token && x_place < depth * plan.tile_cols, depth, x_panels, pitch);
      accumulate<is_whole>(
          sums, rows, depth, stages + tile_row * pitch, x_panels + tile_col * pitch, 0,
          plan.stage_size,
          [&] {
            left_rows.fetch();
            x_rows.fetch();
          },
          [&](int offset) {
            left_rows.deliver(offset);
            x_rows.deliver(offset);
          });
    }
    float* const w_row = w + tile_row * plan.w_pitch;
    if (has_right && keeps_w && has_tile) {
#pragma unroll
      for (int c = 0; c < tile; ++c) {
        auto* const to = reinterpret_cast<float4*>(w_row + tile_col * plan.w_panel + c * tile);
        to[0] = make_float4(sums[1][c], sums[0][c], sums[3][c], sums[2][c]);
        to[1] = make_float4(sums[5][c], sums[4][c], sums[7][c], sums[6][c]);
      }
    }

    if (has_right) {
      const int depth = is_whole ? max_depth : plan.right_depth;
      const int pitch = panel_pitch(depth);
      float* const right_panels = stages + (keeps_w ? 0 : plan.tile_rows * pitch);
      Courier<Element, is_whole> right_rows(
          right, cols, cols, first_col, thread / plan.tile_cols, thread % plan.tile_cols,
          thread < depth * plan.tile_cols, depth, right_panels, pitch);
      const float* const b = right_panels + tile_col * pitch;
      clear(sums, zeros);
      if (keeps_w) {
        accumulate<is_whole>(
            sums, cols, depth, w_row, b, plan.w_panel * depth / max_depth, plan.stage_size,
            [&] { right_rows.fetch(); }, [&](int offset) { right_rows.deliver(offset); });
      } else {
        for (int k = 0; k < cols; k += depth) {
          right_rows.fetch();
          right_rows.deliver(0);
          // There is no room for W: compute the columns of it that this stage needs.
          for (int i = thread; i < depth * a_pitch; i += plan.threads) {
            const int in_chunk = i % a_pitch, in_stage = i / a_pitch;
            const int m = first_row + in_chunk, n = k + in_stage;
            float sum = 0.0f;
            if (m < rows && n < cols) {
              if (!has_left) sum = static_cast<float>(x[m * cols + n]);
              for (int j = 0; has_left && j < rows; ++j) {
                sum = fmaf(static_cast<float>(left[j * rows + m]),
                           static_cast<float>(x[j * cols + n]), sum);
              }
            }
            stages[in_chunk / tile * pitch + in_stage * tile + other_of_pair(in_chunk % tile)] =
                sum;
          }
          __syncthreads();
          multiply(sums, stages + tile_row * pitch, b, smaller(depth, cols - k));
          __syncthreads();
        }
      }
      swap_pairs(sums);
    } else {
      move(sums);
    }

    if (stores_y) {
#pragma unroll
      for (int i = 0; i < 2 * tile; ++i) {
        const int group = i % 2, y_row = row + i / 2, y_col = col + 4 * group;
        if (!has_token || y_row >= rows || y_col >= cols) continue;
        const float (&sums_of_row)[tile] = sums[i / 2];
        const float values[4] = {sums_of_row[4 * group], sums_of_row[4 * group + 1],
                                 sums_of_row[4 * group + 2], sums_of_row[4 * group + 3]};
        store_values(problem.transformed_dtype, problem.transformed,
                     (token * rows + y_row) * cols + y_col, values, cols - y_col);
      }
      continue;
    }

    if (!is_whole && (row + tile > rows || col + tile > cols)) {
#pragma unroll
      for (int i = 0; i < tile * tile; ++i) {
        if (row + i / tile >= rows || col + i % tile >= cols) sums[i / tile][i % tile] = 0.0f;
      }
    }
    if (step < chunks) {
      Extremes own;
#pragma unroll
      for (int i = 0; i < tile * tile; ++i) own.include(sums[i / tile][i % tile]);
      // Of a whole warp where it has but one token: lanes at one address wait for each other.
      const bool whole_warps = token_threads % 32 == 0;
      for (int lanes = whole_warps ? 16 : 0; lanes > 0; lanes /= 2) {
        own.include(Extremes{__shfl_xor_sync(0xffffffffu, own.high, lanes),
                             __shfl_xor_sync(0xffffffffu, own.low, lanes)});
      }
      if (has_token && (!whole_warps || thread % 32 == 0)) {
        atomicMax(&highs[member], own.high);
        atomicMax(&lows[member], own.low);
      }
    }
    if (step < chunks - 1) continue;
    if (step == chunks - 1) __syncthreads();
    if (!has_token) continue;

    const Extremes extremes{highs[member], lows[member]};
#pragma unroll 1
    for (int i = 0; i < (is_whole ? 1 : problem.output_count); ++i) {
      const Output& output = problem.outputs[i];
      const TokenScale scale = Ratios(output).scale(extremes, false);
      if (chunk == 0 && tile_row == 0 && tile_col == 0) output.scales[token] = scale.scale;
      auto* const codes = static_cast<unsigned char*>(output.codes) + token * token_bytes;
      if (scale.clamps) {
        store_codes<Clamp::saturated, is_whole>(codes, packed, sums, row, col, rows, cols, scale);
      } else {
        store_codes<Clamp::none, is_whole>(codes, packed, sums, row, col, rows, cols, scale);
      }
    }
  }
}

// Whether a problem is one output of a token that fills all tiles and stages, with both factors,
// all of it aligned to four elements.
template <class Element>
__host__ __device__ bool needs_no_padding(const Problem& problem, const Plan& plan) {
  const auto bits = reinterpret_cast<uintptr_t>(problem.input) |
                    reinterpret_cast<uintptr_t>(problem.left) |
                    reinterpret_cast<uintptr_t>(problem.right);
  return problem.left != nullptr && problem.right != nullptr && problem.output_count == 1 &&
         plan.is_whole(problem.rows, problem.cols) && problem.input_stride % 4 == 0 &&
         bits % sizeof(Elements<Element, 4>) == 0;
}

}  // namespace flatquant::simt
