// From Y to codes and scales in the sm90 kernel.
#pragma once

#include <type_traits>

#include "fragment.cuh"
#include "outputs.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm80/ampere.cuh"
#include "sm90/block.cuh"
#include "sm90/config.h"
#include "sm90/factors.cuh"
#include "sm90/hopper.cuh"
#include "sm90/ragged.cuh"
#include "sm90/transposed.cuh"

namespace flatquant::sm90 {

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

}  // namespace flatquant::sm90
