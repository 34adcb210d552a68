// The kernels for Ampere and later, on mma.sync. For each token X (rows x cols) two chained
// products:
//   W = left^T @ X    A = left^T, B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (registers: an accumulator fragment is an A fragment), B = right
// A warp computes 16 or 32 rows of W and Y for all columns, so a token takes a group of warps, and
// a token of at most 32 rows a single one. The epilogue reduces max|Y| over the group, then
// quantises the accumulators; the token is read once and its codes are written once.
// resident_kernel: the factors stay in shared memory; a block is groups that work on different
// tokens, each with a ring of stages that it fills itself by cp.async.
// streamed_kernel: for factors that do not fit; the block works on one token and takes left, X and
// right from a ring of slices of 32 rows, out of L2. Tokens of more rows than the registers can
// hold go in passes: all but the last are computed a second time, once max|Y| is known.
// Bound by memory, by shared memory's bandwidth (a B fragment is read for 16 or 32 rows), or by
// tensor cores where rows + cols is large.
#pragma once

#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm80/ampere.cuh"
#include "sm80/config.h"

namespace flatquant::sm80 {

// --- to shared memory ---

// Bytes to copy at once, 2 to 16: what divides the address, a row, and `run` elements: the distance
// between tokens, or as many columns as stay side by side.
__device__ __forceinline__ int copy_unit(const void* pointer, int cols, int64_t run) {
  const auto bits = static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer)) |
                    static_cast<unsigned>(2 * cols) | static_cast<unsigned>(2 * run);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

struct Extent {
  int rows, cols;
};

// Threads that copy together.
struct Team {
  int thread, threads;
};
__device__ __forceinline__ Team block_team() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

struct InPlace {
  __device__ int operator()(int col) const { return col; }
};
// Keeps only pairs of columns together.
template <int cols>
struct Ordered {
  __device__ int operator()(int col) const { return ColumnOrder<cols>::position(col); }
};

// Rows of a matrix to shared memory, padded with zeros from `inside` to `padded`; column col goes
// to position(col). `lanes` neighbouring threads take a row. Asynchronous but for units of 2 bytes.
template <int lanes, class Element, class Position>
__device__ __forceinline__ void copy_matrix(int unit, Element* shared, int pitch,
                                            const Element* global, Extent inside, Extent padded,
                                            Team team, Position position) {
  const int first_row = team.thread / lanes, row_step = team.threads / lanes;
#pragma unroll 1
  for (int col = team.thread % lanes * (unit / 2); col < padded.cols; col += lanes * (unit / 2)) {
    const Element* from = global + first_row * inside.cols + col;
    Element* to = shared + first_row * pitch + position(col);
    const int rows_inside = col < inside.cols ? inside.rows : 0;
#pragma unroll 4
    for (int row = first_row; row < padded.rows; row += row_step) {
      const bool is_inside = row < rows_inside;
      if (unit == 16) {
        cp_async<16>(to, from, is_inside);
      } else if (unit == 8) {
        cp_async<8>(to, from, is_inside);
      } else if (unit == 4) {
        cp_async<4>(to, from, is_inside);
      } else {
        *to = is_inside ? *from : Element(0.0f);
      }
      from += row_step * inside.cols;
      to += row_step * pitch;
    }
  }
}

// A token, padded with zeros to (depth, cols).
template <class Config, class Element>
__device__ __forceinline__ void copy_token(int unit, Element* shared, const Element* token,
                                           Extent inside, int depth, Team team) {
  const auto copy = [&](int fixed_unit) {
    copy_matrix<Config::row_lanes>(fixed_unit, shared, Config::pitch, token, inside,
                                   {depth, Config::cols}, team, InPlace());
  };
  // With its unit known the usual copy is shorter.
  if (unit == 16) {
    copy(16);
  } else {
    copy(unit);
  }
}

// --- products ---

// Accumulators of a warp's rows, a tile of 16 rows after the other (see fragment.cuh).
template <class Config>
using Accumulators = float[Config::row_tiles][Config::cols / 2];

// W as A fragments.
template <class Config>
using Fragments = uint32_t[Config::row_tiles][Config::cols / 4];

template <class Config>
__device__ __forceinline__ void clear(Accumulators<Config>& accumulators) {
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < Config::cols / 2; ++i) accumulators[tile][i] = 0.0f;
  }
}

// What this lane gives ldmatrix the address of, in a (k, col) matrix of which 16 x 16 elements
// become two B fragments side by side: row k = lane % 16, eight columns from lane / 16 * 8.
__device__ __forceinline__ int b_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  return lane % 16 * pitch + lane / 16 * 8;
}
// The same in left, (k, row), of which they become one A fragment of left^T.
__device__ __forceinline__ int a_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
}

// accumulators += a @ b for 16 values of k.
template <class Config>
__device__ __forceinline__ void multiply(Accumulators<Config>& accumulators,
                                         const uint32_t* const (&a)[Config::row_tiles],
                                         const typename Config::Element* b) {
#pragma unroll
  for (int col = 0; col < Config::cols; col += 16) {
    uint32_t fragments[4];
    ldmatrix_transposed(fragments, b + col);
#pragma unroll
    for (int tile = 0; tile < Config::row_tiles; ++tile) {
      mma<typename Config::Element>(&accumulators[tile][col / 2], a[tile], fragments);
      mma<typename Config::Element>(&accumulators[tile][col / 2 + 4], a[tile], fragments + 2);
    }
  }
}

// w += left^T @ token for `depth` values of k, a multiple of 16; left and token are at this lane's
// offsets.
template <class Config>
__device__ __forceinline__ void first_product(Accumulators<Config>& w,
                                              const typename Config::Element* left, int left_pitch,
                                              const typename Config::Element* token, int depth) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[Config::row_tiles][4];
    const uint32_t* pointers[Config::row_tiles];
#pragma unroll
    for (int tile = 0; tile < Config::row_tiles; ++tile) {
      ldmatrix_transposed(a[tile], left + 16 * tile);
      pointers[tile] = a[tile];
    }
    multiply<Config>(w, pointers, token);
    left += 16 * left_pitch;
    token += 16 * Config::pitch;
  }
}

// y += W[:, k .. k + 15] @ right[k .. k + 15, :].
template <class Config>
__device__ __forceinline__ void second_product_step(Accumulators<Config>& y,
                                                    const Fragments<Config>& w, int k,
                                                    const typename Config::Element* right) {
  const uint32_t* pointers[Config::row_tiles];
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) pointers[tile] = &w[tile][k / 4];
  multiply<Config>(y, pointers, right);
}

template <class Config>
__device__ __forceinline__ void to_fragments(Fragments<Config>& fragments,
                                             const Accumulators<Config>& w) {
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < Config::cols / 4; ++i) {
      fragments[tile][i] =
          pack_pair(typename Config::Element(), w[tile][2 * i], w[tile][2 * i + 1]);
    }
  }
}

template <class Config>
__device__ void exact_transform(Accumulators<Config>& y, const Problem& problem, int64_t token,
                                ThreadRows thread) {
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) {
    exact_transform<typename Config::Element>(
        y[tile], problem, token, ThreadRows{thread.first_row + 16 * tile, thread.quad_lane});
  }
}

// --- epilogue ---

// This thread's rows of a warp's, the first of which is `row`.
__device__ __forceinline__ ThreadRows thread_rows(int row) {
  const int lane = threadIdx.x % 32;
  return {row + lane / 4, lane % 4};
}

// The warps that work on one token.
struct Group {
  int index;  // in the block
  int warps;
  int warp;  // this one in the group

  __device__ explicit Group(int group_warps)
      : index(warp_uniform(threadIdx.x / 32 / group_warps)),
        warps(group_warps),
        warp(warp_uniform(threadIdx.x / 32 - index * group_warps)) {}

  __device__ Team team() const {
    return {32 * warp + static_cast<int>(threadIdx.x % 32), 32 * warps};
  }
  __device__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      named_barrier_sync(1 + index, 32 * warps);
    }
  }
};

template <class Config>
__device__ __forceinline__ float tiles_absmax(const Accumulators<Config>& y) {
  float max = absmax(y[0]);
  if constexpr (Config::row_tiles == 2) max = absmax(max, absmax(y[1]));
  return max;
}

// The largest of the group's values, NaN if there is one. `maxima` has a place for each of the
// group's warps, which may be used again after the group's next barrier.
__device__ __forceinline__ float group_max(float max, float* maxima, const Group& group) {
  max = warp_max(max);
  if (group.warps > 1 && threadIdx.x % 32 == 0) maxima[group.warp] = max;
  group.sync();
  if (group.warps > 1) {
    for (int warp = 0; warp < group.warps; ++warp) max = absmax(max, maxima[warp]);
  }
  return max;
}

// Codes of a warp's rows; changes y.
template <class Config>
__device__ __forceinline__ void quantize(Accumulators<Config>& y, const TokenScale& scale,
                                         const Problem& problem, int64_t token, ThreadRows thread,
                                         unsigned char* scratch) {
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) {
    const ThreadRows rows{thread.first_row + 16 * tile, thread.quad_lane};
    if (scale.needs_prepare) {
#pragma unroll
      for (int i = 0; i < Config::cols / 2; ++i) y[tile][i] = scale.prepare(y[tile][i]);
    }
    if (problem.cols % 8 != 0) {
      store_codes_of_any_cols<Config::cols>(y[tile], scale.inverse, problem, token, rows, scratch);
    } else if (problem.storage == Storage::int32) {
      store_codes<Config::cols, Storage::int32>(y[tile], scale.inverse, problem, token, rows);
    } else {
      store_codes<Config::cols, Storage::int8>(y[tile], scale.inverse, problem, token, rows);
    }
  }
}

// --- kernels ---

template <class Config>
__global__ void __launch_bounds__(Config::max_threads, 1)
    resident_kernel(const Problem problem, const Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Element = typename Config::Element;
  unsigned char* const memory = dynamic_shared_memory();
  auto* const left = reinterpret_cast<Element*>(memory + plan.left_offset);
  auto* const right = reinterpret_cast<Element*>(memory + plan.right_offset);
  const Group group(plan.warps);
  auto* const ring = reinterpret_cast<Element*>(memory + plan.ring_offset +
                                                group.index * plan.stages * plan.stage_bytes);
  float* const maxima = reinterpret_cast<float*>(memory) + group.index * plan.warps;
  const int block_warp = group.index * plan.warps + group.warp;
  unsigned char* const scratch = memory + Plan::scratch_offset + block_warp * plan.scratch_bytes;

  const int depth = round_up(problem.rows, 16);
  const auto* input = static_cast<const Element*>(problem.input);
  const int unit = copy_unit(input, problem.cols, problem.input_stride);
  // Starts the copy of a token, if there is one; a group of copies in any case, to be counted.
  const auto load = [&](int stage, int64_t token) {
    if (token < problem.tokens) {
      copy_token<Config>(unit, ring + stage * (plan.stage_bytes / 2),
                         input + token * problem.input_stride, {problem.rows, problem.cols}, depth,
                         group.team());
    }
    cp_async_commit();
  };

  // The factors are in the group of copies of the first token.
  copy_matrix<32>(copy_unit(problem.left, problem.rows, 0), left, plan.left_pitch,
                  static_cast<const Element*>(problem.left), {problem.rows, problem.rows},
                  {depth, plan.left_cols}, block_team(), InPlace());
  copy_matrix<32>(copy_unit(problem.right, problem.cols, 2), right, Config::pitch,
                  static_cast<const Element*>(problem.right), {problem.cols, problem.cols},
                  {Config::cols, Config::cols}, block_team(), Ordered<Config::cols>());
  // Neighbouring tokens go to different blocks, so that few tokens use many SMs.
  int64_t token = blockIdx.x + static_cast<int64_t>(group.index) * gridDim.x;
  const int64_t step = static_cast<int64_t>(plan.groups) * gridDim.x;
  for (int stage = 0; stage < plan.stages; ++stage) load(stage, token + stage * step);
  cp_async_wait(plan.stages - 1);
  __syncthreads();

  const int row = group.warp * Config::warp_rows;
  const Element* const a = left + row + a_offset(plan.left_pitch);
  const Element* const b = right + b_offset(Config::pitch);
  int stage = 0;
  for (; token < problem.tokens; token += step) {
    cp_async_wait(plan.stages - 1);
    group.sync();
    const int64_t next = token + plan.stages * step;
    Fragments<Config> fragments;
    {
      Accumulators<Config> w;
      clear<Config>(w);
      first_product<Config>(w, a, plan.left_pitch,
                            ring + stage * (plan.stage_bytes / 2) + b_offset(Config::pitch), depth);
      to_fragments<Config>(fragments, w);
    }
    // An only stage is filled again as early as possible; with more of them that waits for the
    // barrier of the maximum.
    if (plan.stages == 1) {
      group.sync();
      load(stage, next);
    }
    Accumulators<Config> y;
    clear<Config>(y);
#pragma unroll
    for (int k = 0; k < Config::cols; k += 16) {
      second_product_step<Config>(y, fragments, k, b + k * Config::pitch);
    }
    float max = group_max(tiles_absmax<Config>(y), maxima, group);
    if (plan.stages > 1) {
      load(stage, next);
      stage = stage + 1 < plan.stages ? stage + 1 : 0;
    }
    const ThreadRows thread = thread_rows(row);
    if (!(max < INFINITY)) {
      exact_transform<Config>(y, problem, token, thread);
      group.sync();
      max = group_max(tiles_absmax<Config>(y), maxima, group);
    }
    const TokenScale scale(max, problem.clip_ratio);
    if (group.team().thread == 0) problem.scales[token] = scale.scale;
    quantize<Config>(y, scale, problem, token, thread, scratch);
  }
#endif
}

// The slices of a block in the order in which they are used: for each token, for each of its
// `steps`, those of left and X, then those of right.
struct SlicePosition {
  int64_t token = blockIdx.x;
  int step = 0, slice = 0;

  __device__ void advance(int slices, int steps) {
    if (++slice < slices) return;
    slice = 0;
    if (++step < steps) return;
    step = 0;
    token += gridDim.x;
  }
};

// The ring of slices, filled ahead of their use.
template <class Config>
struct SliceRing {
  using Element = typename Config::Element;
  static constexpr int right_slices = (Config::cols + slice_rows - 1) / slice_rows;

  const Problem& problem;
  const Plan& plan;
  unsigned char* const memory;
  const int input_unit, left_unit, right_unit;
  const int token_slices;
  const int steps;
  SlicePosition filled;  // the next to be filled
  int fill_stage = 0, use_stage = 0;

  __device__ SliceRing(const Problem& the_problem, const Plan& the_plan, unsigned char* ring)
      : problem(the_problem),
        plan(the_plan),
        memory(ring),
        input_unit(copy_unit(problem.input, problem.cols, problem.input_stride)),
        left_unit(copy_unit(problem.left, problem.rows, 0)),
        right_unit(copy_unit(problem.right, problem.cols, 2)),
        token_slices(round_up(problem.rows, slice_rows) / slice_rows),
        steps(2 * plan.passes - 1) {
    for (int i = 1; i < plan.stages; ++i) fill();
  }

  __device__ Element* left(int stage) const {
    return reinterpret_cast<Element*>(memory + stage * plan.stage_bytes);
  }
  // Of X or right, which have the same shape.
  __device__ Element* other(int stage) const { return left(stage) + slice_rows * plan.left_pitch; }

  // Starts the copy of one slice, if there is one.
  __device__ __forceinline__ void fill() {
    if (filled.token < problem.tokens) {
      const int cols = problem.cols;
      if (filled.slice < token_slices) {
        const int first = filled.slice * slice_rows, rows = problem.rows - first;
        copy_matrix<32>(left_unit, left(fill_stage), plan.left_pitch,
                        static_cast<const Element*>(problem.left) + first * problem.rows,
                        {rows, problem.rows}, {slice_rows, plan.left_cols}, block_team(),
                        InPlace());
        copy_matrix<32>(input_unit, other(fill_stage), Config::pitch,
                        static_cast<const Element*>(problem.input) +
                            filled.token * problem.input_stride + first * cols,
                        {rows, cols}, {slice_rows, Config::cols}, block_team(), InPlace());
      } else {
        const int first = (filled.slice - token_slices) * slice_rows;
        copy_matrix<32>(right_unit, other(fill_stage), Config::pitch,
                        static_cast<const Element*>(problem.right) + first * cols,
                        {cols - first, cols}, {slice_rows, Config::cols}, block_team(),
                        Ordered<Config::cols>());
      }
    }
    cp_async_commit();
    filled.advance(token_slices + right_slices, steps);
    fill_stage = fill_stage + 1 < plan.stages ? fill_stage + 1 : 0;
  }

  // Waits for the next slice, starts the copy of a later one to where the last was, and returns the
  // stage.
  __device__ __forceinline__ int next() {
    cp_async_wait(plan.stages - 2);
    __syncthreads();
    fill();
    const int stage = use_stage;
    use_stage = use_stage + 1 < plan.stages ? use_stage + 1 : 0;
    return stage;
  }
};

// Y of a warp's rows, the first of which is `row`.
template <class Config>
__device__ __forceinline__ void transform_slices(Accumulators<Config>& y, SliceRing<Config>& ring,
                                                 const Plan& plan, int row) {
  Fragments<Config> fragments;
  {
    Accumulators<Config> w;
    clear<Config>(w);
#pragma unroll 1
    for (int i = 0; i < ring.token_slices; ++i) {
      const int stage = ring.next();
      first_product<Config>(w, ring.left(stage) + row + a_offset(plan.left_pitch), plan.left_pitch,
                            ring.other(stage) + b_offset(Config::pitch), slice_rows);
    }
    to_fragments<Config>(fragments, w);
  }
  clear<Config>(y);
#pragma unroll
  for (int first = 0; first < Config::cols; first += slice_rows) {
    const auto* right = ring.other(ring.next()) + b_offset(Config::pitch);
#pragma unroll
    for (int k = 0; k < slice_rows && first + k < Config::cols; k += 16) {
      second_product_step<Config>(y, fragments, first + k, right + k * Config::pitch);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::max_threads, 1)
    streamed_kernel(const Problem problem, const Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned char* const memory = dynamic_shared_memory();
  float* const maxima = reinterpret_cast<float*>(memory);
  const Group group(plan.warps);
  unsigned char* const scratch = memory + Plan::scratch_offset + group.warp * plan.scratch_bytes;
  SliceRing<Config> ring(problem, plan, memory + plan.ring_offset);
  Accumulators<Config> y;
  const auto first_row = [&](int pass) {
    return (pass * plan.warps + group.warp) * Config::warp_rows;
  };

  for (int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    float max = 0.0f;
    for (int pass = 0; pass < plan.passes; ++pass) {
      transform_slices<Config>(y, ring, plan, first_row(pass));
      max = absmax(max, tiles_absmax<Config>(y));
    }
    max = group_max(max, maxima, group);
    const bool is_exact = !(max < INFINITY);
    if (is_exact) {
      max = 0.0f;
      for (int pass = 0; pass < plan.passes; ++pass) {
        exact_transform<Config>(y, problem, token, thread_rows(first_row(pass)));
        max = absmax(max, tiles_absmax<Config>(y));
      }
      group.sync();
      max = group_max(max, maxima, group);
    }
    const TokenScale scale(max, problem.clip_ratio);
    if (threadIdx.x == 0) problem.scales[token] = scale.scale;
    // The last pass is still there; the others are computed again.
    for (int pass = plan.passes - 1; pass >= 0; --pass) {
      const ThreadRows thread = thread_rows(first_row(pass));
      if (pass != plan.passes - 1) {
        transform_slices<Config>(y, ring, plan, first_row(pass));
        if (is_exact) exact_transform<Config>(y, problem, token, thread);
      }
      quantize<Config>(y, scale, problem, token, thread, scratch);
    }
  }
#endif
}

}  // namespace flatquant::sm80
