// The Hopper kernel. For each token X (rows x cols) two chained wgmma products:
//   W = left^T @ X    A = left^T (shared memory), B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (registers: an accumulator fragment is an A fragment), B = right
// A block is groups of warpgroups; a group works on one token, each of its warpgroups on a tile of
// 64 rows of W and Y, or a single one on all tiles in turn. Groups work on different tokens, so
// that the epilogue of one runs beside the products of another. A ring of stages holds the tokens
// to come; one thread of a group has TMA fill a stage again once its token is used. The epilogue
// reduces the extremes of Y over the group, then quantises the accumulators and stores whole words,
// for one output after the other; the token is read once and its codes are written once. Without a
// left factor the identity is staged, as W is then X to the bit; without a right one W is Y, and
// lanes exchange codes instead. Shared memory: barriers, token numbers and extremes, right, left
// and the ring, all operands in the panel layout (config.h). One block stays on each SM. Bound by
// memory, or by tensor cores where rows + cols is large. Where that pads less (is_transposed), the
// products are
//   V^T = right^T @ X^T    A = right^T, B = X as it lies, V rounded to the input's dtype
//   Y^T = V^T @ left       A = V^T, B = left
// What is said of rows is then true of columns. The codes go through shared memory, from where TMA
// or all threads store them; transposed.cuh has that and what else differs.
// Where one block cannot hold a token's accumulators, the two of a cluster have half of its rows of
// Y each, or of its columns where transposed. The token arrives in slices of a few rows or columns,
// which the first product takes one after the other. A slice of several boxes is asked for by as
// many threads; as there is room for few slices, all are brought to the L2 cache ahead. The blocks
// exchange their extremes.
// In classes of at most 32 rows, 16-bit tokens come in stacks of as many as fill a tile, one below
// the other, and the left factor is repeated along the diagonal. What is said of a token is then
// true of a stack, but that each has its own scale. NaN and Inf reach the others, as zeros do not
// keep them out: each is then multiplied again by itself.
// float32: each matrix, times a power of two that brings it into float16's range, is the sum of two
// float16 matrices (or rounded to one, see Config), and a product that of their products but for
// the smallest. A token is split in place, by its group, once it has arrived. One whose Y lies so
// far below what its X and the factors could make that float16's smallest number would show is
// computed again exactly.
// Tokens whose rows TMA cannot read (is_ragged) arrive as their elements follow each other, and
// their group brings them into panels, in place; their codes leave likewise (ragged.cuh).
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm80/ampere.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"
#include "sm90/ragged.cuh"
#include "sm90/transposed.cuh"
#include "token_source.cuh"

namespace flatquant::sm90 {

template <class Config>
struct SharedStorage {
  static constexpr int group_warps = Config::group_threads / 32;
  Mbarrier full[Config::stages];    // a token or a slice has arrived
  uint32_t tokens[Config::stages];  // of which token; past the last, there are no more
  // Of each warp that works on the token: max|Y|, or the extremes. Two sets, as a warp may be a
  // token ahead of the slowest reader of the last one.
  union {
    alignas(16) Magnitude magnitudes[2][Config::groups][Config::blocks * group_warps];
    alignas(16) Extremes extremes[2][Config::groups][Config::blocks * group_warps];
  };
  // For float32: of each warp, the largest magnitude of its part of a token; of the block, those of
  // left and right, as bits.
  alignas(16) Magnitude token_magnitudes[Config::is_float32 ? Config::groups : 1][group_warps];
  uint32_t factor_magnitudes[2];
};

template <class Config>
struct SharedMemory {
  SharedStorage<Config>* storage;
  unsigned char *right, *left, *ring, *codes;

  __device__ explicit SharedMemory(unsigned char* base)
      : storage(reinterpret_cast<SharedStorage<Config>*>(base)),
        right(base + Config::right_offset),
        left(base + Config::left_offset),
        ring(base + Config::ring_offset),
        codes(base + Config::codes_offset) {
    static_assert(sizeof(SharedStorage<Config>) <= Config::right_offset);
  }
};

// Which of its cluster's blocks this is.
template <class Config>
__device__ __forceinline__ int block_rank() {
  return Config::blocks == 1 ? 0 : blockIdx.x % Config::blocks;
}

// The first of its rows of Y, or of its columns where those are what the blocks share.
template <class Config>
__device__ __forceinline__ int block_row() {
  return Config::is_transposed ? 0 : block_rank<Config>() * 64 * Config::row_tiles;
}
template <class Config>
__device__ __forceinline__ int block_col() {
  return Config::is_transposed ? block_rank<Config>() * 64 * Config::row_tiles : 0;
}

// The tokens of a problem, or its stacks of them, of which the last may lack some.
template <class Config>
FLATQUANT_HOST_DEVICE auto token_count(const Problem& problem) {
  if constexpr (Config::stack == 1) {
    return problem.tokens;
  } else {
    return (static_cast<uint32_t>(problem.tokens) + Config::stack - 1) / Config::stack;
  }
}

// To which token of its stack a row of the stack belongs, and which row of that it is.
template <class Config>
__device__ __forceinline__ int token_of_row(int row) {
  return Config::stack == 1 ? 0 : row / Config::token_depth;
}
template <class Config>
__device__ __forceinline__ int row_in_token(int row) {
  return Config::stack == 1 ? row : row % Config::token_depth;
}

// From a group's token to its next one, before any are first come, first served.
template <class Config>
__device__ __forceinline__ uint32_t token_step() {
  return Config::groups * (gridDim.x / Config::blocks);
}

// How they are dealt out in turn, see TokenSource.
template <class Config>
struct Deal {
  __device__ uint32_t step() const { return token_step<Config>(); }
  // Of all stages, and what their groups draw before a block barrier.
  __device__ uint32_t held() const { return (Config::stages + Config::groups) * gridDim.x; }
};

// Starts the copy of a token, if it exists, or of a slice of it into a stage. Slices are copied by
// one thread each of `fillers` warps.
template <class Config>
__device__ void fill(const CUtensorMap& input_map, const Problem& problem,
                     const SharedMemory<Config>& shared, int stage, uint32_t token, int slice = 0,
                     int filler = 0) {
  using Element = typename Config::Element;
  const bool exists = token < token_count<Config>(problem);
  const int bytes = Config::is_ragged ? problem.rows * problem.cols * 2 : Config::slice_bytes;
  Mbarrier* full = &shared.storage->full[stage];
  if (filler == 0) {
    shared.storage->tokens[stage] = token;
    mbarrier_arrive_expect_bytes(full, exists ? bytes : 0);
  }
  if (!exists) return;
  auto* panels = reinterpret_cast<Element*>(shared.ring + stage * Config::stage_bytes);
  if constexpr (Config::is_ragged) {
    const auto* input = static_cast<const Element*>(problem.input);
    bulk_load(input + token * problem.input_stride, full, panels, bytes);
  } else {
#pragma unroll
    for (int i = 0; i < Config::boxes / Config::fillers; ++i) {
      const int col = (filler + i * Config::fillers) * Config::box_cols;
      tma_load_3d(&input_map, full, panels + col * Config::slice_rows,
                  Config::slice_col(slice) + col, Config::slice_row(slice),
                  static_cast<int>(token * Config::stack));
    }
  }
}

// The same for a slice, called by all threads of a block: one thread each of several warps issues a
// box, as one thread for all of them would hold up the next product.
template <class Config>
__device__ void fill_slice(const CUtensorMap& input_map, const Problem& problem,
                           const SharedMemory<Config>& shared, int stage, uint32_t token,
                           int slice) {
  const int filler = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0 && filler < Config::fillers) {
    fill(input_map, problem, shared, stage, token, slice, filler);
  }
}

// The same for as many slices of a token as there are stages, from `stage` on, at once.
template <class Config>
__device__ void fill_first_slices(const CUtensorMap& input_map, const Problem& problem,
                                  const SharedMemory<Config>& shared, int stage, uint32_t token) {
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int i = 0; i < Config::stages * Config::fillers; i += Config::threads / 32) {
    const int box = i + threadIdx.x / 32, slice = box / Config::fillers;
    if (slice < Config::stages) {
      fill(input_map, problem, shared, (stage + slice) % Config::stages, token, slice,
           box % Config::fillers);
    }
  }
}

// Brings a token's slices as far as the L2 cache, a share of them for each block of the cluster.
template <class Config>
__device__ void prefetch_slices(const CUtensorMap& input_map, const Problem& problem,
                                uint32_t token) {
  if (threadIdx.x % 32 != 0 || token >= problem.tokens) return;
  constexpr int boxes = Config::slices * Config::boxes;
#pragma unroll
  for (int i = 0; i < boxes; i += Config::threads / 32 * Config::blocks) {
    const int box = i + threadIdx.x / 32 * Config::blocks + block_rank<Config>();
    const int slice = box / Config::boxes;
    if (box < boxes) {
      tma_prefetch_3d(&input_map, Config::slice_col(slice) + box % Config::boxes * Config::box_cols,
                      Config::slice_row(slice), static_cast<int>(token));
    }
  }
}

// Calls visit(row, column) for all of (rows, columns), spread over the block so that a thread stays
// in its column: what depends on the column alone is computed once.
template <class Config, int rows, int columns, class Visit>
__device__ __forceinline__ void for_each(Visit visit) {
  constexpr int step = Config::threads / columns;
  static_assert(step >= 1);
  const int column = threadIdx.x % columns;
  if (threadIdx.x >= step * columns) return;
#pragma unroll 2
  for (int row = threadIdx.x / columns; row < rows; row += step) visit(row, column);
}

// Offsets in shared memory, in elements of a part.
template <class Config>
__device__ __forceinline__ int right_position(int k, int col) {
  if constexpr (Config::is_transposed) {
    return Panel::offset(Config::right_width, Config::cols, k,
                         TransposedOrder<Config::n>::position_of_column(col));
  } else {
    return Panel::offset(Config::right_width, Config::cols, k,
                         ColumnOrder<Config::cols>::position(col));
  }
}
template <class Config>
__device__ __forceinline__ int left_position(int k, int m) {
  if constexpr (Config::is_transposed) {
    return Panel::offset(Config::b_width, Config::depth, k,
                         TransposedOrder<Config::n>::position_of_row(m));
  } else {
    return Panel::offset(64, Config::depth, k, m);
  }
}

// An element of the matrix that a factor stands for, padded with zeros.
template <class Element>
__device__ __forceinline__ Element left_element(const Problem& problem, int k, int m) {
  const auto* left = static_cast<const Element*>(problem.left);
  const int index = problem.left_index(k, m);
  if (k >= problem.rows || m >= problem.rows || index < 0) return Element(0.0f);
  return left == nullptr ? Element(1.0f) : left[index];
}
template <class Element>
__device__ __forceinline__ Element right_element(const Problem& problem, int k, int col) {
  const int index = problem.right_index(k, col);
  if (k >= problem.cols || index < 0) return Element(0.0f);
  return static_cast<const Element*>(problem.right)[index];
}

// This block's columns of the right factor on their way to shared memory, padded with zeros: in
// registers, as pairs of columns part there and cp.async would bring but 4 bytes at a time. Asked
// for before all but the first tokens are: behind those, which fill the queues of memory, it would
// wait. One that repeats along the diagonal is small, and is read where it is stored.
template <class Config>
class RightFactor {
 public:
  using Element = typename Config::Element;

  __device__ __forceinline__ void load(const Problem& problem) {
    const auto* right = static_cast<const Element*>(problem.right);
    if (!is_whole(problem)) return;
    constexpr int columns = Config::is_ragged ? 4 : 8;  // of a load, as rows are aligned
    for_each_octet([&](int i, int row, int octet) {
#pragma unroll
      for (int next = 0; next < 8; next += columns) {
        const int col = block_col<Config>() + octet + next;
        Elements<Element, columns> elements = {};
        if (row < problem.cols && col < problem.cols) {
          elements = flatquant::load<columns>(right + row * problem.cols + col);
        }
#pragma unroll
        for (int pair = 0; pair < columns / 2; ++pair) {
          octets_[i][next / 2 + pair] = elements.words[pair];
        }
      }
    });
  }
  __device__ __forceinline__ void store(const Problem& problem,
                                        const SharedMemory<Config>& shared) const {
    auto* const matrix = reinterpret_cast<Element*>(shared.right);
    if (problem.right == nullptr) return;  // W is Y
    if (!is_whole(problem)) {
      for_each<Config, Config::cols, Config::right_cols>([&](int k, int col) {
        matrix[right_position<Config>(k, col)] =
            right_element<Element>(problem, k, block_col<Config>() + col);
      });
      return;
    }
    int first[4];
    for_each_octet([&](int i, int row, int col) {
      const uint32_t (&pairs)[4] = octets_[i];
      // Rows a multiple of eight apart are swizzled alike.
      const int further = i * row_step * Config::right_width;
      if constexpr (Config::is_transposed) {
        // The four even columns are neighbours there, and the four odd ones.
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned halves = odd ? 0x7632 : 0x5410;
          if (i == 0) first[odd] = right_position<Config>(row, col + odd);
          *reinterpret_cast<uint2*>(matrix + first[odd] + further) = make_uint2(
              __byte_perm(pairs[0], pairs[1], halves), __byte_perm(pairs[2], pairs[3], halves));
        }
      } else {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          if (i == 0) first[pair] = right_position<Config>(row, col + 2 * pair);
          *reinterpret_cast<uint32_t*>(matrix + first[pair] + further) = pairs[pair];
        }
      }
    });
  }

 private:
  static constexpr int lanes = Config::right_cols / 8;  // of a row
  static constexpr int row_step = Config::threads / lanes / 8 * 8;
  static constexpr int steps = (Config::cols + row_step - 1) / row_step;
  static_assert(row_step > 0);

  __device__ static bool is_whole(const Problem& problem) {
    return problem.right != nullptr && problem.right_repeats == 1;
  }

  // Calls visit(i, row, first column) for this thread's parts.
  template <class Visit>
  __device__ __forceinline__ static void for_each_octet(Visit visit) {
    const int first_row = threadIdx.x / lanes, col = threadIdx.x % lanes * 8;
    if (first_row >= row_step) return;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      const int row = first_row + i * row_step;
      if (row < Config::cols) visit(i, row, col);
    }
  }

  uint32_t octets_[steps][4];  // eight columns of a row
};

// Starts copying this block's columns of the left factor to shared memory, asynchronously, padded
// with zeros.
template <class Config>
__device__ void start_staging_left(const Problem& problem, const SharedMemory<Config>& shared) {
  using Element = typename Config::Element;
  const auto* left = static_cast<const Element*>(problem.left);
  auto* shared_left = reinterpret_cast<Element*>(shared.left);
  // By so many columns, which stay neighbours and of which all or none exist.
  const auto copy = [&](auto size) {
    for_each<Config, Config::depth, Config::left_cols / size()>([&](int k, int unit) {
      const int m = block_row<Config>() + size() * unit;
      const int row = row_in_token<Config>(k), col = row_in_token<Config>(m);
      const bool inside = token_of_row<Config>(k) == token_of_row<Config>(m) &&
                          row < problem.rows && col < problem.rows;
      copy_async<2 * size()>(&shared_left[left_position<Config>(k, size() * unit)],
                             left + (inside ? row * problem.rows + col : 0), inside);
    });
  };
  if (left == nullptr || problem.left_repeats != 1 || problem.rows % 2 != 0) {
    for_each<Config, Config::depth, Config::left_cols>([&](int k, int col) {
      const int m = block_row<Config>() + col;
      const bool inside = token_of_row<Config>(k) == token_of_row<Config>(m);
      shared_left[left_position<Config>(k, col)] =
          inside ? left_element<Element>(problem, row_in_token<Config>(k), row_in_token<Config>(m))
                 : Element(0.0f);
    });
  } else if (Config::is_transposed || problem.rows % 4 != 0) {
    copy(std::integral_constant<int, 2>());
  } else if (problem.rows % 8 != 0) {
    copy(std::integral_constant<int, 4>());
  } else {
    copy(std::integral_constant<int, 8>());
  }
}

// The exponent of the power of two that brings `magnitude` just below 2^top; that or a little less
// where the power would be too large. Any for NaN and Inf.
__device__ __forceinline__ int scale_exponent(float magnitude, int top) {
  const int exponent = 126 + top - static_cast<int>(float_bits(magnitude) >> 23);
  return magnitude == 0.0f ? 0 : exponent > 126 ? 126 : exponent;
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float((exponent + 127) << 23);
}

// A pair of values as the sum of `parts` pairs of float16.
template <int parts>
__device__ __forceinline__ void split_pair(uint32_t (&pairs)[parts], float low, float high) {
  pairs[0] = pack_pair(__half(), low, high);
  if constexpr (parts == 2) {
    const float2 rounded = __half22float2(reinterpret_cast<const __half2&>(pairs[0]));
    pairs[1] = pack_pair(__half(), low - rounded.x, high - rounded.y);
  }
}

// Below which powers of two tokens and factors are brought: W, of up to 128 products, then stays in
// float16's range.
constexpr int token_top = 4, left_top = 4, right_top = 15;

// Where max|Y| so scaled is less, the 2^-25 that an element may lose to float16's smallest number
// could show in Y by more than 2^-18 of max|Y|: a factor undoes what some rows of its operand have
// too much of. Orthogonal factors keep max|Y| eight times larger, even with tokens of one outlier.
__device__ __forceinline__ float least_magnitude(const Problem& problem) {
  return problem.right == nullptr ? 0x1p1f : 0x1p16f;
}

// To the same element of each part, `part_bytes` apart.
template <class Config>
__device__ __forceinline__ void store_split(unsigned char* matrix, int part_bytes, int element,
                                            float low, float high) {
  uint32_t pairs[Config::parts];
  split_pair(pairs, low, high);
#pragma unroll
  for (int i = 0; i < Config::parts; ++i) {
    *reinterpret_cast<uint32_t*>(matrix + i * part_bytes + 2 * element) = pairs[i];
  }
}

// Brings both factors to shared memory, scaled and split. Returns the sum of the scales' exponents.
template <class Config>
__device__ int stage_split_factors(const Problem& problem, const SharedMemory<Config>& shared) {
  uint32_t* const magnitudes = shared.storage->factor_magnitudes;
  if (threadIdx.x < 2) magnitudes[threadIdx.x] = 0;
  __syncthreads();
  const auto find_magnitude = [&](const void* factor, int size, uint32_t* magnitude) {
    Magnitude largest{factor == nullptr ? 1.0f : 0.0f};
#pragma unroll 8
    for (int i = threadIdx.x; factor != nullptr && i < size * size; i += Config::threads) {
      largest.include({static_cast<const float*>(factor)[i]});
    }
    largest = warp_reduce(largest);
    if (threadIdx.x % 32 == 0) atomicMax(magnitude, float_bits(largest.max));
  };
  find_magnitude(problem.left, problem.left_size(), &magnitudes[0]);
  find_magnitude(problem.right, problem.right_size(), &magnitudes[1]);
  __syncthreads();
  const int left_exponent = scale_exponent(bits_float(magnitudes[0]), left_top);
  const float left_scale = power_of_two(left_exponent);
  for_each<Config, Config::depth, 32 * Config::row_tiles>([&](int k, int pair) {
    store_split<Config>(shared.left, Config::left_bytes, left_position<Config>(k, 2 * pair),
                        left_scale * left_element<float>(problem, k, 2 * pair),
                        left_scale * left_element<float>(problem, k, 2 * pair + 1));
  });
  if (problem.right == nullptr) return left_exponent;  // W is Y
  const int right_exponent = scale_exponent(bits_float(magnitudes[1]), right_top);
  const float right_scale = power_of_two(right_exponent);
  for_each<Config, Config::cols, Config::cols / 2>([&](int k, int pair) {
    store_split<Config>(shared.right, Config::right_bytes, right_position<Config>(k, 2 * pair),
                        right_scale * right_element<float>(problem, k, 2 * pair),
                        right_scale * right_element<float>(problem, k, 2 * pair + 1));
  });
  return left_exponent + right_exponent;
}

// Waits for all threads that work on the group's token.
template <class Config>
__device__ __forceinline__ void token_sync(int group) {
  if constexpr (Config::blocks == 1) {
    named_barrier_sync(group, Config::group_threads);
  } else {
    cluster_sync();
  }
}

// What the threads that work on a token have, reduced and the same in all of them; `all` has a
// place for each of their warps. Of a stack, of the thread's own token; the whole of it to *stack.
template <class Config, class Reduced>
__device__ Reduced reduce_group(const Reduced& own, Reduced* all, int group,
                                Reduced* stack = nullptr) {
  Reduced result = warp_reduce(own);

  constexpr int warps = Config::group_threads / 32;
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32 % warps;
    if constexpr (Config::blocks == 1) {
      all[warp] = result;
    } else {
      Reduced* const place = &all[block_rank<Config>() * warps + warp];
#pragma unroll
      for (int rank = 0; rank < Config::blocks; ++rank) *in_block(place, rank) = result;
    }
  }
  token_sync<Config>(group);
  if constexpr (Config::stack == 1) {
    include_all<Config::blocks * warps>(result, all);
  } else {
    *stack = result;
    include_all<warps>(*stack, all);
    constexpr int token_warps = warps / Config::stack;
    include_all<token_warps>(result, all + threadIdx.x / 32 % warps / token_warps * token_warps);
  }
  return result;
}

// How a float32 token was scaled.
struct TokenSplit {
  int exponent;
  bool is_zero;
};

// Scales and splits a token that has arrived, in place.
template <class Config>
__device__ TokenSplit split_token(unsigned char* stage, const SharedMemory<Config>& shared,
                                  int group) {
  constexpr int quads = Config::depth * Config::cols / 4 / Config::group_threads;
  static_assert(quads * 4 * Config::group_threads == Config::depth * Config::cols);
  const int thread = threadIdx.x % Config::group_threads;
  float4 values[quads];
  Magnitude magnitude;
#pragma unroll
  for (int i = 0; i < quads; ++i) {
    values[i] = reinterpret_cast<const float4*>(stage)[thread + i * Config::group_threads];
    magnitude.include({values[i].x});
    magnitude.include({values[i].y});
    magnitude.include({values[i].z});
    magnitude.include({values[i].w});
  }
  // Past its barrier all of the token is in registers.
  magnitude = reduce_group<Config>(magnitude, shared.storage->token_magnitudes[group], group);
  const int exponent = scale_exponent(magnitude.max, token_top);
  const float scale = power_of_two(exponent);
#pragma unroll
  for (int i = 0; i < quads; ++i) {
    const int element = 4 * (thread + i * Config::group_threads);
    const int offset =
        Panel::offset(Config::width, Config::depth, element / Config::cols, element % Config::cols);
    uint32_t low[Config::parts], high[Config::parts];
    split_pair(low, scale * values[i].x, scale * values[i].y);
    split_pair(high, scale * values[i].z, scale * values[i].w);
#pragma unroll
    for (int part = 0; part < Config::parts; ++part) {
      *reinterpret_cast<uint2*>(stage + part * Config::part_bytes + 2 * offset) =
          make_uint2(low[part], high[part]);
    }
  }
  fence_proxy_async();
  named_barrier_sync(group, Config::group_threads);
  return {exponent, magnitude.max == 0.0f};
}

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

// Takes the scales off Y again. Returns below which max|Y| the token is to be computed again; Y is
// NaN where float32 has no such power of two.
template <class Config>
__device__ __forceinline__ float scale_back(float (&y)[Config::n / 2], const TokenSplit& token,
                                            int factor_exponents, const Problem& problem) {
  const int exponent = -(token.exponent + factor_exponents);
  const float scale = exponent >= -126 && exponent <= 127 ? power_of_two(exponent) : NAN;
#pragma unroll
  for (float& value : y) value *= scale;
  return token.is_zero ? 0.0f : scale * least_magnitude(problem);
}

// Y of a thread: of each of its tiles, the rows of which follow those of the tile before.
template <class Config>
using Accumulators = float[Config::tiles][Config::n / 2];

// Calls visit(tile, rows) for each of a thread's tiles.
template <class Config, class Visit>
__device__ __forceinline__ void for_each_tile(ThreadRows first, Visit visit) {
#pragma unroll
  for (int tile = 0; tile < Config::tiles; ++tile) {
    ThreadRows rows = first;
    rows.first_row += 64 * tile;
    visit(tile, rows);
  }
}

template <class Config, Storage storage>
using StagedCodes = std::conditional_t<Config::is_transposed, StagedColumns<Config, storage>,
                                       StagedRows<Config, storage>>;

// Whether staged codes go to memory behind the next token's barrier.
template <class Config, Outputs outputs>
constexpr bool stores_late = Config::stages_codes && outputs == Outputs::simple;

// That: by TMA if it can (then all have met the barrier past their fence_proxy_async()), else by
// all of the group.
template <class Config>
__device__ __forceinline__ void store_staged(const Problem& problem,
                                             const SharedMemory<Config>& shared, void* codes,
                                             uint32_t token, int group) {
  with_storage(problem, [&](auto storage) {
    const StagedCodes<Config, storage()> staged(shared.codes, group);
    if constexpr (Config::bulk_stores) {
      if (threadIdx.x % Config::group_threads / 32 == 1) {
        staged.start_storing(problem, codes, token);
      }
    } else {
      staged.store(problem, codes, token, block_col<Config>());
    }
  });
}

// Calls use(store) with what stores codes of the problem's storage.
template <class Config, Outputs outputs, class Use>
__device__ __forceinline__ void with_store(const Accumulators<Config>& y, const Problem& problem,
                                           const SharedMemory<Config>& shared, uint32_t token,
                                           ThreadRows thread, int group, Use use) {
  with_storage(problem, [&](auto storage) {
    // What the storage makes of the token is computed here, for all outputs; beside a second
    // accumulator, which leaves no registers for it, only where it is used.
    use([&, token = opaque(token)](void* codes, const TokenScale& scale, auto clamp) {
      const uint32_t place = Config::overlaps ? opaque(token) : token;
      if constexpr (Config::stages_codes) {
        const StagedCodes<Config, storage()> staged(shared.codes, group);
        for_each_tile<Config>(thread, [&](int tile, ThreadRows rows) {
          rows.first_row -= block_col<Config>();
          staged.template stage<outputs, clamp()>(y[tile], scale, problem, rows);
        });
        if constexpr (!stores_late<Config, outputs>) {
          named_barrier_sync(group, Config::group_threads);
          staged.store(problem, codes, place, block_col<Config>());
          named_barrier_sync(group, Config::group_threads);
        } else if constexpr (Config::bulk_stores) {
          fence_proxy_async();
        }
      } else {
        for_each_tile<Config>(thread, [&](int tile, ThreadRows rows) {
          store_codes<Config::cols, outputs, storage(), clamp()>(y[tile], scale, problem, codes,
                                                                 place, rows);
        });
      }
    });
  });
}

// Two elements of 2 bytes as a register of a fragment has them.
__device__ __forceinline__ uint32_t pair_of(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

// Y of a warp's 16 rows of one token of a stack, without the others. By mma.sync, which a warp
// issues by itself and which gives the bits of wgmma (test_determinism.py); in loops, and so in
// local memory, as it is rare and registers are few.
template <class Config, Outputs outputs>
__device__ void transform_alone(float (&y)[Config::n / 2], const Problem& problem,
                                const SharedMemory<Config>& shared, uint32_t token,
                                ThreadRows thread) {
  using Operand = typename Config::Operand;
  constexpr int blocks = Config::n / 8;
  const auto* const x = static_cast<const uint16_t*>(problem.input) + token * problem.input_stride;
  const auto* const left = reinterpret_cast<const uint16_t*>(shared.left);
  const auto* const right = reinterpret_cast<const uint16_t*>(shared.right);
  const int first_row = static_cast<int>(token % Config::stack) * Config::token_depth;
  const int lane_row = threadIdx.x % 32 / 4, lane_k = 2 * thread.quad_lane;
  float w[Config::n / 2], z[Config::n / 2];
#pragma unroll 1
  for (int i = 0; i < Config::n / 2; ++i) w[i] = z[i] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < Config::token_depth; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + k + lane_k + i / 2 * 8;
      const int m = first_row + thread.first_row + i % 2 * 8;
      a[i] = pair_of(left[left_position<Config>(row, m)], left[left_position<Config>(row + 1, m)]);
    }
    const auto element = [&](int row, int col) {
      const bool inside = row < problem.rows && col < problem.cols;
      return inside ? x[row * problem.cols + col] : uint16_t{0};
    };
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int row = k + lane_k, col = 8 * block + lane_row;
      const uint32_t b[] = {pair_of(element(row, col), element(row + 1, col)),
                            pair_of(element(row + 8, col), element(row + 9, col))};
      sm80::mma<Operand>(w + 4 * block, a, b);
    }
  }
  constexpr bool is_y = outputs == Outputs::left_only;
#pragma unroll 1
  for (int k = 0; !is_y && k < Config::n; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = pack_pair(Operand(), w[k / 2 + 2 * i], w[k / 2 + 2 * i + 1]);
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = k + lane_k + 8 * i, col = 8 * block + lane_row;
        constexpr int width = Config::right_width;
        b[i] = pair_of(right[Panel::offset(width, Config::cols, row, col)],
                       right[Panel::offset(width, Config::cols, row + 1, col)]);
      }
      sm80::mma<Operand>(z + 4 * block, a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < Config::n / 2; ++i) y[i] = is_y ? w[i] : z[i];
}

// Calls past_barrier() behind the group's barrier. Of a stack, `token` is the thread's own, which
// may not exist.
template <class Config, Outputs outputs, class PastBarrier>
__device__ void epilogue(Accumulators<Config>& y, const Problem& problem,
                         const SharedMemory<Config>& shared, uint32_t token, ThreadRows thread,
                         int group, int set, const Ratios& ratios, float least,
                         PastBarrier past_barrier) {
  if constexpr (Config::stack > 1) thread.is_stored = token < problem.tokens;
  Reduced<outputs> of_stack;
  const auto reduce_token = [&](const auto& values, int used) {
    auto& storage = *shared.storage;
    auto own = reduce<Reduced<outputs>>(values[0]);
#pragma unroll
    for (int tile = 1; tile < Config::tiles; ++tile) {
      own.include(reduce<Reduced<outputs>>(values[tile]));
    }
    // So that past the group's barrier all slices have been read but the last one.
    if constexpr (Config::slices_ahead > 1) wgmma_wait_previous();
    if constexpr (outputs == Outputs::simple) {
      return reduce_group<Config>(own, storage.magnitudes[used][group], group, &of_stack);
    } else {
      return reduce_group<Config>(own, storage.extremes[used][group], group, &of_stack);
    }
  };
  const auto store = [&](const auto& values, const Reduced<outputs>& reduced) {
    store_token<outputs, true>(
        problem, token, reduced, ratios, thread.is_stored && thread.first_row < 16,
        [&](auto use) {
          with_store<Config, outputs>(values, problem, shared, token, thread, group, use);
        },
        [&] {
          for_each_tile<Config>(thread, [&](int tile, ThreadRows rows) {
            if constexpr (Config::is_transposed) {
              store_transformed_transposed(values[tile], problem, token, rows);
            } else {
              store_transformed<Config::cols, outputs>(values[tile], problem, token, rows);
            }
          });
        });
  };
  const Reduced<outputs> reduced = reduce_token(y, set);
  past_barrier();
  const float magnitude = Config::stack == 1 ? reduced.magnitude() : of_stack.magnitude();
  if (!(magnitude < INFINITY) || (Config::is_float32 && magnitude < least)) {
    using Element = typename Config::Element;
    Accumulators<Config> again;
    bool is_enough = false;
    if constexpr (Config::stack > 1) {
      // NaN or Inf may be another token's.
      if (thread.is_stored) {
        transform_alone<Config, outputs>(again[0], problem, shared, token, thread);
      } else {
#pragma unroll
        for (float& value : again[0]) value = 0.0f;
      }
      is_enough = reduce_token(again, set ^ 1).magnitude() < INFINITY;
      token_sync<Config>(group);  // all have read both sets
      set ^= 1;
    }
    if (!is_enough) {
      for_each_tile<Config>(thread, [&](int tile, ThreadRows rows) {
        if constexpr (Config::is_transposed) {
          exact_transform_transposed<Element>(again[tile], problem, token, rows);
        } else {
          exact_transform<Element, outputs>(again[tile], problem, token, rows);
        }
      });
    }
    const Reduced<outputs> reduced_again = reduce_token(again, set ^ 1);
    token_sync<Config>(group);  // all have read this set
    store(again, reduced_again);
  } else {
    store(y, reduced);
  }
}

template <class Config, Outputs outputs>
__device__ void mainloop(const CUtensorMap& input_map, const Problem& problem,
                         const SharedMemory<Config>& shared, TokenSource<Deal<Config>>& source,
                         int factor_exponents) {
  const int warpgroup = warp_uniform(threadIdx.x / 128);
  const int group = warpgroup / Config::group_warpgroups;
  const int row_tile = warpgroup % Config::group_warpgroups;
  // One thread of a group fills its stages: of another warp each, as a quarter more instructions
  // for one of the SM's four schedulers would hold up the others.
  const bool fills = threadIdx.x % Config::group_threads == group % 4 * 32;
  const int tile_row = static_cast<int>(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4);
  const ThreadRows thread{
      block_row<Config>() + block_col<Config>() + 64 * row_tile + row_in_token<Config>(tile_row),
      static_cast<int>(threadIdx.x % 4)};
  const int stack_index = Config::stack == 1 ? 0 : warp_uniform(token_of_row<Config>(tile_row));
  constexpr auto swizzle = static_cast<Swizzle>(Config::width * 2);
  constexpr int panel_bytes = Config::slice_rows * Config::width * 2;
  constexpr int tile_bytes = Config::k * 128;  // of A
  const uint64_t a =
      wgmma_descriptor((Config::is_transposed ? shared.right : shared.left) + row_tile * tile_bytes,
                       Swizzle::bytes128, tile_bytes);
  const uint64_t b =
      wgmma_descriptor(Config::is_transposed ? shared.left : shared.right,
                       static_cast<Swizzle>(Config::b_width * 2), Config::n * Config::b_width * 2);
  const uint64_t ring = wgmma_descriptor(shared.ring, swizzle, panel_bytes);

  constexpr bool is_y = outputs == Outputs::left_only;  // W
  constexpr bool overlaps = Config::overlaps && !is_y;  // as that takes both accumulators
  constexpr bool stores_late = sm90::stores_late<Config, outputs>;
  constexpr int slices_ahead = Config::slices_ahead;
  const Ratios ratios(lane_output(problem));
  int stage = group;
  uint32_t parity = 0;  // of the stage's use
  TokenSplit token_split{};
  Accumulators<Config> y;
  float other[Config::n / 2];
  float (&w)[Config::n / 2] = is_y ? y[0] : other;
  // The last token's codes to memory, if there was one.
  uint32_t staged_token = static_cast<uint32_t>(problem.tokens);
  const auto store_late = [&] {
    if constexpr (stores_late) {
      if (staged_token >= problem.tokens) return;
      store_staged(problem, shared, problem.outputs[0].codes, staged_token, group);
    }
  };
  // Waits for the next token and returns which it is. Past the last one the thread ends, by the
  // `number` that is known ahead, so that product 1 does not wait for what was read here; if one is
  // still in work, it goes on with what an earlier token left, and nobody looks at it: a condition
  // would serialise wgmma.
  const auto arrive = [&](uint32_t number = 0) {
    mbarrier_wait(&shared.storage->full[stage], parity);
    const uint32_t token = warp_uniform(shared.storage->tokens[stage]);
    if constexpr (!overlaps) exit_if(number >= token_count<Config>(problem));
    if constexpr (Config::is_float32) {
      token_split = split_token(shared.ring + stage * Config::stage_bytes, shared, group);
    } else if constexpr (Config::is_ragged) {
      cut_token<Config>(shared.ring + stage * Config::stage_bytes, problem, group);
    }
    return token;
  };
  const auto next_stage = [&] {
    stage += Config::groups;
    if (stage >= Config::stages) {
      stage = group;
      parity ^= 1;
    }
  };
  const auto multiply_slice = [&](int slice) {
    next_stage();
    mbarrier_wait(&shared.storage->full[stage], parity);
    wgmma_begin();
    start_first_product<Config>(w, advance(a, slice * Config::slice_k * 64 * 2),
                                advance(ring, stage * Config::stage_bytes), true);
  };
  // Starts the first product, of the first slices. Of what runs under an epilogue a half, as a warp
  // that starts more than a few instructions has to wait; the other past the epilogue's barrier.
  constexpr int early_k =
      overlaps && Config::slices == 1 ? Config::slice_k / 32 * 16 : Config::slice_k;
  const auto multiply = [&] {
    wgmma_begin(w);
    start_first_product<Config, 0, early_k>(w, a, advance(ring, stage * Config::stage_bytes));
#pragma unroll
    for (int slice = 1; slice < slices_ahead; ++slice) multiply_slice(slice);
  };
  const auto multiply_late = [&] {
    if constexpr (early_k < Config::slice_k) {
      wgmma_begin();
      start_first_product<Config, early_k>(w, a, advance(ring, stage * Config::stage_bytes), true);
    }
  };
  // Of the other slices. The next token's wait until this one's are read.
  const auto multiply_others = [&](uint32_t token) {
#pragma unroll 1
    for (int slice = slices_ahead; slice < Config::slices; ++slice) {
      const int used = stage;
      multiply_slice(slice);
      const int next_slice = slice - 1 + Config::stages;
      if (next_slice < Config::slices) {
        wgmma_wait_previous();
        named_barrier_sync(group, Config::group_threads);
        fill_slice(input_map, problem, shared, used, token, next_slice);
        if (slice == slices_ahead) store_late();
      }
    }
  };
  // Behind a barrier past which the first ones have been read, but for the last: the next ones in
  // their stages.
  const auto refill_ahead = [&](uint32_t token) {
#pragma unroll
    for (int slice = 0; slice < slices_ahead - 1; ++slice) {
      fill_slice(input_map, problem, shared, (stage + 1 + slice) % Config::stages, token,
                 Config::stages + slice);
    }
  };
  uint32_t token = arrive(shared.storage->tokens[stage]);
  multiply();
  if constexpr (slices_ahead > 1) {
    wgmma_wait_previous();
    named_barrier_sync(group, Config::group_threads);
    refill_ahead(token);
  }
  multiply_late();
  multiply_others(token);
  // Which token the next stage is filled with: known to the filling thread's warp, and found out
  // beside the second product where registers are left to keep it, as that takes some time.
  constexpr bool takes_ahead = Config::slices == 1 && !Config::overlaps && !Config::is_transposed;
  uint32_t refill_token = 0;
  const auto take = [&] {
    if constexpr (takes_ahead) {
      if (fills) source.take(&refill_token);
      refill_token = warp_uniform(refill_token);
    }
  };
  if constexpr (Config::refills_early || is_y) take();
  int set = 0;
  while (true) {
    wgmma_wait(w);
    if (overlaps && token >= problem.tokens) break;
    const int used = stage;
    const auto refill = [&] {
      if constexpr (Config::slices > 1) {
        fill_first_slices(input_map, problem, shared, used + 1, token + token_step<Config>());
      } else if (fills) {
        if constexpr (!takes_ahead) source.take(&refill_token);
        fill(input_map, problem, shared, used, refill_token);
      }
    };
    // Once the first product has read the stage.
    const auto refill_early = [&] {
      if constexpr (Config::refills_early) {
        named_barrier_sync(group, Config::group_threads);
        refill();
        if constexpr (Config::slices == 1) store_late();
      }
    };
    if constexpr (Config::tiles == 1) refill_early();
    next_stage();
    // A tile's second product runs beside the next one's first.
    if constexpr (Config::tiles > 1) {
      float (&w_next)[Config::n / 2] = is_y ? y[1] : other;
      const auto start_next = [&] {
        wgmma_begin(w_next);
        start_first_product<Config>(w_next, advance(a, tile_bytes),
                                    advance(ring, used * Config::stage_bytes));
      };
      if constexpr (is_y) {
        start_next();
        wgmma_wait(w_next);
      } else {
        second_product<Config>(y[0], w, b, start_next, w_next);
      }
      refill_early();
    }
    uint32_t next;
    if constexpr (!is_y) {
      second_product<Config>(y[Config::tiles - 1], w, b, [&] {
        take();
        if constexpr (Config::slices > 1) {
          prefetch_slices<Config>(input_map, problem, token + 2 * token_step<Config>());
        }
      });
    }
    float least = 0.0f;
    if constexpr (Config::is_float32) {
      least = scale_back<Config>(y[0], token_split, factor_exponents, problem);
    }
    if constexpr (overlaps) {
      next = arrive();
      multiply();
    }
    uint32_t number;  // of the next token
    // So that the staged codes have been read past the epilogue's barrier.
    if constexpr (stores_late && Config::bulk_stores) bulk_store_wait();
    const auto past_barrier = [&] {
      number = shared.storage->tokens[stage];
      if constexpr (!Config::refills_early) refill();
      multiply_late();
      refill_ahead(next);
    };
    epilogue<Config, outputs>(y, problem, shared, token * Config::stack + stack_index, thread,
                              group, set, ratios, least, past_barrier);
    set ^= 1;
    staged_token = token;
    if constexpr (stores_late && Config::bulk_stores) {
      if (number >= problem.tokens) {  // no token will bring a barrier
        named_barrier_sync(group, Config::group_threads);
        store_late();
        bulk_store_wait();
      }
    }
    if constexpr (!overlaps) {
      next = arrive(number);
      multiply();
    }
    multiply_others(next);
    if constexpr (is_y) take();
    token = next;
  }
}

template <class Config, Outputs outputs>
__global__ void __launch_bounds__(Config::threads, 1)
    kernel(const __grid_constant__ CUtensorMap input_map, const __grid_constant__ Problem problem) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const SharedMemory<Config> shared(dynamic_shared_memory());
  const int group = threadIdx.x / Config::group_threads;
  const uint32_t first = blockIdx.x / Config::blocks + group * (gridDim.x / Config::blocks);
  const uint32_t step = token_step<Config>();
  // One thread asks for the group's first token at once; one of another warp, so that neither warp
  // is late with its share of the factors, for the next ones, after those.
  const int group_thread = threadIdx.x % Config::group_threads;
  if (group_thread == 0) {
    if constexpr (!Config::is_ragged) tma_prefetch_map(&input_map);
    mbarrier_init(&shared.storage->full[group], 1);
    mbarrier_init_fence();
    if constexpr (Config::slices == 1) {
      wait_for_previous_kernel();
      fill(input_map, problem, shared, group, first);
    }
  } else if (group_thread == 32) {
    for (int stage = group + Config::groups; stage < Config::stages; stage += Config::groups) {
      mbarrier_init(&shared.storage->full[stage], 1);
    }
    mbarrier_init_fence();
  }
  wait_for_previous_kernel();
  start_next_kernel();
  if constexpr (Config::slices > 1) {
    __syncthreads();
    fill_first_slices(input_map, problem, shared, 0, first);
    prefetch_slices<Config>(input_map, problem, first);
    prefetch_slices<Config>(input_map, problem, first + step);
  }
  int factor_exponents = 0;
  RightFactor<Config> right;
  if constexpr (Config::is_float32) {
    factor_exponents = stage_split_factors(problem, shared);
  } else {
    right.load(problem);
    start_staging_left(problem, shared);
  }
  TokenSource source(token_count<Config>(problem), Config::blocks == 1 ? problem.counter : nullptr,
                     first + Config::stages / Config::groups * step, Deal<Config>());
  if constexpr (!Config::is_float32) right.store(problem, shared);
  if (Config::slices == 1 && group_thread == 32) {
    uint32_t token = first;
    for (int stage = group + Config::groups; stage < Config::stages; stage += Config::groups) {
      token += step;
      fill(input_map, problem, shared, stage, token);
    }
  }
  copy_async_wait();
  fence_proxy_async();
  if constexpr (Config::blocks == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  mainloop<Config, outputs>(input_map, problem, shared, source, factor_exponents);
#endif
}

// Calls use(config, outputs), of the types of the kernel's instantiation for a problem of the
// index-th shape class, which must serve it.
template <class Element, int index, class Use>
void with_instantiation(const Problem& problem, Use use) {
  constexpr ShapeClass shape = shape_classes[index];
  constexpr int depth = shape.depth, cols = shape.cols;
  if constexpr (!std::is_same_v<Element, float>) {
    using Class = Config<Element, Element, depth, cols>;
    using Ragged = Config<Element, Element, depth, cols, 1, has_ragged(shape)>;
    using Transposed = Config<Element, Element, depth, cols, 1, false, is_transposed(shape)>;
    with_outputs(problem, [&](auto outputs) {
      if (is_transposed(shape, problem)) {
        // That is never left_only.
        if constexpr (outputs() != Outputs::left_only) use(Transposed(), outputs);
      } else {
        is_ragged(problem.cols) ? use(Ragged(), outputs) : use(Class(), outputs);
      }
    });
  } else if constexpr (has_float32(shape)) {
    using Highest = Config<float, __half, depth, cols, 2>;
    using High = Config<float, __half, depth, cols, 1>;
    with_outputs(problem, [&](auto outputs) {
      // Fewer instantiations: `simple` would not be faster.
      constexpr Outputs less = outputs() == Outputs::simple ? Outputs::any : outputs();
      const auto some = std::integral_constant<Outputs, less>();
      problem.precision == Precision::highest ? use(Highest(), some) : use(High(), some);
    });
  }
}

}  // namespace flatquant::sm90
