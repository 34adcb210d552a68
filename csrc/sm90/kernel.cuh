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
// memory, or by tensor cores where rows + cols is large.
//
// Where that pads less (is_transposed), the products are
//   V^T = right^T @ X^T    A = right^T, B = X as it lies, V rounded to the input's dtype
//   Y^T = V^T @ left       A = V^T, B = left
// What is said of rows is then true of columns. The codes go through shared memory, from where TMA
// or all threads store them; transposed.cuh has that and what else differs.
//
// Where one block cannot hold a token's accumulators, the two of a cluster have half of its rows of
// Y each, or of its columns where transposed. The token arrives in slices of a few rows or columns,
// which the first product takes one after the other. A slice of several boxes is asked for by as
// many threads; as there is room for few slices, all are brought to the L2 cache ahead. The blocks
// exchange their extremes.
//
// In classes of at most 32 rows, 16-bit tokens come in stacks of as many as fill a tile, one below
// the other, and the left factor is repeated along the diagonal. What is said of a token is then
// true of a stack, but that each has its own scale. NaN and Inf reach the others, as zeros do not
// keep them out: each is then multiplied again by itself.
//
// float32 matrices are sums of float16 ones (float32.cuh).
// Tokens whose rows TMA cannot read (is_ragged) arrive as their elements follow each other, and
// their group brings them into panels, in place; their codes leave likewise (ragged.cuh).
#pragma once

#include <type_traits>

#include "problem.h"
#include "sm90/block.cuh"
#include "sm90/config.h"
#include "sm90/epilogue.cuh"
#include "sm90/factors.cuh"
#include "sm90/float32.cuh"
#include "sm90/hopper.cuh"
#include "sm90/load.cuh"
#include "sm90/products.cuh"
#include "sm90/ragged.cuh"
#include "token_source.cuh"

namespace flatquant::sm90 {

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
    kernel(const FLATQUANT_GRID_CONSTANT CUtensorMap input_map,
           const FLATQUANT_GRID_CONSTANT Problem problem) {
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
      problem.precision == Precision::highest ? use(Highest(), outputs) : use(High(), outputs);
    });
  }
}

}  // namespace flatquant::sm90
