// What the sm90 kernel does otherwise where its accumulators are those of Y^T: the order of the
// factors, Y's way to memory and the exact transform. A warp's 16 rows of accumulators are columns
// of Y, of which a lane has two neighbouring ones in each of its rows: a byte of int4 codes.
#pragma once

#include "fragment.cuh"
#include "sm90/hopper.cuh"

namespace flatquant::sm90 {

// Which element of Y an accumulator is, by the order of the factors' columns in shared memory.
// Accumulator 4 * block + 2 * half + e of a lane is position lane / 4 + 8 * half of its warp's 16
// and position 8 * block + 2 * (lane % 4) + e of n rows.
template <int n>
struct TransposedOrder {
  static constexpr int quarter = n / 4;  // of the rows, for each lane of a quad
  static_assert(n % 8 == 0);

  // Of an accumulator. `first_row` is the thread's, see ThreadRows.
  static constexpr int row(int accumulator, int quad_lane) {
    return quad_lane * quarter + accumulator / 4 * 2 + accumulator % 2;
  }
  static constexpr int column(int accumulator, int first_row) {
    return first_row / 16 * 16 + first_row % 16 * 2 + accumulator / 2 % 2;
  }

  // Where a column of the right factor and one of the left factor, a row of Y, are put.
  static constexpr int position_of_column(int col) {
    return col / 16 * 16 + col % 2 * 8 + col % 16 / 2;
  }
  static constexpr int position_of_row(int row) {
    return row % quarter / 2 * 8 + row / quarter * 2 + row % 2;
  }
};

// A group's codes of a token in shared memory, from where the block's rows are stored. The lanes of
// a quad write to different quarters, 32 bytes more than a multiple of 128 apart, so that a warp's
// stores fall into different banks.
template <class Config, Storage storage>
class StagedColumns {
 public:
  __device__ __forceinline__ StagedColumns(unsigned char* codes, int group)
      : codes_(codes + group * Config::codes_bytes) {}

  // This thread's codes of a tile; thread.first_row counts from the first of this block's columns.
  template <Outputs, Clamp clamp>
  __device__ __forceinline__ void stage(const float (&y)[Config::n / 2], const TokenScale& scale,
                                        const Problem&, ThreadRows thread) const {
    unsigned char* const first = codes_ + thread.quad_lane * quarter_bytes +
                                 code_bytes<storage>(Order::column(0, thread.first_row));
#pragma unroll
    for (int i = 0; i < Config::n / 2; i += 4) {
      uint32_t rows[2];
      pack<clamp>(rows, {y[i], y[i + 1]}, {y[i + 2], y[i + 3]}, scale);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        unsigned char* const place = first + Order::row(i + e, 0) * row_bytes;
        if constexpr (storage == Storage::int32) {
          *place = static_cast<unsigned char>(rows[e]);
        } else {
          *reinterpret_cast<uint16_t*>(place) = static_cast<uint16_t>(rows[e]);
        }
      }
    }
  }

  // Stores the block's columns, `first_col` on, called by all of the group.
  __device__ __forceinline__ void store(const Problem& problem, void* codes, uint32_t token,
                                        int first_col) const {
    constexpr int units = row_bytes / 16;  // of a row
    const uint64_t features = static_cast<uint64_t>(token) * problem.rows * problem.cols;
    unsigned char* const target =
        static_cast<unsigned char*>(codes) + (features + first_col >> (storage == Storage::int32));
    for (int i = threadIdx.x % Config::group_threads; i < problem.rows * units;
         i += Config::group_threads) {
      const int row = i / units, unit = i % units * 16;
      *reinterpret_cast<uint4*>(target + row * code_bytes<storage>(problem.cols) + unit) =
          *reinterpret_cast<const uint4*>(codes_ + row / Order::quarter * quarter_bytes +
                                          row % Order::quarter * row_bytes + unit);
    }
  }

  // Starts the stores where the block has all columns, so that rows follow each other; called by a
  // warp: each of four lanes a quarter.
  __device__ __forceinline__ void start_storing(const Problem& problem, void* codes,
                                                uint32_t token) const {
    const int lane = threadIdx.x % 32, first_row = lane * Order::quarter;
    if (lane >= 4 || first_row >= problem.rows) return;
    const int left = problem.rows - first_row;
    bulk_store(codes_ + lane * quarter_bytes,
               static_cast<unsigned char*>(codes) +
                   (static_cast<uint64_t>(token) * problem.rows + first_row) * row_bytes,
               (left < Order::quarter ? left : Order::quarter) * row_bytes);
  }

 private:
  using Order = TransposedOrder<Config::n>;
  static constexpr int row_bytes = code_bytes<storage>(Config::right_cols);
  static constexpr int quarter_bytes = Order::quarter * row_bytes + 32;
  static_assert(row_bytes % 16 == 0 && quarter_bytes % 128 == 32);
  static_assert(4 * quarter_bytes <= Config::codes_bytes);

  template <Clamp clamp>
  __device__ __forceinline__ static void pack(uint32_t (&rows)[2], const float (&even)[2],
                                              const float (&odd)[2], const TokenScale& scale) {
    if constexpr (storage == Storage::int32) {
      pack_int4_pairs<clamp>(rows, even, odd, scale);
    } else {
      pack_int8_pairs<clamp>(rows, even, odd, scale);
    }
  }

  unsigned char* codes_;
};

// exact_transform() of 16 columns, with both factors.
template <class Element, int count>
__device__ void exact_transform_transposed(float (&y)[count], const Problem& problem, int64_t token,
                                           ThreadRows thread) {
  using Order = TransposedOrder<2 * count>;
  thread.quad_lane = opaque(thread.quad_lane);
  const auto* x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const auto* left = static_cast<const Element*>(problem.left);
  const auto* right =
      static_cast<const Element*>(problem.right) + Order::column(0, thread.first_row);
#pragma unroll
  for (int i = 0; i < count; ++i) y[i] = 0.0f;
#pragma unroll 1
  for (int m = 0; m < problem.rows; ++m, x += problem.cols, left += problem.rows) {
    float v[2] = {};  // of X @ right
#pragma unroll 1
    for (int k = thread.quad_lane; k < problem.cols; k += 4) {
      const float value = static_cast<float>(x[k]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[half] = fmaf(static_cast<float>(right[k * problem.cols + half]), value, v[half]);
      }
    }
    v[0] = quad_sum(v[0]);
    v[1] = quad_sum(v[1]);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = Order::row(i, thread.quad_lane);
      if (row < problem.rows) y[i] = fmaf(v[i / 2 % 2], static_cast<float>(left[row]), y[i]);
    }
  }
}

// store_transformed() of 16 columns.
template <int count>
__device__ __forceinline__ void store_transformed_transposed(const float (&y)[count],
                                                             const Problem& problem, uint32_t token,
                                                             ThreadRows thread) {
  using Order = TransposedOrder<2 * count>;
  const int64_t first = static_cast<int64_t>(opaque(token)) * problem.rows * problem.cols +
                        Order::column(0, thread.first_row);
#pragma unroll
  for (int i = 0; i < count; i += 4) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = Order::row(i + e, thread.quad_lane);
      if (row >= problem.rows) continue;
      const float pair[] = {y[i + e], y[i + e + 2]};
      store_values(problem.transformed_dtype, problem.transformed, first + row * problem.cols, pair,
                   2);
    }
  }
}

}  // namespace flatquant::sm90
