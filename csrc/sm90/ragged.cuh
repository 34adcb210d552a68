// What the sm90 kernel does otherwise with ragged tokens (config.h), whose rows of elements and of
// codes are no multiple of TMA's units: their way into panels and that of their codes.
#pragma once

#include "fragment.cuh"
#include "problem.h"
#include "sm90/config.h"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

// Brings a ragged token that has arrived into panels, padded with zeros, in place.
template <class Config>
__device__ void cut_token(unsigned char* stage, const Problem& problem, int group) {
  constexpr int quads = Config::depth * Config::cols / 4 / Config::group_threads;
  constexpr int last_columns = Config::cols % Config::width;
  static_assert(Config::width == 64 && (last_columns == 0 || last_columns == 32));
  static_assert(Config::depth % (Config::group_threads / (last_columns == 0 ? 16 : 8)) == 0);
  const int thread = threadIdx.x % Config::group_threads;
  // Calls visit(index, row, first column, element in panels) for this thread's groups of four
  // columns. It keeps its columns of a panel and takes every row_step-th row, which is swizzled
  // alike.
  const auto for_each_quad = [&](auto visit) {
    int index = 0;
#pragma unroll
    for (int panel = 0; panel < Config::cols; panel += Config::width) {
      const int columns =
          Config::cols - panel < Config::width ? Config::cols - panel : Config::width;
      const int row_step = Config::group_threads / (columns / 4);
      const int first_row = thread / (columns / 4), col = panel + thread % (columns / 4) * 4;
      const int first = Panel::offset(Config::width, Config::depth, first_row, col);
#pragma unroll
      for (int row = 0; row < Config::depth; row += row_step) {
        visit(index++, first_row + row, col, first + row * Config::width);
      }
    }
  };
  uint2 values[quads];
  for_each_quad([&](int i, int row, int col, int) {
    const bool inside = row < problem.rows && col < problem.cols;
    values[i] = inside ? *reinterpret_cast<const uint2*>(stage + 2 * (row * problem.cols + col))
                       : make_uint2(0, 0);
  });
  named_barrier_sync(group, Config::group_threads);  // all of it is in registers
  for_each_quad([&](int i, int, int, int element) {
    *reinterpret_cast<uint2*>(stage + 2 * element) = values[i];
  });
  fence_proxy_async();
  named_barrier_sync(group, Config::group_threads);
}

// A group's codes of a token in shared memory, as they follow each other in memory.
template <class Config, Storage storage>
class StagedRows {
 public:
  __device__ __forceinline__ StagedRows(unsigned char* codes, int group)
      : codes_(codes + group * Config::codes_bytes) {}

  // This thread's codes of a tile, by fours. There is room for rows that do not exist.
  template <Outputs outputs, Clamp clamp>
  __device__ __forceinline__ void stage(const float (&y)[Config::cols / 2], const TokenScale& scale,
                                        const Problem& problem, ThreadRows thread) const {
    using Order = ColumnOrder<Config::cols>;
    static_assert(!Order::has_half_word);
    const int quad_lane = opaque(thread.quad_lane);
    unsigned char* row = codes_ + code_bytes<storage>(thread.first_row * problem.cols);
#pragma unroll
    for (int half = 0; half < 2; ++half, row += code_bytes<storage>(8 * problem.cols)) {
#pragma unroll
      for (int word = 0; word < Order::words; ++word) {
        uint32_t words[storage == Storage::int32 ? 1 : 2];
        pack_word<Config::cols, outputs, storage, clamp>(words, y, scale, word, half, quad_lane);
#pragma unroll
        for (int four = 0; four < 2; ++four) {
          const int col = Order::word_column(word, quad_lane) + 4 * four;
          if (col >= problem.cols) continue;
          unsigned char* const place = row + code_bytes<storage>(col);
          if constexpr (storage == Storage::int32) {
            *reinterpret_cast<uint16_t*>(place) = static_cast<uint16_t>(words[0] >> 16 * four);
          } else {
            *reinterpret_cast<uint32_t*>(place) = words[four];
          }
        }
      }
    }
  }

  // Stores them, called by all of the group.
  __device__ __forceinline__ void store(const Problem& problem, void* codes, uint32_t token,
                                        int) const {
    const auto* const source = reinterpret_cast<const uint4*>(codes_);
    auto* const target =
        reinterpret_cast<uint4*>(first_codes<storage>(problem, codes, token, ThreadRows()));
    for (unsigned i = threadIdx.x % Config::group_threads; i < bytes(problem) / 16;
         i += Config::group_threads) {
      target[i] = source[i];
    }
  }

  // Starts their store by TMA, called by a warp.
  __device__ __forceinline__ void start_storing(const Problem& problem, void* codes,
                                                uint32_t token) const {
    if (threadIdx.x % 32 != 0) return;
    bulk_store(codes_, first_codes<storage>(problem, codes, token, ThreadRows()),
               static_cast<int>(bytes(problem)));
  }

 private:
  __device__ static unsigned bytes(const Problem& problem) {
    return code_bytes<storage>(problem.rows * problem.cols);
  }

  unsigned char* codes_;
};

}  // namespace flatquant::sm90
