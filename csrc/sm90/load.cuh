// Tokens on their way to the stages of the sm90 kernel, by TMA.
#pragma once

#include "problem.h"
#include "sm90/block.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

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

}  // namespace flatquant::sm90
