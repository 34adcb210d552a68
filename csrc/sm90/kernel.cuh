// The Hopper kernel. For each token X (rows x cols) two chained wgmma products:
//   W = left^T @ X    A = left^T (shared memory), B = X as it lies, W rounded to the input's dtype
//   Y = W @ right     A = W (registers: an accumulator fragment is an A fragment), B = right
// One warpgroup is the producer: it has the copy engine bring tokens into a ring of stages. The
// consumers are groups of row_tiles warpgroups; a group works on one token, each of its warpgroups
// on 64 rows of W and Y. Groups work on different tokens, so that the epilogue of one runs beside
// the products of another. The epilogue reduces max|Y| over the group, then quantises the
// accumulators and stores whole words; the token is read once and its codes are written once.
// Shared memory: barriers and maxima, right, left and the ring, all operands in the panel layout
// (config.h). One block stays on each SM. Bound by memory, or by tensor cores where rows + cols is
// large.
#pragma once

#include <type_traits>

#include "problem.h"
#include "quantize.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

template <class Config>
struct SharedStorage {
  Mbarrier full[Config::stages];   // a token has arrived
  Mbarrier empty[Config::stages];  // every warp of its group is done with it
  alignas(16) float maxima[2][Config::groups][Config::group_threads / 32];
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

enum NamedBarrier : int { factors_staged, group_maxima };  // group_maxima + group

// Tokens of a block are blockIdx.x, blockIdx.x + gridDim.x, ...; the i-th uses stage i % stages,
// for the i / stages-th time.
template <class Config>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;  // of that time
  __device__ void advance(int tokens) {
    for (stage += tokens; stage >= Config::stages; stage -= Config::stages) parity ^= 1;
  }
};

template <class Config>
__device__ void produce(const CUtensorMap& input_map, const Problem& problem,
                        const SharedMemory<Config>& shared) {
  RingPosition<Config> position;
  for (int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    Mbarrier* full = &shared.storage->full[position.stage];
    // The first round finds the stages empty: the phase before the first counts as complete.
    mbarrier_wait(&shared.storage->empty[position.stage], position.parity ^ 1);
    mbarrier_arrive_expect_bytes(full, Config::token_bytes);
    unsigned char* panel = shared.ring + position.stage * Config::stage_bytes;
    for (int col = 0; col < Config::cols; col += Config::width) {
      tma_load_3d(&input_map, full, panel + col * Config::depth * 2, col, 0,
                  static_cast<int>(token));
    }
    position.advance(1);
  }
}

// Eight neighbouring elements of a row, as one 16-byte word.
template <class Element>
struct alignas(16) Octet {
  Element values[8];
};

// Calls store(k, col, elements col .. col + 7 of row k) for every octet of a (size, size) factor
// padded with zeros to (depth, cols); size is a multiple of 8. Small on purpose: with cold caches,
// code that runs once costs its length.
template <class Config, class Element, class Store>
__device__ void stage_octets(const Element* factor, int size, int depth, int cols, Store store) {
#pragma unroll 2
  for (int i = threadIdx.x; i < depth * (cols / 8); i += Config::consumers) {
    const int k = i / (cols / 8), col = i % (cols / 8) * 8;
    Octet<Element> octet{};
    if (k < size && col < size) {
      octet = *reinterpret_cast<const Octet<Element>*>(factor + k * size + col);
    }
    store(k, col, octet);
  }
}

template <class Config>
__device__ void stage_factors(const Problem& problem, const SharedMemory<Config>& shared) {
  using Element = typename Config::Element;
  const auto* left = static_cast<const Element*>(problem.left);
  const auto* right = static_cast<const Element*>(problem.right);
  // Both factors come from memory at the same time, not one after the other.
  const int right_size = problem.cols * problem.cols;
  for (int i = threadIdx.x * 64; i < right_size; i += Config::consumers * 64)
    prefetch_l2(right + i);

  auto* shared_left = reinterpret_cast<Element*>(shared.left);
  constexpr int left_cols = 64 * Config::row_tiles;
  if (problem.rows % 8 == 0) {
    stage_octets<Config>(left, problem.rows, Config::depth, left_cols,
                         [&](int k, int m, const Octet<Element>& octet) {
                           *reinterpret_cast<Octet<Element>*>(
                               &shared_left[Panel::offset(64, Config::depth, k, m)]) = octet;
                         });
  } else {
#pragma unroll 8
    for (int i = threadIdx.x; i < Config::depth * left_cols; i += Config::consumers) {
      const int k = i / left_cols, m = i % left_cols;
      const bool inside = k < problem.rows && m < problem.rows;
      shared_left[Panel::offset(64, Config::depth, k, m)] =
          inside ? left[k * problem.rows + m] : Element(0.0f);
    }
  }

  struct alignas(4) Pair {
    Element values[2];
  };
  auto* shared_right = reinterpret_cast<Element*>(shared.right);
  stage_octets<Config>(
      right, problem.cols, Config::cols, Config::cols,
      [&](int k, int col, const Octet<Element>& octet) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const int position = Config::Order::position(col + j);
          *reinterpret_cast<Pair*>(
              &shared_right[Panel::offset(Config::width, Config::cols, k, position)]) =
              Pair{octet.values[j], octet.values[j + 1]};
        }
      });
}

__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
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

// Brings a warp's rows of W into float16's range where they are finite but beyond it: Y need not
// be. Returns the power of two that they were divided by, nearly always 1.
template <int count>
__device__ float limit_to_half(float (&w)[count]) {
  float max[4] = {};
#pragma unroll
  for (int i = 0; i < count; ++i) max[i % 4] = absmax(max[i % 4], w[i]);
  const float largest = warp_max(absmax(absmax(max[0], max[1]), absmax(max[2], max[3])));
  if (!(largest > 65504.0f) || largest == INFINITY) return 1.0f;
  // largest / unit is in [2^14, 2^15).
  const float unit = bits_float((float_bits(largest) & 0x7f800000u) - (14u << 23));
  const float inverse = reciprocal(unit);
#pragma unroll
  for (int i = 0; i < count; ++i) w[i] *= inverse;
  return unit;
}

// Y = W @ right for 64 rows: an accumulator of W is, in the same order, an A fragment.
template <class Config>
__device__ void second_product(float (&y)[Config::cols / 2], float (&w)[Config::cols / 2],
                               uint64_t right) {
  using Element = typename Config::Element;
  float unit = 1.0f;
  if constexpr (std::is_same_v<Element, __half>) unit = limit_to_half(w);
  uint32_t a[Config::cols / 4];
#pragma unroll
  for (int i = 0; i < Config::cols / 4; ++i) a[i] = pack_pair(Element(), w[2 * i], w[2 * i + 1]);
  wgmma_begin(a, y);
#pragma unroll
  for (int k = 0; k < Config::cols; k += 16) {
    wgmma<typename Config::Element, Config::cols>(y, a + k / 4,
                                                  advance(right, k * Config::width * 2), k != 0);
  }
  wgmma_commit();
  wgmma_wait(y);
  if (unit != 1.0f) {
#pragma unroll
    for (int i = 0; i < Config::cols / 2; ++i) y[i] *= unit;
  }
}

// This thread's share of one token: rows first_row and first_row + 8, of each the columns that
// ColumnOrder gives to quad_lane.
struct ThreadRows {
  int first_row;
  int quad_lane;
};

// max|Y| of the token. Padding is not part of it: NaN or Inf times its zeros would be NaN.
template <class Config>
__device__ float token_max(const float (&y)[Config::cols / 2], const Problem& problem,
                           ThreadRows thread, float* maxima, int group) {
  using Order = typename Config::Order;
  // Four independent chains; those of a padded row are dropped as a whole.
  float max[2][2] = {};
#pragma unroll
  for (int block = 0; block < Config::cols / 8; ++block) {
    const int col = block < 4 * Order::words ? Order::word_column(block / 4, thread.quad_lane)
                                             : Order::half_word_column(thread.quad_lane);
    if (problem.cols != Config::cols && col >= problem.cols) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) max[i / 2][i % 2] = absmax(max[i / 2][i % 2], y[4 * block + i]);
  }
  float result = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (thread.first_row + 8 * half < problem.rows) {
      result = absmax(result, absmax(max[half][0], max[half][1]));
    }
  }
  result = warp_max(result);

  constexpr int warps = Config::group_threads / 32;
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32 % warps] = result;
  named_barrier_sync(group_maxima + group, Config::group_threads);
#pragma unroll
  for (int warp = 0; warp < warps; warp += 4) {
    const float4 four = *reinterpret_cast<const float4*>(maxima + warp);
    result = absmax(absmax(absmax(result, four.x), absmax(four.y, four.z)), four.w);
  }
  return result;
}

// `count` 32-bit words (1, 2, 4 or 8) to an address aligned to their size, 16 bytes at most.
template <int count>
__device__ __forceinline__ void store_words(void* address, const uint32_t (&words)[count]) {
  if constexpr (count == 1) {
    *static_cast<uint32_t*>(address) = words[0];
  } else if constexpr (count == 2) {
    *static_cast<uint2*>(address) = make_uint2(words[0], words[1]);
  } else {
    static_assert(count % 4 == 0);
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      static_cast<uint4*>(address)[i / 4] =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

template <class Config, Storage storage>
__device__ void store_codes(const float (&y)[Config::cols / 2], float inverse,
                            const Problem& problem, int64_t token, ThreadRows thread) {
  using Order = typename Config::Order;
  constexpr int vector = Order::vector;
  constexpr bool packed = storage == Storage::int32;
  constexpr int words_per_octet = packed ? 1 : 2;  // 32-bit words of eight codes
  // A packed code is half a byte; addresses are taken at even features only.
  const auto bytes = [](int64_t features) { return packed ? features / 2 : features; };
  const int features = problem.rows * problem.cols;
  unsigned char* codes = static_cast<unsigned char*>(problem.codes) + token * bytes(features);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = thread.first_row + 8 * half;
    if (row >= problem.rows) break;
    unsigned char* row_codes = codes + bytes(row * problem.cols);
#pragma unroll
    for (int first = 0; first < Order::words; first += vector) {
      uint32_t words[vector * words_per_octet];
#pragma unroll
      for (int word = 0; word < vector; ++word) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = y[4 * (4 * (first + word) + i / 2) + 2 * half + i % 2];
        }
        if constexpr (packed) {
          words[word] = pack_int4(values, inverse);
        } else {
          words[2 * word] = pack_int8({values[0], values[1], values[2], values[3]}, inverse);
          words[2 * word + 1] = pack_int8({values[4], values[5], values[6], values[7]}, inverse);
        }
      }
      const int col = Order::word_column(first, thread.quad_lane);
      unsigned char* target = row_codes + bytes(col);
      if (problem.cols % (8 * vector) == 0) {
        // Then the words are aligned together and lie inside the row together.
        if (col < problem.cols) store_words(target, words);
      } else {
#pragma unroll
        for (int word = 0; word < vector; ++word) {
          if (col + 8 * word >= problem.cols) break;
          uint32_t octet[words_per_octet];
#pragma unroll
          for (int i = 0; i < words_per_octet; ++i) octet[i] = words[word * words_per_octet + i];
          store_words(target + word * words_per_octet * 4, octet);
        }
      }
    }
    if constexpr (Order::has_half_word) {
      constexpr int first = 16 * Order::words;
      const float values[4] = {y[first + 2 * half], y[first + 2 * half + 1],
                               y[first + 4 + 2 * half], y[first + 4 + 2 * half + 1]};
      const int col = Order::half_word_column(thread.quad_lane);
      if (col < problem.cols) {
        unsigned char* target = row_codes + bytes(col);
        if constexpr (packed) {
          *reinterpret_cast<uint16_t*>(target) = pack_int4(values, inverse);
        } else {
          *reinterpret_cast<uint32_t*>(target) = pack_int8(values, inverse);
        }
      }
    }
  }
}

template <class Config>
__device__ void epilogue(float (&y)[Config::cols / 2], const Problem& problem, int64_t token,
                         ThreadRows thread, float* maxima, int group) {
  const float max = token_max<Config>(y, problem, thread, maxima, group);
  const TokenScale scale(max, problem.clip_ratio);
  if (threadIdx.x % Config::group_threads == 0) problem.scales[token] = scale.scale;
  if (scale.needs_prepare) {
#pragma unroll
    for (int i = 0; i < Config::cols / 2; ++i) y[i] = scale.prepare(y[i]);
  }
  if (problem.storage == Storage::int32) {
    store_codes<Config, Storage::int32>(y, scale.inverse, problem, token, thread);
  } else {
    store_codes<Config, Storage::int8>(y, scale.inverse, problem, token, thread);
  }
}

template <class Config>
__device__ void consume(const Problem& problem, const SharedMemory<Config>& shared) {
  // Read from one lane, so that the compiler knows the loop to be uniform in the warp.
  const int group = warp_uniform(threadIdx.x / Config::group_threads);
  const int row_tile = threadIdx.x / 128 % Config::row_tiles;
  const ThreadRows thread{
      64 * row_tile + static_cast<int>(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4),
      static_cast<int>(threadIdx.x % 4)};
  constexpr auto swizzle = static_cast<Swizzle>(Config::width * 2);
  constexpr int panel_bytes = Config::depth * Config::width * 2;
  const uint64_t left = wgmma_descriptor(shared.left + row_tile * Config::depth * 128,
                                         Swizzle::bytes128, Config::depth * 128);
  const uint64_t right = wgmma_descriptor(shared.right, swizzle, Config::cols * Config::width * 2);
  const uint64_t ring = wgmma_descriptor(shared.ring, swizzle, panel_bytes);
  const int64_t step = static_cast<int64_t>(Config::groups) * gridDim.x;

  int64_t token = blockIdx.x + static_cast<int64_t>(group) * gridDim.x;
  if (token >= problem.tokens) return;
  RingPosition<Config> position;
  position.advance(group);
  float w[Config::cols / 2], y[Config::cols / 2];
  // Without a condition, which would serialise wgmma: past the last token it multiplies what an
  // earlier one left, and nobody looks at it.
  auto start = [&](int64_t next) {
    if (next < problem.tokens) {
      mbarrier_wait(&shared.storage->full[position.stage], position.parity);
    }
    start_first_product<Config>(w, left, advance(ring, position.stage * Config::stage_bytes));
  };
  start(token);
  int set = 0;
  do {
    wgmma_wait(w);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.storage->empty[position.stage]);
    position.advance(Config::groups);
    second_product<Config>(y, w, right);
    // The tensor cores work on the next token while this one is quantised.
    if constexpr (Config::overlaps) start(token + step);
    // Two sets of maxima: a warp may be a token ahead of the slowest reader of the last set.
    epilogue<Config>(y, problem, token, thread, shared.storage->maxima[set][group], group);
    set ^= 1;
    if constexpr (!Config::overlaps) start(token + step);
    token += step;
  } while (token < problem.tokens);
  wgmma_wait(w);
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    kernel(const __grid_constant__ CUtensorMap input_map, const Problem problem) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const SharedMemory<Config> shared(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::stages; ++stage) {
      mbarrier_init(&shared.storage->full[stage], 1);
      mbarrier_init(&shared.storage->empty[stage], Config::group_threads / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= Config::consumers) {
    lower_registers<producer_registers>();
    if (threadIdx.x == Config::consumers) {
      tma_prefetch_map(&input_map);
      produce<Config>(input_map, problem, shared);
    }
  } else {
    raise_registers<consumer_registers(Config::consumers / 128)>();
    stage_factors<Config>(problem, shared);
    fence_proxy_async();
    named_barrier_sync(factors_staged, Config::consumers);
    consume<Config>(problem, shared);
  }
#endif
}

}  // namespace flatquant::sm90
