// The CUDA-core kernel: any rows and cols, all dtypes, no tensor core, and it runs on sm_60 (newer
// builds use max.NaN, see quantize.cuh).
// A block computes the tokens of a group (config.h says how many, and how they are cut):
//   W = left^T @ X     stages of left's and of X's rows pass through shared memory
//   Y = W @ right      W lies in shared memory, transposed, in float; right's rows pass through
// Both are sums over k of a[k]^T b[k], a and b lying there in panels of eight columns, k after k;
// W's rows lie in pairs the other way round, for the sake of register banks.
// Each thread holds 8 x 8 sums of one token, or 7 x 8: 64 FMAs (or 56) share four 16-byte loads,
// and the FMA units are what binds it. Two stages let the next rows arrive while some are used;
// codes leave from the registers, for one output after the other. The product with a factor that is
// not there is left out.
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
// This thread brings one row of one panel of each, `width` elements. With `is_whole` all of them
// are inside the matrix, and aligned to be loaded four at a time; seven are loaded one by one.
template <class Element, bool is_whole, int width = tile>
class Courier {
  static_assert(is_whole || width == tile);

 public:
  // The panels begin at column `first_col` of the matrix, and at `panels` in the first stage.
  __device__ Courier(const Element* matrix, int rows, int cols, int first_col, int row, int panel,
                     bool takes_part, int depth, float* panels, int pitch)
      : from_(matrix + row * cols + first_col + width * panel),
        depth_(depth),
        step_(depth * cols),
        rows_left_(takes_part ? rows - row : 0),
        cols_left_(cols - first_col - width * panel),
        to_(panels + panel * pitch + row * tile) {
    if (cols_left_ >= tile && in_fours(from_, cols)) cols_left_ = in_fours_;
  }

  // From the next stage to registers. What is outside the matrix stays as it was: sums that it
  // takes part in are not used.
  __device__ __forceinline__ void fetch() {
    if (rows_left_ > 0) {
      if constexpr (width != tile) {
#pragma unroll
        for (int i = 0; i < width; ++i) singles_[i] = from_[i];
      } else if (is_whole || cols_left_ == in_fours_) {
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
    float values[2][4] = {};
    if constexpr (width != tile) {
#pragma unroll
      for (int i = 0; i < width; ++i) values[i / 4][i % 4] = static_cast<float>(singles_[i]);
    } else {
      to_floats(values[0], fours_[0]);
      to_floats(values[1], fours_[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float4*>(to_ + stage_offset + 4 * i) =
          make_float4(values[i][0], values[i][1], values[i][2], values[i][3]);
    }
  }

 private:
  static constexpr int in_fours_ = 2 * max_size;  // as cols_left_: whole rows by fours

  const Element* from_;
  int depth_, step_, rows_left_, cols_left_;
  float* to_;
  Elements<Element, 4> fours_[2] = {};
  Element singles_[width];  // instead, not to be packed before they have arrived
};

template <int height>
using Sums = float[height][tile];

// By what was measured (benchmarks/NOTES.md), even and odd registers are a bank each, which gives
// one operand a cycle. An FMA here takes a row's edge and its sum from there, so they should not be
// in the same bank. 16-byte loads and stores decide that, as they take four registers in a row. So
// W lies in shared memory with the rows of each pair in each other's place, and sums begin as zeros
// that are loaded, a row's in the place that its edge does not have.
constexpr int other_of_pair(int row) { return row ^ 1; }
template <bool of_w>
constexpr int place_of(int row) {
  return of_w ? other_of_pair(row) : row;
}

// For a product whose a is W (`of_w`) or left.
template <bool of_w, int height>
__device__ __forceinline__ void clear(Sums<height>& sums, const float4* zeros) {
#pragma unroll
  for (int i = 0; i < tile * tile / 4; ++i) {
    const int first = i % 2 * 4, c = i / 2;
    alignas(16) float four[4];
#if defined(__CUDA_ARCH__)  // volatile, else it would become one load and many moves
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(zeros))));
#else
    reinterpret_cast<float4&>(four) = *zeros;
#endif
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const int r = first + place_of<!of_w>(place);
      if (r < height) sums[r][c] = four[place];
    }
  }
}

// To registers of either bank, as it takes an instruction that the compiler cannot leave out.
template <int height>
__device__ __forceinline__ void move(Sums<height>& sums) {
#pragma unroll
  for (int i = 0; i < height * tile; ++i) {
    float& sum = sums[i / tile][i % tile];
    sum = __shfl_sync(0xffffffffu, sum, static_cast<int>(threadIdx.x % 32));
  }
}

// Columns of W to shared memory, where they are a panel's k.
template <int height, int cols>
__device__ __forceinline__ void store_w(float* to, const float (&values)[height][cols]) {
#pragma unroll
  for (int i = 0; i < 2 * cols; ++i) {
    const int first = i % 2 * 4, c = i / 2;
    float four[4];
#pragma unroll
    for (int place = 0; place < 4; ++place) {  // that of a row that is not there takes any
      four[place] = values[smaller(other_of_pair(first + place), height - 1)][c];
    }
    *reinterpret_cast<float4*>(to + c * tile + first) =
        make_float4(four[0], four[1], four[2], four[3]);
  }
}

// Four or eight neighbouring floats of shared memory.
template <int count>
__device__ __forceinline__ void load_edge(float (&edge)[count], const float* from) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    reinterpret_cast<float4&>(edge[i]) = *reinterpret_cast<const float4*>(from + i);
  }
}

// What one k brings to four columns of a thread's sums. Column after column, up and down: b[c] is
// then kept from one FMA to the next.
template <bool of_w, int first, int height>
__device__ __forceinline__ void add_outer(Sums<height>& sums, const float (&a)[tile],
                                          const float (&b)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int i = 0; i < height; ++i) {
      const int r = c % 2 == 0 ? i : height - 1 - i;
      sums[r][first + c] = fmaf(a[place_of<of_w>(r)], b[c], sums[r][first + c]);
    }
  }
}

// sums[r][c] += a[k][r] * b[k][c] for k = 0 .. depth - 1, in this order. Unrolled more than twice,
// the compiler lets sums change their banks.
template <bool of_w, int unrolled, int height>
__device__ __forceinline__ void multiply(Sums<height>& sums, const float* a, const float* b,
                                         int depth) {
#pragma unroll unrolled
  for (int k = 0; k < depth; ++k) {
    alignas(16) float a_edge[tile], b_edges[2][4];
    load_edge(a_edge, a + k * tile);
    load_edge(b_edges[0], b + k * tile);
    load_edge(b_edges[1], b + k * tile + 4);
    add_outer<of_w, 0>(sums, a_edge, b_edges[0]);
    add_outer<of_w, 4>(sums, a_edge, b_edges[1]);
  }
}

// The same for a depth of whole tiles, the edges of the next k loaded during this one, b's in place
// of what has been used. A panel of W has a tile of k. It takes registers that only a kernel
// without padding has; there a tile at a time was fastest, though sums change their banks.
template <bool of_w, int height>
__device__ __forceinline__ void multiply_ahead(Sums<height>& sums, const float* a, const float* b,
                                               int depth) {
  alignas(16) float a_edges[2][tile], b_edges[2][4];
  load_edge(a_edges[0], a);
  load_edge(b_edges[0], b);
  load_edge(b_edges[1], b + 4);
#pragma unroll 1
  for (int k = 0; k < depth; k += tile) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const bool ends_tile = i == tile - 1, has_next = !ends_tile || k + tile < depth;
      a += ends_tile && of_w ? panel_pitch(tile) - (tile - 1) * tile : tile;
      b += tile;
      const float (&edge)[tile] = a_edges[i % 2];
      if (has_next) load_edge(a_edges[(i + 1) % 2], a);
      add_outer<of_w, 0>(sums, edge, b_edges[0]);
      if (has_next) load_edge(b_edges[0], b);
      add_outer<of_w, 4>(sums, edge, b_edges[1]);
      if (has_next) load_edge(b_edges[1], b + 4);
    }
  }
}

// The same for k = 0 .. rows - 1, in stages. fetch() brings the next one to registers,
// deliver(offset) to shared memory; this thread's panels of the first are at a and b. The second
// stage lies stage_size behind it, the third in its place; but if a_step is not 0, all of a is
// there, a_step apart.
template <bool of_w, bool is_whole, int height, class Fetch, class Deliver>
__device__ __forceinline__ void accumulate(Sums<height>& sums, int rows, int depth, const float* a,
                                           const float* b, int a_step, int stage_size, Fetch fetch,
                                           Deliver deliver) {
  fetch();
  deliver(0);
  __syncthreads();
  int step = stage_size;
#pragma unroll 1
  for (int k = 0; k < rows; k += depth) {
    const bool is_last = rows - k <= depth;
    if (!is_last) fetch();
    if constexpr (is_whole) {
      multiply_ahead<of_w>(sums, a, b, depth);
    } else if (depth == usual_depth && rows - k >= usual_depth) {
      multiply<of_w, 2>(sums, a, b, usual_depth);
    } else {
      multiply<of_w, 1>(sums, a, b, smaller(depth, rows - k));
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

template <Clamp clamp, bool is_whole, int height>
__device__ __forceinline__ void store_codes(unsigned char* codes, bool packed,
                                            const Sums<height>& sums, int row, int col, int rows,
                                            int cols, const TokenScale& scale) {
  if (!is_whole && col >= cols) return;
#pragma unroll
  for (int r = 0; r < height; ++r) {
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

// `height` and `is_whole` are the plan's. If nothing is padded, little code is left, and next to
// nothing has to leave the registers.
template <class Element, int height, bool is_whole>
__global__ void __launch_bounds__(max_threads) kernel(const Problem problem, const Plan plan) {
  static_assert(is_whole || height == tile);
  extern __shared__ float4 memory[];
  const int rows = problem.rows, cols = problem.cols;
  const int thread = static_cast<int>(threadIdx.x);
  const int a_pitch = height * plan.tile_rows, b_pitch = tile * plan.tile_cols;

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
  if (thread < plan.tokens) highs[thread] = lows[thread] = 0;
  __syncthreads();
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
    const int row = first_row + height * tile_row, col = first_col + tile * tile_col;

    float* const w_row = w + tile_row * plan.w_pitch;
    float* const w_panel = w_row + tile_col * plan.w_panel;
    Sums<height> sums;
    clear<false>(sums, zeros);  // not in its branch, where product 2 would get other banks
    if (!has_left && keeps_w) {
#pragma unroll 1
      for (int c = 0; c < tile; c += 4) {
        float values[height][4] = {};
#pragma unroll
        for (int r = 0; r < height; ++r) {
          if (!has_token || row + r >= rows || col + c >= cols) continue;
          const Element* const from = x + (row + r) * cols + col + c;
          to_floats(values[r],
                    in_fours(from, cols) ? load<4>(from) : load_up_to<4>(from, cols - col - c));
        }
        if (has_tile) store_w(w_panel + c * tile, values);
      }
    } else if (!has_right || keeps_w) {
      const int depth = plan.left_depth;
      const int pitch = panel_pitch(depth);
      float* const x_panels = stages + (plan.tile_rows + member * plan.tile_cols) * pitch;
      Courier<Element, is_whole, height> left_rows(
          left, rows, rows, first_row, thread / plan.tile_rows, thread % plan.tile_rows,
          thread < depth * plan.tile_rows, depth, stages, pitch);
      // From the other end: few warps then bring both.
      const int x_place = token_threads - 1 - place;
      Courier<Element, is_whole> x_rows(
          x, rows, cols, first_col, x_place / plan.tile_cols, x_place % plan.tile_cols,
          has_token && x_place < depth * plan.tile_cols, depth, x_panels, pitch);
      accumulate<false, is_whole>(
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
      if (has_right && has_tile) store_w(w_panel, sums);
    }
    if (has_right) {
      const int depth = plan.right_depth;
      const int pitch = panel_pitch(depth);
      float* const right_panels = stages + (keeps_w ? 0 : plan.tile_rows * pitch);
      Courier<Element, is_whole> right_rows(
          right, cols, cols, first_col, thread / plan.tile_cols, thread % plan.tile_cols,
          thread < depth * plan.tile_cols, depth, right_panels, pitch);
      const float* const b = right_panels + tile_col * pitch;
      clear<true>(sums, zeros);
      if (keeps_w) {
        accumulate<true, is_whole>(
            sums, cols, depth, w_row, b, plan.w_panel * depth / tile, plan.stage_size,
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
          multiply<true, 1>(sums, stages + tile_row * pitch, b, smaller(depth, cols - k));
          __syncthreads();
        }
      }
    } else {
      move(sums);
    }

    if (stores_y) {
#pragma unroll
      for (int i = 0; i < 2 * height; ++i) {
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

    if (!is_whole && (row + height > rows || col + tile > cols)) {
#pragma unroll
      for (int i = 0; i < height * tile; ++i) {
        if (row + i / tile >= rows || col + i % tile >= cols) sums[i / tile][i % tile] = 0.0f;
      }
    }
    if (step < chunks) {
      Extremes own;
#pragma unroll
      for (int i = 0; i < height * tile; ++i) own.include(sums[i / tile][i % tile]);
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

// How a problem is cut for blocks that may have `shared_limit` bytes. A kernel without padding
// serves one output and both factors, aligned to four elements.
template <class Element>
__host__ __device__ Plan plan_of(const Problem& problem, int shared_limit) {
  const auto bits = reinterpret_cast<uintptr_t>(problem.input) |
                    reinterpret_cast<uintptr_t>(problem.left) |
                    reinterpret_cast<uintptr_t>(problem.right);
  const bool may_be_whole = problem.left != nullptr && problem.right != nullptr &&
                            problem.output_count == 1 && problem.input_stride % 4 == 0 &&
                            bits % sizeof(Elements<Element, 4>) == 0;
  return may_be_whole ? Plan::whole(problem.rows, problem.cols, shared_limit)
                      : Plan(problem.rows, problem.cols, shared_limit);
}

// Calls launch(kernel, plan) with what serves the problem.
template <class Element, class Launch>
void with_kernel(const Problem& problem, int shared_limit, Launch&& launch) {
  const Plan plan = plan_of<Element>(problem, shared_limit);
  if (!plan.is_whole) {
    launch(kernel<Element, tile, false>, plan);
  } else if (plan.tile_height == tile) {
    launch(kernel<Element, tile, true>, plan);
  } else {
    launch(kernel<Element, low_tile, true>, plan);
  }
}

}  // namespace flatquant::simt
