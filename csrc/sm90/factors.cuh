// The factors of the sm90 kernel on their way to shared memory, for 16-bit inputs.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "fragment.cuh"
#include "problem.h"
#include "sm90/block.cuh"
#include "sm90/config.h"
#include "sm90/hopper.cuh"
#include "sm90/transposed.cuh"

namespace flatquant::sm90 {

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

}  // namespace flatquant::sm90
