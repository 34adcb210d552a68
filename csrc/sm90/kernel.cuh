// The Hopper kernel. For each token X (rows x cols) two chained wgmma products:
//   W = left^T @ X    A = left^T (shared memory), B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (registers: an accumulator fragment is an A fragment), B = right
// A block is groups of row_tiles warpgroups; a group works on one token, each of its warpgroups on
// 64 rows of W and Y. Groups work on different tokens, so that the epilogue of one runs beside the
// products of another. A ring of stages holds the tokens to come; one thread of a group has the
// copy engine fill a stage again once its token is used. The epilogue reduces the extremes of Y
// over the group, then quantises the accumulators and stores whole words, for one output after the
// other; the token is read once and its codes are written once. Without a left factor the identity
// is staged, as W is then X to the bit; without a right one W is Y, and lanes exchange its columns
// instead. Shared memory: barriers, token numbers and extremes, right, left and the
// ring, all operands in the panel layout (config.h). One block stays on each SM. Bound by memory,
// or by tensor cores where rows + cols is large.
#pragma once

#include <type_traits>

#include "fragment.cuh"
#include "problem.h"
#include "quantize.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

template <class Config>
struct SharedStorage {
  static constexpr int group_warps = Config::group_threads / 32;
  Mbarrier full[Config::stages];    // a token has arrived
  uint32_t tokens[Config::stages];  // which one; past the last, there are no more
  // Of each warp: max|Y|, or the extremes. Two sets, as a warp may be a token ahead of the slowest
  // reader of the last one.
  union {
    alignas(16) Magnitude magnitudes[2][Config::groups][group_warps];
    alignas(16) Extremes extremes[2][Config::groups][group_warps];
  };
};

template <class Config>
struct SharedMemory {
  SharedStorage<Config>* storage;
  unsigned char *right, *left, *ring;

  __device__ explicit SharedMemory(unsigned char* base)
      : storage(reinterpret_cast<SharedStorage<Config>*>(base)),
        right(base + Config::right_offset),
        left(base + Config::left_offset),
        ring(base + Config::ring_offset) {
    static_assert(sizeof(SharedStorage<Config>) <= Config::right_offset);
  }
};

// Hands out a group's tokens, in the thread that fills its stages: first those of a fixed share,
// dealt out in turn; then, as some SMs get less of the memory's bandwidth than others, what is
// first come, first served. The counter for that is scratch of any content, which block 0 sets to
// zero long before it is needed. Were another block to draw before that, it would work on a token
// twice, to the same bits, or leave early; block 0 itself, which draws only after it has met a
// block barrier, does not rest until the last token is handed out.
template <class Config>
class TokenSource {
 public:
  // `first` is the group's first token, which its first stage gets.
  __device__ TokenSource(const Problem& problem, uint32_t first)
      : tokens_(static_cast<uint32_t>(problem.tokens)),
        counter_(problem.counter),
        position_(first + Config::groups * gridDim.x) {
    // The fixed share is more than the stages hold and the next draws take before that barrier.
    const bool shares =
        counter_ != nullptr && tokens_ >= 2 * (Config::stages + Config::groups) * gridDim.x;
    fixed_ = shares ? tokens_ - tokens_ / 4 : tokens_;
    if (shares && blockIdx.x == 0 && threadIdx.x == 0) atomicExch(counter_, 0u);
    next_ = draw();
  }

  // The next token; from some call on, one past the last. The one after it is drawn ahead, as that
  // takes as long as a load.
  __device__ uint32_t take() {
    const uint32_t token = next_;
    if (token < tokens_) next_ = draw();
    return token;
  }

 private:
  __device__ uint32_t draw() {
    if (position_ >= fixed_) return fixed_ < tokens_ ? fixed_ + atomicAdd(counter_, 1u) : tokens_;
    const uint32_t token = position_;
    position_ += Config::groups * gridDim.x;
    return token;
  }

  uint32_t tokens_;
  uint32_t* counter_;
  uint32_t position_;
  uint32_t fixed_;
  uint32_t next_;
};

// Starts the copy of a token, if it exists, into a stage.
template <class Config>
__device__ void fill(const CUtensorMap& input_map, const Problem& problem,
                     const SharedMemory<Config>& shared, int stage, uint32_t token) {
  const bool exists = token < problem.tokens;
  Mbarrier* full = &shared.storage->full[stage];
  shared.storage->tokens[stage] = token;
  mbarrier_arrive_expect_bytes(full, exists ? Config::token_bytes : 0);
  if (!exists) return;
  unsigned char* panels = shared.ring + stage * Config::stage_bytes;
#pragma unroll
  for (int col = 0; col < Config::panel_cols; col += Config::width) {
    tma_load_3d(&input_map, full, panels + col * Config::depth * 2, col, 0,
                static_cast<int>(token));
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

// Starts copying both factors to shared memory, padded with zeros. Asynchronous, and before all but
// the first tokens are asked for: behind those, which fill the queues of memory, they would wait.
template <class Config>
__device__ void start_staging_factors(const Problem& problem, const SharedMemory<Config>& shared) {
  using Element = typename Config::Element;
  const auto* left = static_cast<const Element*>(problem.left);
  const auto* right = static_cast<const Element*>(problem.right);
  auto* shared_left = reinterpret_cast<Element*>(shared.left);
  auto* shared_right = reinterpret_cast<Element*>(shared.right);

  const auto right_offset = [](int k, int col) {
    return Panel::offset(Config::width, Config::cols, k, ColumnOrder<Config::cols>::position(col));
  };
  if (right == nullptr) {
    // W is Y.
  } else if (problem.right_repeats == 1) {
    for_each<Config, Config::cols, Config::cols / 2>([&](int k, int pair) {
      const bool inside = k < problem.cols && 2 * pair < problem.cols;
      copy_async<4>(&shared_right[right_offset(k, 2 * pair)],
                    right + (inside ? k * problem.cols + 2 * pair : 0), inside);
    });
  } else {
    for_each<Config, Config::cols, Config::cols>([&](int k, int col) {
      const int size = problem.right_size();
      const bool inside = k < problem.cols && k / size == col / size;
      shared_right[right_offset(k, col)] =
          inside ? right[k % size * size + col % size] : Element(0.0f);
    });
  }

  if (left != nullptr && problem.left_repeats == 1 && problem.rows % 8 == 0) {
    for_each<Config, Config::depth, 8 * Config::row_tiles>([&](int k, int octet) {
      const bool inside = k < problem.rows && 8 * octet < problem.rows;
      copy_async<16>(&shared_left[Panel::offset(64, Config::depth, k, 8 * octet)],
                     left + (inside ? k * problem.rows + 8 * octet : 0), inside);
    });
  } else {
    for_each<Config, Config::depth, 64 * Config::row_tiles>([&](int k, int m) {
      const int repeats = left == nullptr ? problem.rows : problem.left_repeats;
      const bool inside = k < problem.rows && m < problem.rows && k % repeats == m % repeats;
      shared_left[Panel::offset(64, Config::depth, k, m)] =
          !inside           ? Element(0.0f)
          : left == nullptr ? Element(1.0f)
                            : left[k / repeats * problem.left_size() + m / repeats];
    });
  }
}

// Starts W = left^T @ X for 64 rows. Accumulator 4 * block + 2 * half + e of a lane is row lane / 4
// + 8 * half of its warp's 16, column 8 * block + 2 * (lane % 4) + e.
template <class Config>
__device__ void start_first_product(float (&w)[Config::cols / 2], uint64_t left, uint64_t token) {
  wgmma_begin(w);
#pragma unroll
  for (int k = 0; k < Config::depth; k += 16) {
    wgmma<typename Config::Element, Config::cols>(w, advance(left, k * 64 * 2),
                                                  advance(token, k * Config::width * 2), k != 0);
  }
  wgmma_commit();
}

// Y = W @ right for 64 rows: an accumulator of W is, in the same order, an A fragment.
template <class Config>
__device__ void second_product(float (&y)[Config::cols / 2], float (&w)[Config::cols / 2],
                               uint64_t right) {
  using Element = typename Config::Element;
  uint32_t a[Config::cols / 4];
#pragma unroll
  for (int i = 0; i < Config::cols / 4; ++i) a[i] = pack_pair(Element(), w[2 * i], w[2 * i + 1]);
  wgmma_begin(a, y);
#pragma unroll
  for (int k = 0; k < Config::cols; k += 16) {
    wgmma<Element, Config::cols>(y, a + k / 4, advance(right, k * Config::width * 2), k != 0);
  }
  wgmma_commit();
  wgmma_wait(y);
}

// What Y of the token is reduced to, the same in all threads of its group; `all` has a place for
// each of its warps.
template <class Config, class Reduced>
__device__ Reduced reduce_token(const float (&y)[Config::cols / 2], Reduced* all, int group) {
  Reduced result = warp_reduce(reduce<Reduced>(y));

  constexpr int warps = Config::group_threads / 32;
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32 % warps] = result;
  named_barrier_sync(group, Config::group_threads);
  struct alignas(16) Vector {
    Reduced values[16 / sizeof(Reduced)];
  };
#pragma unroll
  for (int i = 0; i < warps * static_cast<int>(sizeof(Reduced)) / 16; ++i) {
    const Vector vector = reinterpret_cast<const Vector*>(all)[i];
    for (const Reduced& value : vector.values) result.include(value);
  }
  return result;
}

template <class Config>
__device__ __forceinline__ void store_codes(const float (&y)[Config::cols / 2],
                                            const TokenScale& scale, const Problem& problem,
                                            void* codes, uint32_t token, ThreadRows thread) {
  const auto store = [&](auto storage) {
    with_clamp<true>(scale, [&](auto clamp) {
      flatquant::store_codes<Config::cols, storage(), clamp()>(y, scale, problem, codes, token,
                                                               thread);
    });
  };
  if (problem.storage == Storage::int32) {
    store(std::integral_constant<Storage, Storage::int32>());
  } else {
    store(std::integral_constant<Storage, Storage::int8>());
  }
}

template <class Config, Outputs outputs, class Refill>
__device__ void epilogue(float (&y)[Config::cols / 2], const Problem& problem,
                         const SharedMemory<Config>& shared, uint32_t token, ThreadRows thread,
                         int group, int set, const Ratios& ratios, Refill refill) {
  const auto reduce = [&](int used) {
    auto& storage = *shared.storage;
    if constexpr (outputs == Outputs::simple) {
      return reduce_token<Config>(y, storage.magnitudes[used][group], group);
    } else {
      return reduce_token<Config>(y, storage.extremes[used][group], group);
    }
  };
  Reduced<outputs> reduced = reduce(set);
  if constexpr (!Config::refills_early) refill();  // the group's barrier is past
  if (!(reduced.magnitude() < INFINITY)) {
    exact_transform<typename Config::Element>(y, problem, token, thread);
    reduced = reduce(set ^ 1);
    named_barrier_sync(group, Config::group_threads);  // all have read this set
  }
  if constexpr (outputs == Outputs::simple) {
    const Output& output = problem.outputs[0];
    const float ratio = output.max_ratio;
    const TokenScale scale(ratio * reduced.max, ratio, ratio, true);
    if (threadIdx.x % Config::group_threads == 0) output.scales[token] = scale.scale;
    store_codes<Config>(y, scale, problem, output.codes, token, thread);
  } else if (problem.output_count == 0) {
    store_transformed<Config::cols>(y, problem, token, thread);
  } else {
    const OutputScales<true> scales(ratios, reduced);
    if (threadIdx.x % Config::group_threads < 32) scales.store(problem, token);
    scales.for_each(problem, [&](void* codes, const TokenScale& scale) {
      store_codes<Config>(y, scale, problem, codes, token, thread);
    });
  }
}

template <class Config, Outputs outputs>
__device__ void work(const CUtensorMap& input_map, const Problem& problem,
                     const SharedMemory<Config>& shared, TokenSource<Config>& source) {
  const int warpgroup = warp_uniform(threadIdx.x / 128);
  const int group = warpgroup / Config::row_tiles, row_tile = warpgroup % Config::row_tiles;
  const ThreadRows thread{
      64 * row_tile + static_cast<int>(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4),
      static_cast<int>(threadIdx.x % 4)};
  constexpr auto swizzle = static_cast<Swizzle>(Config::width * 2);
  constexpr int panel_bytes = Config::depth * Config::width * 2;
  const uint64_t left = wgmma_descriptor(shared.left + row_tile * Config::depth * 128,
                                         Swizzle::bytes128, Config::depth * 128);
  const uint64_t right = wgmma_descriptor(shared.right, swizzle, Config::cols * Config::width * 2);
  const uint64_t ring = wgmma_descriptor(shared.ring, swizzle, panel_bytes);

  const Ratios ratios(lane_output(problem));
  int stage = group;
  uint32_t parity = 0;  // of the stage's use
  float w[Config::cols / 2], y[Config::cols / 2];
  // Unconditional, as a condition would serialise wgmma: past the last token it multiplies what an
  // earlier one left, and nobody looks at it. Returns the token.
  auto start = [&] {
    mbarrier_wait(&shared.storage->full[stage], parity);
    const uint32_t token = warp_uniform(shared.storage->tokens[stage]);
    start_first_product<Config>(w, left, advance(ring, stage * Config::stage_bytes));
    return token;
  };
  uint32_t token = start();
  int set = 0;
  while (true) {
    wgmma_wait(w);
    if (token >= problem.tokens) break;
    const int used = stage;
    const auto refill = [&] {
      if (threadIdx.x % Config::group_threads == 0) {
        fill(input_map, problem, shared, used, source.take());
      }
    };
    if constexpr (Config::refills_early) {
      named_barrier_sync(group, Config::group_threads);
      refill();
    }
    stage += Config::groups;
    if (stage >= Config::stages) {
      stage = group;
      parity ^= 1;
    }
    if (outputs == Outputs::any && problem.right == nullptr) {
      to_column_order(y, w, thread.quad_lane);
    } else {
      second_product<Config>(y, w, right);
    }
    uint32_t next;
    if constexpr (Config::overlaps) next = start();
    epilogue<Config, outputs>(y, problem, shared, token, thread, group, set, ratios, refill);
    set ^= 1;
    if constexpr (!Config::overlaps) next = start();
    token = next;
  }
}

template <class Config, Outputs outputs>
__global__ void __launch_bounds__(Config::threads, 1)
    kernel(const __grid_constant__ CUtensorMap input_map, const __grid_constant__ Problem problem) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const SharedMemory<Config> shared(dynamic_shared_memory());
  const int group = threadIdx.x / Config::group_threads;
  const uint32_t first = blockIdx.x + group * gridDim.x;
  const bool fills = threadIdx.x % Config::group_threads == 0;
  // The first tokens are asked for at once, the others after the factors.
  if (fills) {
    tma_prefetch_map(&input_map);
    for (int stage = group; stage < Config::stages; stage += Config::groups) {
      mbarrier_init(&shared.storage->full[stage], 1);
    }
    mbarrier_init_fence();
    fill(input_map, problem, shared, group, first);
  }
  start_staging_factors<Config>(problem, shared);
  TokenSource<Config> source(problem, first);
  if (fills) {
    for (int stage = group + Config::groups; stage < Config::stages; stage += Config::groups) {
      fill(input_map, problem, shared, stage, source.take());
    }
  }
  copy_async_wait();
  fence_proxy_async();
  __syncthreads();
  work<Config, outputs>(input_map, problem, shared, source);
#endif
}

}  // namespace flatquant::sm90
