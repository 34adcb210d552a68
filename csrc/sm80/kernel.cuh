// The kernels for Ampere and later, on mma.sync. For each token X (rows x cols) two chained
// products:
//   W = left^T @ X    A = left^T, B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (registers: an accumulator fragment is an A fragment), B = right
// A warp computes 16 or 32 rows of W and Y for all columns, so a token takes a group of warps, and
// a token of at most 32 rows a single one. The epilogue reduces the extremes of Y over the group,
// then quantises the accumulators, for one output after the other; the token is read once and its
// codes are written once. Without a left factor the identity is staged, as W is then X to the bit;
// without a right one W is Y, and lanes exchange codes instead.
// resident_kernel: the factors stay in shared memory; a block is groups that work on different
// tokens, each with a ring of stages that it fills itself by cp.async.
// streamed_kernel: for factors that do not fit; the block works on one token and takes left, X and
// right from a ring of slices of 32 rows, out of L2. Tokens of more rows than the registers can
// hold go in passes: all but the last are computed a second time, once the extremes are known.
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

// Rows of the left factor from `first_row` on, padded likewise, by the block; rows of the identity
// if it is not there.
template <class Element>
__device__ __forceinline__ void copy_left(int unit, Element* shared, int pitch,
                                          const Problem& problem, int first_row, Extent padded) {
  const Team team = block_team();
  if (problem.left != nullptr) {
    copy_matrix<32>(unit, shared, pitch,
                    static_cast<const Element*>(problem.left) + first_row * problem.rows,
                    {problem.rows - first_row, problem.rows}, padded, team, InPlace());
    return;
  }
#pragma unroll 1
  for (int pair = team.thread; pair < padded.rows * padded.cols / 2; pair += team.threads) {
    const int row = pair / (padded.cols / 2), col = pair % (padded.cols / 2) * 2;
    const int one = first_row + row;
    *reinterpret_cast<uint32_t*>(shared + row * pitch + col) =
        pack_pair(Element(), col == one ? 1.0f : 0.0f, col + 1 == one ? 1.0f : 0.0f);
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

// Y from W; right_rows(k) is rows k to k + 15 of right, at this lane's offset, for each k in turn.
// Calls in_between() where least is held in registers.
template <class Config, Outputs outputs, class Between, class RightRows>
__device__ __forceinline__ void second_product(Accumulators<Config>& y,
                                               const Accumulators<Config>& w, Between in_between,
                                               RightRows right_rows) {
  if constexpr (outputs == Outputs::left_only) {
#pragma unroll
    for (int tile = 0; tile < Config::row_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < Config::cols / 2; ++i) y[tile][i] = w[tile][i];
    }
    in_between();
  } else {
    uint32_t a[Config::row_tiles][Config::cols / 4];  // W as A fragments
#pragma unroll
    for (int tile = 0; tile < Config::row_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < Config::cols / 4; ++i) {
        a[tile][i] = pack_pair(typename Config::Element(), w[tile][2 * i], w[tile][2 * i + 1]);
      }
    }
    in_between();
    clear<Config>(y);
#pragma unroll
    for (int k = 0; k < Config::cols; k += 16) {
      const uint32_t* pointers[Config::row_tiles];
#pragma unroll
      for (int tile = 0; tile < Config::row_tiles; ++tile) pointers[tile] = &a[tile][k / 4];
      multiply<Config>(y, pointers, right_rows(k));
    }
  }
}

// --- epilogue ---

// This thread's rows of a warp's, the first of which is `row`.
__device__ __forceinline__ ThreadRows thread_rows(int row) {
  const int lane = opaque(static_cast<int>(threadIdx.x % 32));
  return {row + lane / 4, lane % 4};
}

template <class Config, Outputs outputs>
__device__ void exact_transform(Accumulators<Config>& y, const Problem& problem, int64_t token,
                                int row) {
#pragma unroll
  for (int tile = 0; tile < Config::row_tiles; ++tile) {
    exact_transform<typename Config::Element, outputs>(y[tile], problem, token,
                                                       thread_rows(row + 16 * tile));
  }
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

template <class Config, class Reduced>
__device__ __forceinline__ Reduced reduce_tiles(const Accumulators<Config>& y) {
  Reduced result = reduce<Reduced>(y[0]);
  if constexpr (Config::row_tiles == 2) result.include(reduce<Reduced>(y[1]));
  return result;
}

// Of all values of the group. `all` has a place for each of its warps, which may be used again
// after the group's next barrier.
template <class Reduced>
__device__ __forceinline__ Reduced reduce_group(Reduced own, Reduced* all, const Group& group) {
  Reduced result = warp_reduce(own);
  if (group.warps > 1 && threadIdx.x % 32 == 0) all[group.warp] = result;
  group.sync();
  if (group.warps > 1) {
    for (int warp = 0; warp < group.warps; ++warp) result.include(all[warp]);
  }
  return result;
}

template <class Reduced>
__device__ __forceinline__ bool is_finite(const Reduced& reduced) {
  return reduced.magnitude() < INFINITY;
}

// Codes of a warp's rows, the first of which is `row`.
template <class Config, Outputs outputs>
__device__ __forceinline__ void store_codes(const Accumulators<Config>& y, const TokenScale& scale,
                                            const Problem& problem, void* codes, int64_t token,
                                            int row, unsigned char* scratch) {
  with_clamp<false>(scale, [&](auto clamp) {
#pragma unroll
    for (int tile = 0; tile < Config::row_tiles; ++tile) {
      const ThreadRows rows = thread_rows(row + 16 * tile);
      if (problem.cols % 8 != 0) {
        store_codes_of_any_cols<Config::cols, outputs, clamp()>(y[tile], scale, problem, codes,
                                                                token, rows, scratch);
      } else if (problem.storage == Storage::int32) {
        flatquant::store_codes<Config::cols, outputs, Storage::int32, clamp()>(
            y[tile], scale, problem, codes, token, rows);
      } else {
        flatquant::store_codes<Config::cols, outputs, Storage::int8, clamp()>(
            y[tile], scale, problem, codes, token, rows);
      }
    }
  });
}

// All that is stored of a warp's rows, the first of which is `row`; `ratios` of lane_output().
template <class Config, Outputs outputs>
__device__ __forceinline__ void store(const Accumulators<Config>& y,
                                      const Reduced<outputs>& reduced, const Ratios& ratios,
                                      const Problem& problem, int64_t token, int row,
                                      unsigned char* scratch) {
  store_token<outputs, false>(
      problem, token, reduced, ratios, row == 0,
      [&](void* codes, const TokenScale& scale) {
        store_codes<Config, outputs>(y, scale, problem, codes, token, row, scratch);
      },
      [&] {
#pragma unroll
        for (int tile = 0; tile < Config::row_tiles; ++tile) {
          store_transformed<Config::cols, outputs>(y[tile], problem, token,
                                                   thread_rows(row + 16 * tile));
        }
      });
}

// --- kernels ---

template <class Config, Outputs outputs>
__global__ void __launch_bounds__(Config::max_threads, 1)
    resident_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Element = typename Config::Element;
  unsigned char* const memory = dynamic_shared_memory();
  auto* const left = reinterpret_cast<Element*>(memory + plan.left_offset);
  auto* const right = reinterpret_cast<Element*>(memory + plan.right_offset);
  const Group group(plan.warps);
  auto* const ring = reinterpret_cast<Element*>(memory + plan.ring_offset +
                                                group.index * plan.stages * plan.stage_bytes);
  using Reduced = flatquant::Reduced<outputs>;
  Reduced* const all = reinterpret_cast<Reduced*>(memory) + group.index * plan.warps;
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
  copy_left(copy_unit(problem.left, problem.rows, 0), left, plan.left_pitch, problem, 0,
            {depth, plan.left_cols});
  if (problem.right != nullptr) {
    copy_matrix<32>(copy_unit(problem.right, problem.cols, 2), right, Config::pitch,
                    static_cast<const Element*>(problem.right), {problem.cols, problem.cols},
                    {Config::cols, Config::cols}, block_team(), Ordered<Config::cols>());
  }
  // Neighbouring tokens go to different blocks, so that few tokens use many SMs.
  int64_t token = blockIdx.x + static_cast<int64_t>(group.index) * gridDim.x;
  const int64_t step = static_cast<int64_t>(plan.groups) * gridDim.x;
  for (int stage = 0; stage < plan.stages; ++stage) load(stage, token + stage * step);
  cp_async_wait(plan.stages - 1);
  __syncthreads();

  const int row = group.warp * Config::warp_rows;
  const Element* const a = left + row + a_offset(plan.left_pitch);
  const Element* const b = right + b_offset(Config::pitch);
  const Ratios ratios(lane_output(problem));
  int stage = 0;
  for (; token < problem.tokens; token += step) {
    cp_async_wait(plan.stages - 1);
    group.sync();
    const int64_t next = token + plan.stages * step;
    Accumulators<Config> w, y;
    clear<Config>(w);
    first_product<Config>(w, a, plan.left_pitch,
                          ring + stage * (plan.stage_bytes / 2) + b_offset(Config::pitch), depth);
    // An only stage is filled again as early as possible; with more of them that waits for the
    // barrier of the extremes.
    const auto refill = [&] {
      if (plan.stages != 1) return;
      group.sync();
      load(stage, next);
    };
    second_product<Config, outputs>(y, w, refill, [&](int k) { return b + k * Config::pitch; });
    Reduced reduced = reduce_group(reduce_tiles<Config, Reduced>(y), all, group);
    if (plan.stages > 1) {
      load(stage, next);
      stage = stage + 1 < plan.stages ? stage + 1 : 0;
    }
    if (!is_finite(reduced)) {
      exact_transform<Config, outputs>(y, problem, token, row);
      group.sync();
      reduced = reduce_group(reduce_tiles<Config, Reduced>(y), all, group);
    }
    store<Config, outputs>(y, reduced, ratios, problem, token, row, scratch);
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

  const Problem& problem;
  const Plan& plan;
  unsigned char* const memory;
  const int input_unit, left_unit, right_unit;
  const int token_slices, right_slices;
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
        right_slices(problem.right ? round_up(Config::cols, slice_rows) / slice_rows : 0),
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
        copy_left(left_unit, left(fill_stage), plan.left_pitch, problem, first,
                  {slice_rows, plan.left_cols});
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
template <class Config, Outputs outputs>
__device__ __forceinline__ void transform_slices(Accumulators<Config>& y, SliceRing<Config>& ring,
                                                 const Plan& plan, int row) {
  Accumulators<Config> w;
  clear<Config>(w);
#pragma unroll 1
  for (int i = 0; i < ring.token_slices; ++i) {
    const int stage = ring.next();
    first_product<Config>(w, ring.left(stage) + row + a_offset(plan.left_pitch), plan.left_pitch,
                          ring.other(stage) + b_offset(Config::pitch), slice_rows);
  }
  const typename Config::Element* slice = nullptr;
  const auto nothing = [] {};
  second_product<Config, outputs>(y, w, nothing, [&](int k) {
    if (k % slice_rows == 0) slice = ring.other(ring.next()) + b_offset(Config::pitch);
    return slice + k % slice_rows * Config::pitch;
  });
}

template <class Config, Outputs outputs>
__global__ void __launch_bounds__(Config::max_threads, 1)
    streamed_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned char* const memory = dynamic_shared_memory();
  using Reduced = flatquant::Reduced<outputs>;
  auto* const all = reinterpret_cast<Reduced*>(memory);
  const Group group(plan.warps);
  unsigned char* const scratch = memory + Plan::scratch_offset + group.warp * plan.scratch_bytes;
  SliceRing<Config> ring(problem, plan, memory + plan.ring_offset);
  Accumulators<Config> y;
  const auto first_row = [&](int pass) {
    return (pass * plan.warps + group.warp) * Config::warp_rows;
  };

  const Ratios ratios(lane_output(problem));
  for (int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    Reduced reduced;
    for (int pass = 0; pass < plan.passes; ++pass) {
      transform_slices<Config, outputs>(y, ring, plan, first_row(pass));
      reduced.include(reduce_tiles<Config, Reduced>(y));
    }
    reduced = reduce_group(reduced, all, group);
    const bool is_exact = !is_finite(reduced);
    if (is_exact) {
      reduced = Reduced();
      for (int pass = 0; pass < plan.passes; ++pass) {
        exact_transform<Config, outputs>(y, problem, token, first_row(pass));
        reduced.include(reduce_tiles<Config, Reduced>(y));
      }
      group.sync();
      reduced = reduce_group(reduced, all, group);
    }
    // The last pass is still there; the others are computed again.
    for (int pass = plan.passes - 1; pass >= 0; --pass) {
      const int row = first_row(pass);
      if (pass != plan.passes - 1) {
        transform_slices<Config, outputs>(y, ring, plan, row);
        if (is_exact) exact_transform<Config, outputs>(y, problem, token, row);
      }
      store<Config, outputs>(y, reduced, ratios, problem, token, row, scratch);
    }
  }
#endif
}

}  // namespace flatquant::sm80
