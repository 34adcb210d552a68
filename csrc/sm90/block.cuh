// What a block of the sm90 kernel is made of: its shared memory, its share of a token, and how the
// threads that work on a token meet and reduce what they have.
#pragma once

#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"

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

}  // namespace flatquant::sm90
