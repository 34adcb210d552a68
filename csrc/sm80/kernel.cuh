// The kernels for Ampere and later, on mma.sync. For each token X (rows x cols) two chained
// products:
//   W = left^T @ X    A = left^T, B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (an accumulator fragment is an A fragment), B = right
// float32 is multiplied as TF32, at Precision::highest as sums of two of it (3xTF32), by the
// resident kernel; it lies in shared memory as it is, and W stays float32.
// A warp computes 32 rows of W and Y for all columns or, where those are many, for a half or a
// quarter; then each of these warps needs all of W's columns, which goes through shared memory, in
// place of X where that stays there as a whole. A token takes a group of warps, a single one if it
// is small. The epilogue reduces the extremes of Y over the group, then quantises the accumulators,
// for one output after the other; the token is read once and its codes are written once. Without a
// left factor the identity is staged, as W is then X; without a right one W is Y, and lanes
// exchange codes instead.
// resident_kernel: the factors stay in shared memory; a block is groups that work on different
// tokens, each with a ring of stages that it fills itself by cp.async, the last tokens as groups
// get to them. The right factor arrives while the first product of each group's first token runs.
// streamed_kernel: for factors that do not fit; the block works on one token and takes left, X and
// right from a ring of slices of some rows, out of L2. Tokens of more rows than the registers can
// hold go in passes: all but the last are computed a second time, once the extremes are known.
// Bound by memory, by the instructions of a token, or by tensor cores where rows + cols is large.
#pragma once

#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm80/ampere.cuh"
#include "sm80/config.h"
#include "token_source.cuh"

namespace flatquant::sm80 {

// --- to shared memory ---

// Bytes to copy at once, an element to 16: what divides the address, a row, and `run` elements: the
// distance between tokens, or as many columns as stay side by side.
template <class Element>
__host__ __device__ __forceinline__ int copy_unit(const void* pointer, int cols, int64_t run) {
  constexpr int size = sizeof(Element);
  const auto bits = static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer)) |
                    static_cast<unsigned>(size * cols) | static_cast<unsigned>(size * run);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

// Calls use(unit), an integral_constant; `unit` is at most `largest`.
template <class Element, int largest, class Use>
__device__ __forceinline__ void with_unit(int unit, Use use) {
  if (unit == largest) {
    use(std::integral_constant<int, largest>());
  } else if constexpr (largest > static_cast<int>(sizeof(Element))) {
    with_unit<Element, largest / 2>(unit, use);
  }
}

struct Extent {
  int rows, cols;
};

__device__ __forceinline__ Team block_team() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

struct InPlace {
  __device__ int operator()(int col) const { return col; }
};
// The order of each part of the columns; keeps only pairs of them together.
template <int warp_cols>
struct Ordered {
  __device__ int operator()(int col) const {
    return col / warp_cols * warp_cols + ColumnOrder<warp_cols>::position(col % warp_cols);
  }
};

// `unit` bytes, zeros unless `inside`. Asynchronous but for 2 bytes.
template <int unit, class Element>
__device__ __forceinline__ void copy_units(Element* shared, const Element* global, bool inside) {
  if constexpr (unit == 2) {
    *shared = inside ? *global : Element(0.0f);
  } else {
    cp_async<unit>(shared, global, inside);
  }
}

// Rows of a matrix to shared memory, padded with zeros from `inside` to `padded`; column col goes
// to position(col). 32 neighbouring threads take a row.
template <int unit, class Element, class Position>
__device__ __forceinline__ void copy_matrix(Element* shared, int pitch, const Element* global,
                                            int global_pitch, Extent inside, Extent padded,
                                            Team team, Position position) {
  constexpr int elements = unit / sizeof(Element);
  const int first_row = team.thread / 32, row_step = team.threads / 32;
#pragma unroll 1
  for (int col = team.thread % 32 * elements; col < padded.cols; col += 32 * elements) {
    const Element* from = global + first_row * global_pitch + col;
    Element* to = shared + first_row * pitch + position(col);
    const int rows_inside = col < inside.cols ? inside.rows : 0;
#pragma unroll 4
    for (int row = first_row; row < padded.rows; row += row_step) {
      copy_units<unit>(to, from, row < rows_inside);
      from += row_step * global_pitch;
      to += row_step * pitch;
    }
  }
}

// `padded.rows` rows of the left factor from `first_row` on, of each the columns from `first_col`
// on; those of the identity if it is not there.
template <class Element>
__device__ __forceinline__ void copy_left(int unit, Element* shared, int pitch,
                                          const Problem& problem, int first_row, int first_col,
                                          Extent padded, Team team) {
  const int size = problem.rows;
  if (problem.left != nullptr) {
    const auto* left = static_cast<const Element*>(problem.left) + first_row * size + first_col;
    with_unit<Element, 16>(unit, [&](auto fixed_unit) {
      copy_matrix<fixed_unit()>(shared, pitch, left, size, {size - first_row, size - first_col},
                                padded, team, InPlace());
    });
    return;
  }
#pragma unroll 1
  for (int pair = team.thread; pair < padded.rows * padded.cols / 2; pair += team.threads) {
    const int row = pair / (padded.cols / 2), col = pair % (padded.cols / 2) * 2;
    const int one = first_row + row - first_col;
    const float first = col == one ? 1.0f : 0.0f, second = col + 1 == one ? 1.0f : 0.0f;
    Element* const to = shared + row * pitch + col;
    if constexpr (sizeof(Element) == 4) {
      *reinterpret_cast<float2*>(to) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(to) = pack_pair(Element(), first, second);
    }
  }
}

// The right factor, padded with zeros, by pairs of columns: no more of them stay side by side in
// ColumnOrder. Asynchronous where they are aligned to 4 bytes or more.
template <class Config, class Element>
__device__ __forceinline__ void copy_right(Element* shared, const Problem& problem) {
  const auto* right = static_cast<const Element*>(problem.right);
  const int size = problem.cols;
  with_unit<Element, 2 * sizeof(Element)>(copy_unit<Element>(right, size, 2), [&](auto unit) {
    copy_matrix<unit()>(shared, Config::pitch, right, size, {size, size},
                        {Config::cols, Config::cols}, block_team(), Ordered<Config::warp_cols>());
  });
}

// What a warp computes of a token's W and Y: the first of its 32 rows and of its columns.
template <class Config>
struct WarpTile {
  int row, col;

  __device__ explicit WarpTile(int warp, int first_row = 0)
      : row(first_row + warp / Config::parts * warp_rows),
        col(warp % Config::parts * Config::warp_cols) {}
};

// The warp's tile of a token, padded with zeros up to row `depth` and to all its columns.
template <class Config, int unit, class Element>
__device__ __forceinline__ void copy_tile(Element* shared, const Element* token,
                                          const Problem& problem, WarpTile<Config> tile,
                                          int depth) {
  constexpr int lanes = Config::row_lanes, row_step = 32 / lanes;
  constexpr int elements = unit / sizeof(Element);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < Config::warp_cols; first += lanes * elements) {
    const int col = tile.col + first + lane % lanes * elements;
    if (first + lane % lanes * elements >= Config::warp_cols) continue;
    const int row = tile.row + lane / lanes;
    const int rows_inside = col < problem.cols ? problem.rows - row : 0;
    const Element* from = token + row * problem.cols + col;
    Element* const to = shared + row * Config::pitch + col;
#pragma unroll
    for (int half = 0; half < warp_rows; half += 16) {
      if (tile.row + half >= depth) break;
#pragma unroll
      for (int i = half; i < half + 16; i += row_step) {
        copy_units<unit>(to + i * Config::pitch, from, i < rows_inside);
        from += row_step * problem.cols;
      }
    }
  }
}

// The same of a token that needs no padding, by a few instructions: addresses are constants but for
// one in the middle of each 16 rows, which is as far as constants reach. Not opaque, each address
// would be computed.
template <class Config, class Element>
__device__ __forceinline__ void copy_whole_tile(Element* shared, const Element* token,
                                                WarpTile<Config> tile, int depth, bool exists) {
  constexpr int lanes = Config::row_lanes, row_step = 32 / lanes;
  constexpr int elements = 16 / sizeof(Element);
  static_assert(lanes * elements >= Config::warp_cols);
  const int lane = threadIdx.x % 32, row = tile.row + lane / lanes, col = lane % lanes * elements;
  const Element* const from = token + row * Config::cols + tile.col + col;
  Element* const to = shared + row * Config::pitch + tile.col + col;
#pragma unroll
  for (int half = 0; half < warp_rows; half += 16) {
    const bool is_copied = exists && col < Config::warp_cols && tile.row + half < depth;
    const Element* const middle = opaque(from + (half + 8) * Config::cols);
#pragma unroll
    for (int i = 0; i < 16; i += row_step) {
      cp_async_if(is_copied, to + (half + i) * Config::pitch, middle + (i - 8) * Config::cols);
    }
  }
}

// --- products ---

constexpr int row_tiles = warp_rows / 16;

// Accumulators of a warp's rows, a tile of 16 rows after the other (see fragment.cuh).
template <class Config>
using Accumulators = float[row_tiles][Config::warp_cols / 2];

template <class Config>
__device__ __forceinline__ void clear(Accumulators<Config>& accumulators) {
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < Config::warp_cols / 2; ++i) accumulators[tile][i] = 0.0f;
  }
}

// Values of k come in steps, those of one instruction. In a (k, col) matrix in shared memory this
// is where a lane begins to load its parts of a step: what it gives ldmatrix the address of, row
// lane % 16, eight columns from lane / 16 * 8, of which 16 x 16 elements become two B fragments
// side by side; of float32 row 2 * (lane % 4), column lane / 4.
template <class Element>
__device__ __forceinline__ int b_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Element) == 4) return lane % 4 * 2 * pitch + lane / 4;
  return lane % 16 * pitch + lane / 16 * 8;
}
// The same in left, (k, row), of which they become one A fragment of left^T.
template <class Element>
__device__ __forceinline__ int a_offset(int pitch) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Element) == 4) return b_offset<Element>(pitch);
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
}

// The A fragments of a step, a tile after the other; and the B fragments of 16 columns.
using AFragments = uint32_t[row_tiles][4];
using BFragment = uint32_t[4];

// An instruction for float32 has its k and k + 4 in one lane. Which of the matrices' values those
// are is free, as long as it is so for A and B: here 2 * k and 2 * k + 1, which lie in one lane of
// W's accumulators.

template <class Config>
__device__ __forceinline__ void load_b(BFragment& b, const typename Config::Element* from) {
  if constexpr (Config::is_float32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = float_bits(from[i % 2 * Config::pitch + i / 2 * 8]);
  } else {
    ldmatrix_transposed(b, from);
  }
}

// Of left^T; `left` is at this lane's offset.
template <class Element>
__device__ __forceinline__ void load_left(AFragments& a, const Element* left, int pitch) {
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
    const Element* const from = left + 16 * tile;
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[tile][i] = float_bits(from[i % 2 * 8 + i / 2 * pitch]);
    } else {
      ldmatrix_transposed(a[tile], from);
    }
  }
}

// Of a step of a warp's columns of W, from column k on; 16-bit elements are rounded.
template <class Config>
__device__ __forceinline__ void fragments_of_w(AFragments& a, const Accumulators<Config>& w,
                                               int k) {
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
    const float* const values = &w[tile][k / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Config::is_float32) {
        a[tile][i] = float_bits(values[i % 2 * 2 + i / 2]);
      } else {
        a[tile][i] = pack_pair(typename Config::Element(), values[2 * i], values[2 * i + 1]);
      }
    }
  }
}

// W of a pass in shared memory, as each lane's part of the A fragments that all warps of the same
// rows need.
template <class Config>
class SharedW {
 public:
  __device__ SharedW(void* shared, WarpTile<Config> tile, int first_row)
      : fragments_(static_cast<uint4*>(shared) +
                   (tile.row - first_row) / 16 * (Config::cols / Config::step) * 32 +
                   threadIdx.x % 32),
        first_step_(tile.col / Config::step) {}

  // All of this warp's columns.
  __device__ __forceinline__ void store(const Accumulators<Config>& w) const {
#pragma unroll
    for (int k = 0; k < Config::warp_cols; k += Config::step) {
      AFragments a;
      fragments_of_w<Config>(a, w, k);
#pragma unroll
      for (int tile = 0; tile < row_tiles; ++tile) {
        fragments_[((first_step_ + k / Config::step) * row_tiles + tile) * 32] =
            make_uint4(a[tile][0], a[tile][1], a[tile][2], a[tile][3]);
      }
    }
  }
  // Of the step from column k on.
  __device__ __forceinline__ void load(AFragments& a, int k) const {
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      const uint4 fragment = fragments_[(k / Config::step * row_tiles + tile) * 32];
      a[tile][0] = fragment.x;
      a[tile][1] = fragment.y;
      a[tile][2] = fragment.z;
      a[tile][3] = fragment.w;
    }
  }

 private:
  uint4* fragments_;
  int first_step_;
};

// The B fragments of a step.
template <class Config>
using BFragments = BFragment[Config::warp_cols / 16];

// A float32 as the sum of two of TF32, of whose bits tensor cores ignore those that TF32 has not.
// Of NaN and Inf, and of what is rounded to Inf, they leave a Y that is NaN or Inf.
__device__ __forceinline__ void split_tf32(uint32_t& large, uint32_t& small, uint32_t value) {
  large = (value + 0x1000u) & 0xffffe000u;
  small = float_bits(bits_float(value) - bits_float(large));
}

// d += a @ b for a step and 16 columns of one tile.
template <class Element>
__device__ __forceinline__ void multiply_tile(float* d, const uint32_t (&a)[4],
                                              const BFragment& b) {
  mma<Element>(d, a, b);
  mma<Element>(d + 4, a, b + 2);
}

// accumulators += a @ b for a step and 16 columns.
template <class Config>
__device__ __forceinline__ void multiply(Accumulators<Config>& accumulators, int col,
                                         const AFragments& a, const BFragment& b) {
  using Element = typename Config::Element;
  if constexpr (Config::splits) {
    AFragments large_a, small_a;
    BFragment large_b, small_b;
#pragma unroll
    for (int i = 0; i < 4 * row_tiles; ++i) {
      split_tf32(large_a[i / 4][i % 4], small_a[i / 4][i % 4], a[i / 4][i % 4]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(large_b[i], small_b[i], b[i]);
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      // Of a step alone, as tensor cores do not round a sum but cut it off, the more of it the
      // larger it is: with the accumulators all errors would be of one sign. The product of the
      // small parts is beyond what float32 keeps.
      float sums[8] = {};
      multiply_tile<Element>(sums, small_a[tile], large_b);
      multiply_tile<Element>(sums, large_a[tile], small_b);
      multiply_tile<Element>(sums, large_a[tile], large_b);
#pragma unroll
      for (int i = 0; i < 8; ++i) accumulators[tile][col / 2 + i] += sums[i];
    }
  } else {
    AFragments rounded_a;
    BFragment rounded_b;
#pragma unroll
    for (int i = 0; i < 4 * row_tiles; ++i) {
      const uint32_t value = a[i / 4][i % 4];
      rounded_a[i / 4][i % 4] = Config::is_float32 ? round_to_tf32(value) : value;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded_b[i] = Config::is_float32 ? round_to_tf32(b[i]) : b[i];
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      multiply_tile<Element>(&accumulators[tile][col / 2], rounded_a[tile], rounded_b);
    }
  }
}

// The same for all columns. With `has_next` what has been read of b is replaced by what is at
// `next`, at this lane's offset.
template <class Config, bool has_next>
__device__ __forceinline__ void multiply(Accumulators<Config>& accumulators, const AFragments& a,
                                         BFragments<Config>& b,
                                         const typename Config::Element* next) {
#pragma unroll
  for (int col = 0; col < Config::warp_cols; col += 16) {
    multiply<Config>(accumulators, col, a, b[col / 16]);
    if constexpr (has_next) load_b<Config>(b[col / 16], next + col);
  }
}

// The same, with b from shared memory.
template <class Config>
__device__ __forceinline__ void multiply(Accumulators<Config>& accumulators, const AFragments& a,
                                         const typename Config::Element* b) {
#pragma unroll
  for (int col = 0; col < Config::warp_cols; col += 16) {
    BFragment fragment;
    load_b<Config>(fragment, b + col);
    multiply<Config>(accumulators, col, a, fragment);
  }
}

// d = a @ b for `depth` values of k, a multiple of 16; load_a(a, k) gives the fragments.
template <class Config, class LoadA>
__device__ __forceinline__ void product(Accumulators<Config>& d, int depth, LoadA load_a,
                                        const typename Config::Element* b) {
  const auto step = [&](int k) {
    AFragments a;
    load_a(a, k);
    multiply<Config>(d, a, b + k * Config::pitch);
  };
  // Apart from the others the first needs no accumulators that are zero.
  clear<Config>(d);
  step(0);
#pragma unroll 1
  for (int k = Config::step; k < depth; k += Config::step) step(k);
}

// The same; loads each step's fragments during the one before. (Written so as it is: by other forms
// of the same the compiler makes code that is up to 7% slower at 128 columns.)
template <class Config, class LoadA>
__device__ __forceinline__ void product_loading_ahead(Accumulators<Config>& d, int depth,
                                                      LoadA load_a,
                                                      const typename Config::Element* b) {
  clear<Config>(d);
  AFragments a;
  BFragments<Config> fragments;
  load_a(a, 0);
#pragma unroll
  for (int col = 0; col < Config::warp_cols; col += 16) {
    load_b<Config>(fragments[col / 16], b + col);
  }
  const auto step = [&](int next) {
    AFragments next_a;
    load_a(next_a, next);
    multiply<Config, true>(d, a, fragments, b + next * Config::pitch);
#pragma unroll
    for (int i = 0; i < 4 * row_tiles; ++i) a[i / 4][i % 4] = next_a[i / 4][i % 4];
  };
  if (depth == Config::step) {
    multiply<Config, false>(d, a, fragments, nullptr);
    return;
  }
  step(Config::step);
  // Where registers are left, twice as much code spares copies of the fragments.
#pragma unroll Config::shares_w ? 2 : 1
  for (int next = 2 * Config::step; next < depth; next += Config::step) step(next);
  multiply<Config, false>(d, a, fragments, nullptr);
}

// y = W @ right, with W in this warp's registers. Calls in_between() where least is held in them.
template <class Config, class Between>
__device__ __forceinline__ void product_of_registers(Accumulators<Config>& y,
                                                     const Accumulators<Config>& w,
                                                     Between in_between,
                                                     const typename Config::Element* right) {
  AFragments a[Config::cols / Config::step];
#pragma unroll
  for (int k = 0; k < Config::cols; k += Config::step) {
    fragments_of_w<Config>(a[k / Config::step], w, k);
  }
  in_between();
  clear<Config>(y);
#pragma unroll
  for (int k = 0; k < Config::cols; k += Config::step) {
    multiply<Config>(y, a[k / Config::step], right + k * Config::pitch);
  }
}

template <class Config>
__device__ __forceinline__ void copy(Accumulators<Config>& to, const Accumulators<Config>& from) {
#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < Config::warp_cols / 2; ++i) to[tile][i] = from[tile][i];
  }
}

// --- epilogue ---

// This thread's rows of one of the 16-row tiles of a warp's.
template <class Config>
__device__ __forceinline__ ThreadRows thread_rows(WarpTile<Config> tile, int row_tile) {
  const int lane = opaque(static_cast<int>(threadIdx.x % 32));
  return {tile.row + 16 * row_tile + lane / 4, lane % 4, tile.col};
}

template <class Config, Outputs outputs>
__device__ void exact_transform(Accumulators<Config>& y, const Problem& problem, int64_t token,
                                WarpTile<Config> tile) {
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
    exact_transform<typename Config::Element, outputs>(y[i], problem, token, thread_rows(tile, i));
  }
}

// To be called by all threads, before a block barrier.
__device__ __forceinline__ void clear_extremes(unsigned char* memory, const Plan& plan) {
  const int bytes = plan.groups * plan.extremes_size() * 8;
  if (threadIdx.x < bytes / 16) {
    reinterpret_cast<uint4*>(memory + plan.extremes_offset)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  }
}

// Those from 1 on are of groups of two warps or more.
constexpr int right_barrier = 15;
static_assert(max_warps(16, false, 2) / 2 < right_barrier);

// The warps that work on one token.
struct Group {
  int index;  // in the block
  int warps;
  int warp;  // this one in the group

  __device__ explicit Group(int group_warps)
      : index(warp_uniform(threadIdx.x / 32 / group_warps)),
        warps(opaque(group_warps)),  // or it would be loaded before each barrier
        warp(warp_uniform(threadIdx.x / 32 - index * group_warps)) {}

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
#pragma unroll
  for (int i = 1; i < row_tiles; ++i) result.include(reduce<Reduced>(y[i]));
  return result;
}

// Of all values of the group. `all` has a place for each of its warps, which may be used again
// after the group's next barrier, and zeros up to a multiple of four.
template <class Reduced>
__device__ __forceinline__ Reduced reduce_group(Reduced own, Reduced* all, const Group& group) {
  Reduced result = warp_reduce(own);
  if (group.warps == 1) {
    __syncwarp();
    return result;
  }
  if (threadIdx.x % 32 == 0) all[group.warp] = result;
  group.sync();
  const Reduced* const end = all + group.warps;
#pragma unroll 1
  for (; all < end; all += 4) include_all<4>(result, all);
  return result;
}

// Below it TF32's smallest number, 2^-136, could show in max|Y|, even of factors that make X
// larger.
constexpr float least_magnitude = 0x1p-64f;

// Whether a token is to be computed again exactly: where Y holds Inf or NaN; of float32 also where
// it is tiny, unless X is zero. `all` as for reduce_group(), which has given `reduced`.
template <class Config, class Reduced>
__device__ __forceinline__ bool needs_exact(const Reduced& reduced, const Problem& problem,
                                            int64_t token, Reduced* all, const Group& group) {
  const float magnitude = reduced.magnitude();
  if constexpr (!Config::is_float32) return !(magnitude < INFINITY);
  if (__builtin_expect(magnitude >= least_magnitude && magnitude < INFINITY, true)) return false;
  if (magnitude != 0.0f) return true;
  const float* const x = static_cast<const float*>(problem.input) + token * problem.input_stride;
  const int features = problem.rows * problem.cols, threads = group.warps * 32;
  Reduced of_x;
#pragma unroll 1
  for (int first = group.warp * 32 + threadIdx.x % 32; first < features; first += 8 * threads) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int feature = first + i * threads;
      values[i] = feature < features ? x[feature] : 0.0f;
    }
    of_x.include(reduce<Reduced>(values));
  }
  group.sync();
  return reduce_group(of_x, all, group).magnitude() != 0.0f;
}

// Calls use(store) with what stores codes of a warp's tile, of the problem's storage. `scratch` is
// that of the warps of the same rows.
template <class Config, Outputs outputs, bool is_whole, class Use>
__device__ __forceinline__ void with_store(const Accumulators<Config>& y, const Problem& problem,
                                           int64_t token, WarpTile<Config> tile,
                                           unsigned char* scratch, const Group& group, Use use) {
  constexpr int cols = Config::warp_cols;
  static_assert(Config::parts == 1 || cols % (8 << ColumnOrder<cols>::widest) == 0,
                "all parts store vectors of words");
  const auto for_tiles = [&](auto store_tile) {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      if (is_whole && tile.row + 16 * i >= problem.rows) break;
      store_tile(y[i], thread_rows(tile, i));
    }
  };
  if (!is_whole && problem.cols % 8 != 0) {
    const int thread = tile.col / cols * 32 + static_cast<int>(threadIdx.x % 32);
    const auto sync = [&] {
      if (Config::parts == 1) {
        __syncwarp();
      } else {
        group.sync();
      }
    };
    use([&](void* codes, const TokenScale& scale, auto clamp) {
      for_tiles([&](const auto& values, ThreadRows rows) {
        store_codes_of_any_cols<cols, outputs, clamp()>(values, scale, problem, codes, token, rows,
                                                        scratch, {thread, 32 * Config::parts},
                                                        sync);
      });
    });
    return;
  }
  with_storage(problem, [&](auto storage) {
    use([&, token = opaque(token)](void* codes, const TokenScale& scale, auto clamp) {
      for_tiles([&](const auto& values, ThreadRows rows) {
        store_codes<cols, outputs, storage(), clamp(), is_whole>(values, scale, problem, codes,
                                                                 token, rows);
      });
    });
  });
}

// All that is stored of a warp's tile; `ratios` of lane_output().
template <class Config, Outputs outputs, bool is_whole>
__device__ __forceinline__ void store(const Accumulators<Config>& y,
                                      const Reduced<outputs>& reduced, const Ratios& ratios,
                                      const Problem& problem, int64_t token, WarpTile<Config> tile,
                                      unsigned char* scratch, const Group& group) {
  store_token<outputs, false>(
      problem, token, reduced, ratios, tile.row == 0 && tile.col == 0,
      [&](auto use) {
        with_store<Config, outputs, is_whole>(y, problem, token, tile, scratch, group, use);
      },
      [&] {
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          store_transformed<Config::warp_cols, outputs>(y[i], problem, token, thread_rows(tile, i));
        }
      });
}

// --- kernels ---

// How a block's groups deal out the tokens, see TokenSource.
struct Deal {
  const Plan& plan;

  __device__ uint32_t step() const { return plan.groups * gridDim.x; }
  __device__ uint32_t held() const { return (plan.stages + 1) * step(); }
};

// Whether a problem's tokens fill all columns and whole tiles of rows and are copied by 16 bytes.
template <class Config>
bool needs_no_padding(const Problem& problem, const Plan& plan) {
  return problem.cols == Config::cols && problem.rows % 16 == 0 &&
         copy_unit<typename Config::Element>(problem.input, problem.cols, problem.input_stride) ==
             16 &&
         plan.threads() <= Config::max_whole_threads;
}

// With `is_whole` for such problems only: then little code is left, and next to none that jumps,
// which costs as much as dozens of instructions.
template <class Config, Outputs outputs, bool is_whole>
__global__ void __launch_bounds__(is_whole ? Config::max_whole_threads : Config::max_threads, 1)
    resident_kernel(const FLATQUANT_GRID_CONSTANT Problem problem,
                    const FLATQUANT_GRID_CONSTANT Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Element = typename Config::Element;
  unsigned char* const memory = dynamic_shared_memory();
  auto* const left = reinterpret_cast<Element*>(memory + plan.left_offset);
  auto* const right = reinterpret_cast<Element*>(memory + plan.right_offset);
  const Group group(plan.warps);
  const WarpTile<Config> tile(group.warp);
  unsigned char* const ring =
      memory + plan.ring_offset + group.index * plan.stages * plan.stage_bytes;
  using Reduced = flatquant::Reduced<outputs>;
  Reduced* const all = reinterpret_cast<Reduced*>(memory + plan.extremes_offset) +
                       group.index * plan.extremes_size();
  const int row_block = (group.index * plan.pass_rows + tile.row) / warp_rows;
  unsigned char* const scratch = memory + plan.scratch_offset + row_block * plan.scratch_bytes;

  const int depth = round_up(problem.rows, 16);
  const auto* input = static_cast<const Element*>(problem.input);
  const auto x_of = [&](int stage) {
    return reinterpret_cast<Element*>(ring + stage * plan.stage_bytes);
  };
  // Starts the copy of a token, if there is one; a group of copies in any case, to be counted.
  const auto load = [&](int stage, uint32_t token) {
    const bool exists = token < problem.tokens;
    const Element* const from = input + token * problem.input_stride;
    if constexpr (is_whole) {
      copy_whole_tile<Config>(x_of(stage), from, tile, depth, exists);
    } else if (exists) {
      const int unit = copy_unit<Element>(input, problem.cols, problem.input_stride);
      with_unit<Element, 16>(unit, [&](auto fixed_unit) {
        copy_tile<Config, fixed_unit()>(x_of(stage), from, problem, tile, depth);
      });
    }
    cp_async_commit();
  };

  // Neighbouring tokens go to different blocks, so that few tokens use many SMs.
  const Deal deal{plan};
  const uint32_t first = blockIdx.x + group.index * gridDim.x;
  uint32_t* const tokens =  // which one each stage holds
      reinterpret_cast<uint32_t*>(memory) + group.index * max_stages;
  const bool is_leader = group.warp == 0 && threadIdx.x % 32 == 0;
  load(0, first);
  clear_extremes(memory, plan);
  copy_left(copy_unit<Element>(problem.left, problem.rows, 0), left, plan.left_pitch, problem, 0, 0,
            {depth, plan.pass_rows}, block_team());
  cp_async_commit();
  if (problem.right != nullptr) copy_right<Config>(right, problem);
  cp_async_commit();
  if (is_leader) {
    for (int i = 0; i < plan.stages; ++i) tokens[i] = first + i * deal.step();
  }
  TokenSource source(problem.tokens, problem.counter, first + plan.stages * deal.step(), deal);
  cp_async_wait(1);
  __syncthreads();

  // Opaque, as the compiler would compute them again for each token.
  const int a = opaque(tile.row + a_offset<Element>(plan.left_pitch));
  const int b = opaque(tile.col + b_offset<Element>(Config::pitch));
  const Ratios ratios(lane_output(problem));
  // An only stage is filled again as early as possible; with more of them, or if it takes W, that
  // waits for the barrier of the extremes.
  const bool refills_early = plan.stages == 1 && !Config::shares_w;
  // Groups of copies that have been started after the one that a product 1 needs: at first that of
  // right, then those of all tokens further on.
  int later_copies = 1;
  bool is_first = true;  // which token is its own first one a group does not know, see TokenSource
  int stage = 0;
  uint32_t token = first;
  if (token >= problem.tokens) {  // the others need this group's part of right
    cp_async_wait(0);
    named_barrier_arrive(right_barrier, plan.threads());
  }
  while (token < problem.tokens) {
    cp_async_wait(later_copies);
    group.sync();
    // Which token the stage is filled with next, to be known past the barrier that this waits for.
    const auto draw = [&] {
      if (is_leader) source.take(&tokens[stage]);
    };
    if constexpr (Config::shares_w) draw();
    Accumulators<Config> w, y;
    const auto multiply_all = [&](Accumulators<Config>& d, int depth, auto load_a,
                                  const Element* from) {
      if constexpr (Config::loads_ahead(is_whole)) {
        product_loading_ahead<Config>(d, depth, load_a, from);
      } else {
        product<Config>(d, depth, load_a, from);
      }
    };
    multiply_all(
        w, depth,
        [&](AFragments& fragments, int k) {
          load_left(fragments, left + a + k * plan.left_pitch, plan.left_pitch);
        },
        x_of(stage) + b);
    // Right had the first product 1 to arrive in. Only now the tokens further on, which would have
    // competed with it for the memory's bandwidth.
    if (is_first) {
      is_first = false;
      cp_async_wait(0);
      named_barrier_sync(right_barrier, plan.threads());
      later_copies = plan.stages - 1;
      for (int i = 1; i < plan.stages; ++i) load(i, tokens[i]);
    }
    const auto refill_early = [&] {
      if (!refills_early) return;
      draw();
      group.sync();
      load(stage, tokens[stage]);
    };
    if constexpr (outputs == Outputs::left_only) {
      copy<Config>(y, w);
      refill_early();
    } else if constexpr (Config::shares_w) {
      const SharedW<Config> shared_w(x_of(stage), tile, 0);
      group.sync();  // X has been read
      shared_w.store(w);
      group.sync();
      multiply_all(
          y, Config::cols, [&](AFragments& fragments, int k) { shared_w.load(fragments, k); },
          right + b);
    } else {
      product_of_registers<Config>(y, w, refill_early, right + b);
    }
    // Here, as the compiler would mix the reduction with the product's last instructions: with the
    // accumulators of 128 columns that takes a tenth longer.
    if (!Config::shares_w && !refills_early) draw();
    Reduced reduced = reduce_group(reduce_tiles<Config, Reduced>(y), all, group);
    const uint32_t refill_token = tokens[stage];
    if (!refills_early) {
      load(stage, refill_token);
      stage = stage + 1 < plan.stages ? stage + 1 : 0;
    }
    const uint32_t next = tokens[stage];
    if (__builtin_expect(needs_exact<Config>(reduced, problem, token, all, group), false)) {
      exact_transform<Config, outputs>(y, problem, token, tile);
      group.sync();
      reduced = reduce_group(reduce_tiles<Config, Reduced>(y), all, group);
    }
    store<Config, outputs, is_whole>(y, reduced, ratios, problem, token, tile, scratch, group);
    token = warp_uniform(next);
  }
#endif
}

// The slices of a block in the order in which they are used: for each token, for each step, which
// is a pass over some of its rows, those of left and X, then those of right.
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

// The ring of slices, filled ahead of their use; four warps fill a slice, as the instructions for
// it are many, and take turns with the others.
template <class Config>
struct SliceRing {
  using Element = typename Config::Element;

  const Problem& problem;
  const Plan& plan;
  unsigned char* const memory;
  const int input_unit, left_unit, right_unit;
  const int token_slices, right_slices;
  const int steps;
  const Team team;  // of warps that fill a slice
  const int teams;
  int until_turn;        // slices until it is this team's turn; of warps in no team, never
  SlicePosition filled;  // the next to be filled
  int fill_stage = 0, use_stage = 0;

  __device__ SliceRing(const Problem& the_problem, const Plan& the_plan, unsigned char* ring)
      : problem(the_problem),
        plan(the_plan),
        memory(ring),
        input_unit(copy_unit<Element>(problem.input, problem.cols, problem.input_stride)),
        left_unit(copy_unit<Element>(problem.left, problem.rows, 0)),
        right_unit(copy_unit<Element>(problem.right, problem.cols, 0)),
        token_slices(divide_up(problem.rows, plan.slice_rows)),
        right_slices(problem.right ? divide_up(Config::cols, plan.slice_rows) : 0),
        steps(2 * plan.passes - 1),
        team{static_cast<int>(threadIdx.x) % 128, plan.warps < 4 ? 32 * plan.warps : 128},
        teams(plan.warps < 4 ? 1 : plan.warps / 4),
        until_turn(warp_uniform(threadIdx.x / 128)) {
    for (int i = 1; i < plan.stages; ++i) fill();
  }

  __device__ Element* left(int stage) const {
    return reinterpret_cast<Element*>(memory + stage * plan.stage_bytes);
  }
  // Of X or right, which have the same shape.
  __device__ Element* other(int stage) const {
    return left(stage) + plan.slice_rows * plan.left_pitch;
  }

  // Starts the copy of one slice, if there is one.
  __device__ __forceinline__ void fill() {
    const bool is_turn = until_turn == 0;
    until_turn = is_turn ? teams - 1 : until_turn < teams ? until_turn - 1 : until_turn;
    if (is_turn && filled.token < problem.tokens) {
      const int cols = problem.cols;
      const bool is_right = filled.slice >= token_slices;
      const int first = (is_right ? filled.slice - token_slices : filled.slice) * plan.slice_rows;
      if (!is_right) {
        const int pass = filled.step < plan.passes ? filled.step : steps - 1 - filled.step;
        copy_left(left_unit, left(fill_stage), plan.left_pitch, problem, first,
                  pass * plan.pass_rows, {plan.slice_rows, plan.pass_rows}, team);
      }
      const void* from = is_right ? problem.right : problem.input;
      const int64_t element = is_right ? 0 : filled.token * problem.input_stride;
      with_unit<Element, 16>(is_right ? right_unit : input_unit, [&](auto unit) {
        copy_matrix<unit()>(other(fill_stage), Config::pitch,
                            static_cast<const Element*>(from) + element + first * cols, cols,
                            {(is_right ? cols : problem.rows) - first, cols},
                            {plan.slice_rows, Config::cols}, team, InPlace());
      });
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

// Y of a warp's tile, in a pass that begins with `pass_row`; W goes through `shared`.
template <class Config, Outputs outputs>
__device__ __forceinline__ void transform_slices(Accumulators<Config>& y, SliceRing<Config>& ring,
                                                 const Plan& plan, WarpTile<Config> tile,
                                                 int pass_row, void* shared) {
  using Element = typename Config::Element;
  const int left_offset = tile.row - pass_row + a_offset<Element>(plan.left_pitch);
  const int other_offset = tile.col + b_offset<Element>(Config::pitch);
  // y = a @ b with b from slices; load_a(a, stage, slice, k) gives the fragments for row k of one.
  const auto product_of_slices = [&](int slices, auto load_a) {
    clear<Config>(y);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      const int stage = ring.next();
#pragma unroll 1
      for (int k = 0; k < plan.slice_rows; k += Config::step) {
        AFragments a;
        load_a(a, stage, slice, k);
        multiply<Config>(y, a, ring.other(stage) + other_offset + k * Config::pitch);
      }
    }
  };
  product_of_slices(ring.token_slices, [&](AFragments& a, int stage, int, int k) {
    load_left(a, ring.left(stage) + left_offset + k * plan.left_pitch, plan.left_pitch);
  });
  if constexpr (outputs != Outputs::left_only) {
    // W of the last pass has been read, as slices have been waited for since; so will this be
    // written before the next one is used.
    const SharedW<Config> w(shared, tile, pass_row);
    w.store(y);
    product_of_slices(ring.right_slices, [&](AFragments& a, int, int slice, int k) {
      w.load(a, slice * plan.slice_rows + k);
    });
  }
}

template <class Config, Outputs outputs>
__global__ void __launch_bounds__(Config::max_threads, 1)
    streamed_kernel(const FLATQUANT_GRID_CONSTANT Problem problem,
                    const FLATQUANT_GRID_CONSTANT Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned char* const memory = dynamic_shared_memory();
  using Reduced = flatquant::Reduced<outputs>;
  auto* const all = reinterpret_cast<Reduced*>(memory);
  const Group group(plan.warps);
  const int row_block = group.warp / Config::parts;
  unsigned char* const scratch = memory + plan.scratch_offset + row_block * plan.scratch_bytes;
  clear_extremes(memory, plan);
  SliceRing<Config> ring(problem, plan, memory + plan.ring_offset);
  Accumulators<Config> y;
  const auto tile_of = [&](int pass) {
    return WarpTile<Config>(group.warp, pass * plan.pass_rows);
  };
  const auto transform = [&](int pass) {
    transform_slices<Config, outputs>(y, ring, plan, tile_of(pass), pass * plan.pass_rows,
                                      memory + plan.w_offset);
  };

  const Ratios ratios(lane_output(problem));
  for (int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    Reduced reduced;
    for (int pass = 0; pass < plan.passes; ++pass) {
      transform(pass);
      reduced.include(reduce_tiles<Config, Reduced>(y));
    }
    reduced = reduce_group(reduced, all, group);
    const bool is_exact = needs_exact<Config>(reduced, problem, token, all, group);
    if (is_exact) {
      reduced = Reduced();
      for (int pass = 0; pass < plan.passes; ++pass) {
        exact_transform<Config, outputs>(y, problem, token, tile_of(pass));
        reduced.include(reduce_tiles<Config, Reduced>(y));
      }
      group.sync();
      reduced = reduce_group(reduced, all, group);
    }
    // The last pass is still there; the others are computed again.
    for (int pass = plan.passes - 1; pass >= 0; --pass) {
      if (pass != plan.passes - 1) {
        transform(pass);
        if (is_exact) exact_transform<Config, outputs>(y, problem, token, tile_of(pass));
      }
      store<Config, outputs, false>(y, reduced, ratios, problem, token, tile_of(pass), scratch,
                                    group);
    }
  }
#endif
}

// Calls use(config) with the Config of these columns for the problem's precision, if there is one.
template <class Element, int cols, bool streamed, class Use>
void with_config(const Problem& problem, Use use) {
  if constexpr (sizeof(Element) == 2) {
    use(Config<Element, cols, streamed>());
  } else if constexpr (has_float32(cols, streamed)) {
    if (problem.precision == Precision::highest) {
      use(Config<Element, cols, streamed, Precision::highest>());
    } else {
      use(Config<Element, cols, streamed, Precision::high>());
    }
  }
}

// Calls use(kernel) with the instantiation that serves the problem.
template <class Config, class Use>
void with_kernel(const Problem& problem, const Plan& plan, Use use) {
  with_outputs(problem, [&](auto outputs) {
    if constexpr (!Config::streamed && !Config::is_float32 && outputs() == Outputs::simple) {
      use(needs_no_padding<Config>(problem, plan)
              ? resident_kernel<Config, Outputs::simple, true>
              : resident_kernel<Config, Outputs::simple, false>);
    } else if constexpr (!Config::streamed) {
      use(resident_kernel<Config, outputs(), false>);
    } else if constexpr (outputs() == Outputs::left_only) {
      use(streamed_kernel<Config, Outputs::left_only>);
    } else {
      use(streamed_kernel<Config, Outputs::in_place>);
    }
  });
}

}  // namespace flatquant::sm80
