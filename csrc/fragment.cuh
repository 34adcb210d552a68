// A warp's 16 rows of Y as the accumulators of mma instructions hold them, and their way to memory.
// Accumulator 4 * block + 2 * half + e of a lane is row lane / 4 + 8 * half, position
// 8 * block + 2 * (lane % 4) + e; ColumnOrder says which column of Y is at which position. Without
// a right factor W is Y; then, and where is_ordered() says so, a position is its column, and the
// lanes of a quad exchange codes instead.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "outputs.cuh"
#include "problem.h"
#include "quantize.cuh"

// Before 7.0 compilers refuse it, even on kernels that are empty there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
#define FLATQUANT_GRID_CONSTANT __grid_constant__
#else
#define FLATQUANT_GRID_CONSTANT
#endif

namespace flatquant {

// What a kernel does with W and Y. `simple` is problem.is_simple(), which needs no more than max|Y|
// and whose few instructions matter where the epilogue binds; `any` serves all with a right factor,
// `in_place` too, of which ColumnOrder has not permuted the columns; `left_only` all without one.
enum class Outputs { simple, any, in_place, left_only };
constexpr bool is_ordered(Outputs outputs) {
  return outputs == Outputs::simple || outputs == Outputs::any;
}
template <Outputs outputs>
using Reduced = std::conditional_t<outputs == Outputs::simple, Magnitude, Extremes>;

// Calls use(outputs), an integral_constant, with what the problem needs.
template <class Use>
void with_outputs(const Problem& problem, Use use) {
  if (problem.right == nullptr) {
    use(std::integral_constant<Outputs, Outputs::left_only>());
  } else if (problem.is_simple()) {
    use(std::integral_constant<Outputs, Outputs::simple>());
  } else {
    use(std::integral_constant<Outputs, Outputs::any>());
  }
}

// Order of the right factor's columns in shared memory. An accumulator row gives a thread two
// neighbouring positions of every eight; the right factor's columns are permuted so that those are
// consecutive features: a whole int4 word from each four blocks of eight, and as many such words
// side by side as make one store: four, two or one. A last half group of two blocks gives half a
// word.
template <int cols>
struct ColumnOrder {
  static_assert(cols % 16 == 0);
  static constexpr int words = cols / 32;  // per thread and row
  static constexpr bool has_half_word = cols % 32 != 0;

  // Words of the vector that a word belongs to, as a power of two. The widest come first, so that
  // each is aligned; four words are not where rows are an odd multiple of two. Three words are as
  // fast one by one.
  static constexpr int widest = words == 3 ? 0 : words >= 4 && cols % 32 == 0 ? 2 : words >= 2;
  static constexpr int vector_log(int word) {
    if (words % (1 << widest) == 0) return widest;
    return widest == 2 && word < words / 4 * 4 ? 2 : word < words / 2 * 2 ? 1 : 0;
  }
  static constexpr int vector_size(int word) { return 1 << vector_log(word); }

  // First feature column of a thread's word; quad_lane is its lane % 4.
  static constexpr int word_column(int word, int quad_lane) {
    const int size = vector_size(word);
    return ((word / size * 4 + quad_lane) * size + word % size) * 8;
  }
  static constexpr int half_word_column(int quad_lane) { return 32 * words + 4 * quad_lane; }

  // Column of a thread's first of two positions in a block of eight; the second is the next one.
  static constexpr int column(int block, int quad_lane) {
    return block < 4 * words ? word_column(block / 4, quad_lane) + 2 * (block % 4)
                             : half_word_column(quad_lane) + 2 * (block - 4 * words);
  }

  // Where column `col` of the right factor is put.
  static constexpr int position(int col) {
    const int octet = col / 8, log = vector_log(octet / 4), size = 1 << log;
    const int quad_lane = col < 32 * words ? (octet >> log) % 4 : col % 16 / 4;
    const int word = (octet >> (log + 2) << log) + octet % size;
    const int block = col < 32 * words ? 4 * word + col % 8 / 2 : 4 * words + col % 4 / 2;
    return 8 * block + 2 * quad_lane + col % 2;
  }
};

// This thread's share of 16 rows: first_row and first_row + 8, of each the columns that ColumnOrder
// gives to quad_lane (those of its codes where lanes exchange them), counted from first_col. Of
// transposed accumulators they are columns, see sm90/transposed.cuh.
struct ThreadRows {
  int first_row;
  int quad_lane;
  int first_col = 0;
  bool is_stored = true;  // or nothing of it is

  __device__ __forceinline__ bool has_row(int half, int rows) const {
    return is_stored && first_row + 8 * half < rows;
  }
};

// Threads that work together, and which of them this is.
struct Team {
  int thread, threads;
};

// The value, of which the compiler no longer knows how it came about: it would compute what depends
// on it ahead of all branches, and spill that.
template <class Value>
__device__ __forceinline__ Value opaque(Value value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Value) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
#endif
  return value;
}

// Read from one lane, so that the compiler knows it to be uniform in the warp.
template <class Value>
__device__ __forceinline__ Value warp_uniform(Value value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// Includes `count` values in shared memory, which are read by 16 bytes or all at once, and aligned
// to that.
template <int count, class Reduced>
__device__ __forceinline__ void include_all(Reduced& result, const Reduced* values) {
  constexpr int size = count * sizeof(Reduced) < 16 ? count * sizeof(Reduced) : 16;
  struct alignas(size) Vector {
    Reduced values[size / sizeof(Reduced)];
  };
  static_assert(count * sizeof(Reduced) % sizeof(Vector) == 0);
#pragma unroll
  for (int i = 0; i < static_cast<int>(count * sizeof(Reduced) / sizeof(Vector)); ++i) {
    const Vector vector = reinterpret_cast<const Vector*>(values)[i];
    for (const Reduced& value : vector.values) result.include(value);
  }
}

// Sum over the four lanes of a quad, the same bits in each.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Of all values of the warp. Never called on older architectures, which compile the kernels empty.
__device__ __forceinline__ Magnitude warp_reduce(Magnitude magnitude) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  magnitude.max = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(magnitude.max)));
#endif
  return magnitude;
}
__device__ __forceinline__ Extremes warp_reduce(Extremes extremes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  extremes.high = __reduce_max_sync(0xffffffffu, extremes.high);
  extremes.low = __reduce_max_sync(0xffffffffu, extremes.low);
#endif
  return extremes;
}

// The largest |y|, NaN if there is one; in four independent chains.
template <int count>
__device__ __forceinline__ float absmax(const float (&y)[count]) {
  float max[4] = {y[0], y[1], y[2], y[3]};
#pragma unroll
  for (int i = 4; i < count; ++i) max[i % 4] = absmax(max[i % 4], y[i]);
  return absmax(absmax(max[0], max[1]), absmax(max[2], max[3]));
}

// The extremes of a thread's values; in four independent chains.
template <int count>
__device__ __forceinline__ Extremes extremes(const float (&y)[count]) {
  static_assert(count % 8 == 0);
  Extremes four[4];
#pragma unroll
  for (int i = 0; i < count; i += 8) {
#pragma unroll
    for (int chain = 0; chain < 4; ++chain) {
      const uint32_t a = float_bits(y[i + chain]), b = float_bits(y[i + 4 + chain]);
#if defined(__CUDA_ARCH__)
      four[chain].high = __vimax3_s32(four[chain].high, static_cast<int>(a), static_cast<int>(b));
      four[chain].low = __vimax3_u32(four[chain].low, a, b);
#else
      four[chain].include(bits_float(a));
      four[chain].include(bits_float(b));
#endif
    }
  }
  four[0].include(four[1]);
  four[2].include(four[3]);
  four[0].include(four[2]);
  return four[0];
}

// What Reduced says of a thread's values.
template <class Reduced, int count>
__device__ __forceinline__ Reduced reduce(const float (&y)[count]) {
  if constexpr (std::is_same_v<Reduced, Magnitude>) {
    return {absmax(y)};
  } else {
    return extremes(y);
  }
}

// 16 rows of Y in plain float32 arithmetic and without padding. For the rare tokens whose Y holds
// NaN or Inf: because finite values of W were beyond float16's range, or because X or a factor
// holds them, which padding would turn into more of them (0 * Inf is NaN).
template <class Element, Outputs outputs, int count>
__device__ void exact_transform(float (&y)[count], const Problem& problem, int64_t token,
                                ThreadRows thread) {
  thread.quad_lane = opaque(thread.quad_lane);
  const auto* x = static_cast<const Element*>(problem.input) + token * problem.input_stride;
  const auto* left = static_cast<const Element*>(problem.left);
  const auto* right = static_cast<const Element*>(problem.right);
#pragma unroll
  for (int i = 0; i < count; ++i) y[i] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < problem.cols; ++k) {
    // The right factor's row; a division for each of its columns would take most of the code.
    const int right_size = outputs == Outputs::left_only ? 1 : problem.right_size();
    const int right_row = k % right_size;
    float w[2] = {};
#pragma unroll 1
    for (int m = thread.quad_lane; m < problem.rows; m += 4) {
      const float value = static_cast<float>(x[m * problem.cols + k]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = thread.first_row + 8 * half;
        // Zeros of the identity take part in no sum, as 0 * Inf is NaN.
        const int index = problem.left_index(m, row);
        if (row >= problem.rows || index < 0) continue;
        const float factor = left == nullptr ? 1.0f : static_cast<float>(left[index]);
        w[half] = fmaf(factor, value, w[half]);
      }
    }
    w[0] = quad_sum(w[0]);
    w[1] = quad_sum(w[1]);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int half = i / 2 % 2;
      const int col = thread.first_col + i % 2 +
                      (is_ordered(outputs) ? ColumnOrder<2 * count>::column(i / 4, thread.quad_lane)
                                           : 8 * (i / 4) + 2 * thread.quad_lane);
      if (thread.first_row + 8 * half >= problem.rows || col >= problem.cols) continue;
      const int right_col = col - k + right_row;
      if (right_col < 0 || right_col >= right_size) continue;
      float factor = 1.0f;
      if constexpr (outputs != Outputs::left_only) {
        factor = static_cast<float>(right[right_row * right_size + right_col]);
      }
      y[i] = fmaf(w[half], factor, y[i]);
    }
  }
}

// A 4x4 transpose over the lanes of a quad, of the four quarters of words: unit i of lane j becomes
// unit j of lane i.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[1], int quad_lane) {
  uint32_t other = __shfl_xor_sync(0xffffffffu, words[0], 1);
  words[0] = __byte_perm(words[0], other, quad_lane & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(0xffffffffu, words[0], 2);
  words[0] = __byte_perm(words[0], other, quad_lane & 2 ? 0x3276 : 0x5410);
}
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[2], int quad_lane) {
#pragma unroll
  for (uint32_t& word : words) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, 1);
    word = __byte_perm(word, other, quad_lane & 1 ? 0x3276 : 0x5410);
  }
  const bool upper = quad_lane & 2;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? words[0] : words[1], 2);
  words[0] = upper ? other : words[0];
  words[1] = upper ? words[1] : other;
}

// Codes of a thread's row `half` in the columns of one word of ColumnOrder, eight of them or, in
// the half word, four: in one 32-bit word, or two of int8 (of the half word, the first).
template <int cols, Outputs outputs, Storage storage, Clamp clamp>
__device__ __forceinline__ void pack_word(uint32_t (&words)[storage == Storage::int32 ? 1 : 2],
                                          const float (&y)[cols / 2], const TokenScale& scale,
                                          int word, int half, int quad_lane) {
  using Order = ColumnOrder<cols>;
  const bool is_half_word = word == Order::words;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // Before an exchange, two codes for each lane of the quad.
    const int block = !is_ordered(outputs) && !is_half_word ? Order::word_column(word, i / 2) / 8
                                                            : 4 * word + i / 2;
    const int accumulator = 4 * block + 2 * half + i % 2;
    values[i] = accumulator < cols / 2 ? y[accumulator] : 0.0f;
  }
  const float four[4] = {values[0], values[1], values[2], values[3]};
  if constexpr (storage == Storage::int32) {
    words[0] = is_half_word ? pack_int4<clamp>(four, scale) : pack_int4<clamp>(values, scale);
  } else {
    words[0] = pack_int8<clamp>(four, scale);
    if (!is_half_word) {
      words[1] = pack_int8<clamp>({values[4], values[5], values[6], values[7]}, scale);
    }
  }
  if constexpr (!is_ordered(outputs)) {
    if (!is_half_word) {
      transpose_in_quad(words, quad_lane);
    } else {
      // Two codes from each of two lanes, those of a block of eight.
      const int lane = 2 * (quad_lane % 2);
      const uint32_t low = __shfl_sync(0xffffffffu, words[0], lane, 4);
      const uint32_t high = __shfl_sync(0xffffffffu, words[0], lane + 1, 4);
      words[0] = storage == Storage::int32
                     ? __byte_perm(low, high, quad_lane & 2 ? 0x0051 : 0x0040)
                     : __byte_perm(low, high, quad_lane & 2 ? 0x7632 : 0x5410);
    }
  }
}

// Bytes of codes; those of int4 are counted at even features only.
template <Storage storage>
FLATQUANT_HOST_DEVICE constexpr unsigned code_bytes(int features) {
  return static_cast<unsigned>(features) >> (storage == Storage::int32);
}

// Where a thread's first row begins in the codes of a token.
template <Storage storage, class Token>
__device__ __forceinline__ unsigned char* first_codes(const Problem& problem, void* codes,
                                                      Token token, ThreadRows thread) {
  return static_cast<unsigned char*>(codes) +
         static_cast<uint64_t>(token) * code_bytes<storage>(problem.rows * problem.cols) +
         code_bytes<storage>(thread.first_row * problem.cols);
}

// An array's first words.
template <int count>
using Words = const uint32_t (&)[count];

// Codes of a token's 16 rows whose problem.cols is a multiple of 8, so that every word lies inside
// a row. `is_whole`: all rows and columns are there, and whole vectors.
template <int cols, Outputs outputs, Storage storage, Clamp clamp, bool is_whole = false,
          class Token>
__device__ __forceinline__ void store_codes(const float (&y)[cols / 2], const TokenScale& scale,
                                            const Problem& problem, void* all_codes, Token token,
                                            ThreadRows thread) {
  using Order = ColumnOrder<cols>;
  constexpr bool packed = storage == Storage::int32;
  constexpr int words_per_octet = packed ? 1 : 2;  // 32-bit words of eight codes
  constexpr auto bytes = code_bytes<storage>;
  unsigned char* const first_row = first_codes<storage>(problem, all_codes, token, thread);

  const auto store_words = [&](int half, bool inside, unsigned char* codes, auto are_together) {
#pragma unroll
    for (int first = 0; first < Order::words; first += Order::vector_size(first)) {
      const int size = Order::vector_size(first);
      uint32_t words[Order::widest == 0 ? words_per_octet : 4 * words_per_octet];
#pragma unroll
      for (int word = 0; word < size; ++word) {
        uint32_t octet[words_per_octet];
        pack_word<cols, outputs, storage, clamp>(octet, y, scale, first + word, half,
                                                 thread.quad_lane);
#pragma unroll
        for (int i = 0; i < words_per_octet; ++i) words[word * words_per_octet + i] = octet[i];
      }
      const int col = thread.first_col + Order::word_column(first, thread.quad_lane);
      unsigned char* target = codes + bytes(col);
      if (are_together) {
        const bool exists = inside && (is_whole || col < problem.cols);
        if constexpr (Order::widest == 0) {
          store_if(exists, target, words);
        } else {
          // With initializer lists, or with `else`, the compiler's code takes up to 2% more time.
          if (size == 4) {
            store_if(exists, target, reinterpret_cast<Words<4 * words_per_octet>>(words));
          }
          if (size == 2) {
            store_if(exists, target, reinterpret_cast<Words<2 * words_per_octet>>(words));
          }
          if (size == 1) {
            store_if(exists, target, reinterpret_cast<Words<words_per_octet>>(words));
          }
        }
      } else {
        const int first_col = opaque(col);
#pragma unroll
        for (int word = 0; word < size; ++word) {
          uint32_t octet[words_per_octet];
#pragma unroll
          for (int i = 0; i < words_per_octet; ++i) octet[i] = words[word * words_per_octet + i];
          store_if(inside && first_col + 8 * word < problem.cols, target + bytes(8 * word), octet);
        }
      }
    }
  };
  const auto store_rows = [&](auto are_together) {
    unsigned char* codes = first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half, codes += bytes(8 * problem.cols)) {
      const bool inside = is_whole || thread.has_row(half, problem.rows);
      store_words(half, inside, codes, are_together);
    }
  };
  // Words of a vector lie inside the row together if its rows are aligned to the widest. Of the
  // usual outputs one branch decides for all, as each costs more than the words.
  const bool are_together =
      is_whole || Order::widest == 0 || problem.cols % (8 << Order::widest) == 0;
  if constexpr (outputs != Outputs::simple) {
    store_rows(are_together);
  } else if (are_together) {
    store_rows(std::true_type());
  } else {
    store_rows(std::false_type());
  }
  if constexpr (Order::has_half_word) {
    unsigned char* codes = first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half, codes += bytes(8 * problem.cols)) {
      const bool inside = is_whole || thread.has_row(half, problem.rows);
      uint32_t octet[words_per_octet];
      pack_word<cols, outputs, storage, clamp>(octet, y, scale, Order::words, half,
                                               thread.quad_lane);
      const int col = thread.first_col + Order::half_word_column(thread.quad_lane);
      if constexpr (packed) {
        store_if(inside && col < problem.cols, codes + bytes(col), static_cast<uint16_t>(octet[0]));
      } else {
        store_if(inside && col < problem.cols, codes + bytes(col), {octet[0]});
      }
    }
  }
}

// Four int8 codes in a 32-bit word as four int4 codes in its low half.
__device__ __forceinline__ uint32_t narrow_codes(uint32_t codes) {
  codes &= 0x0f0f0f0fu;
  codes = (codes | codes >> 4) & 0x00ff00ffu;
  return (codes | codes >> 8) & 0xffffu;
}

// The same for any problem.cols: words may go over the ends of rows. Eight rows at a time become
// int8 in `scratch` (eight of them, aligned to 8), a whole number of words, and are read back by
// features. `team` are the threads that have the columns of these rows; sync() is their barrier.
template <int cols, Outputs outputs, Clamp clamp, class Sync>
__device__ __forceinline__ void store_codes_of_any_cols(
    const float (&y)[cols / 2], const TokenScale& scale, const Problem& problem, void* all_codes,
    int64_t token, ThreadRows thread, unsigned char* scratch, Team team, Sync sync) {
  using Order = ColumnOrder<cols>;
  const int features = problem.rows * problem.cols;
  const bool by_fours = problem.cols % 4 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sync();  // the last rows have been read
    unsigned char* row = scratch + thread.first_row % 8 * problem.cols;
#pragma unroll
    for (int word = 0; word < (cols + 31) / 32; ++word) {
      const bool is_half_word = word == Order::words;
      uint32_t fours[2];
      pack_word<cols, outputs, Storage::int8, clamp>(fours, y, scale, word, half, thread.quad_lane);
      const int first =
          thread.first_col + (is_half_word ? Order::half_word_column(thread.quad_lane)
                                           : Order::word_column(word, thread.quad_lane));
#pragma unroll
      for (int part = 0; part < (is_half_word ? 1 : 2); ++part) {
        const int col = first + 4 * part;
        const uint32_t four = fours[part];
        if (by_fours) {
          if (col < problem.cols) *reinterpret_cast<uint32_t*>(row + col) = four;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (col + i < problem.cols) row[col + i] = static_cast<unsigned char>(four >> 8 * i);
          }
        }
      }
    }
    sync();
    const int first_row = thread.first_row - thread.first_row % 8 + 8 * half;
    const int rows = problem.rows - first_row < 8 ? problem.rows - first_row : 8;
    const int count = rows * problem.cols;  // negative where all rows are padding
    const int64_t first_feature = token * features + first_row * problem.cols;
    if (problem.storage == Storage::int32) {
      auto* words = static_cast<uint32_t*>(all_codes) + first_feature / 8;
      for (int i = team.thread; i < count / 8; i += team.threads) {
        const uint2 eight = reinterpret_cast<const uint2*>(scratch)[i];
        words[i] = narrow_codes(eight.x) | narrow_codes(eight.y) << 16;
      }
    } else {
      auto* codes = static_cast<unsigned char*>(all_codes) + first_feature;
      if (features % 4 == 0) {
        for (int i = team.thread; i < count / 4; i += team.threads) {
          reinterpret_cast<uint32_t*>(codes)[i] = reinterpret_cast<const uint32_t*>(scratch)[i];
        }
      } else {
        for (int i = team.thread; i < count; i += team.threads) codes[i] = scratch[i];
      }
    }
  }
}

// Y itself of a token's 16 rows.
template <int cols, Outputs outputs, class Token>
__device__ __forceinline__ void store_transformed(const float (&y)[cols / 2],
                                                  const Problem& problem, Token token,
                                                  ThreadRows thread) {
  using Order = ColumnOrder<cols>;
  token = opaque(token);
  thread.quad_lane = opaque(thread.quad_lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!thread.has_row(half, problem.rows)) continue;
    const int row = thread.first_row + 8 * half;
    const int64_t first =
        (static_cast<int64_t>(token) * problem.rows + row) * problem.cols + thread.first_col;
    // Positions 4 * block + .. of `size` neighbouring columns from `col` on.
    const auto store = [&](auto size, int block, int col) {
      float values[size()];
#pragma unroll
      for (int i = 0; i < size(); ++i) values[i] = y[4 * (block + i / 2) + 2 * half + i % 2];
      store_values(problem.transformed_dtype, problem.transformed, first + col, values,
                   problem.cols - thread.first_col - col);
    };
    if constexpr (!is_ordered(outputs)) {
#pragma unroll
      for (int block = 0; block < cols / 8; ++block) {
        store(std::integral_constant<int, 2>(), block, 8 * block + 2 * thread.quad_lane);
      }
    } else {
#pragma unroll
      for (int word = 0; word < Order::words; ++word) {
        store(std::integral_constant<int, 8>(), 4 * word,
              Order::word_column(word, thread.quad_lane));
      }
      if constexpr (Order::has_half_word) {
        store(std::integral_constant<int, 4>(), 4 * Order::words,
              Order::half_word_column(thread.quad_lane));
      }
    }
  }
}

// Calls use(clamp), an integral_constant, with the cheapest Clamp that serves the scale.
template <bool has_lanes, class Use>
__device__ __forceinline__ void with_clamp(const TokenScale& scale, Use use) {
  if (!scale.clamps) {
    use(std::integral_constant<Clamp, Clamp::none>());
    return;
  }
  if constexpr (has_lanes) {
    if (!scale.saturates) {
      use(std::integral_constant<Clamp, Clamp::lanes>());
      return;
    }
  }
  use(std::integral_constant<Clamp, Clamp::saturated>());
}

// Calls use(storage), an integral_constant, with the problem's.
template <class Use>
__device__ __forceinline__ void with_storage(const Problem& problem, Use use) {
  if (problem.storage == Storage::int32) {
    use(std::integral_constant<Storage, Storage::int32>());
  } else {
    use(std::integral_constant<Storage, Storage::int8>());
  }
}

// The output whose ratios and scales this lane of a warp has; the first one's if there is none.
__device__ __forceinline__ const Output& lane_output(const Problem& problem) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return problem.outputs[lane < problem.output_count ? lane : 0];
}

// How a token is quantised for each of problem.outputs, spread over the lanes of a warp, so that
// all are computed at once.
template <bool has_lanes>
class OutputScales {
 public:
  // `ratios` of lane_output().
  __device__ OutputScales(const Ratios& ratios, const Extremes& extremes)
      : mine_(ratios.scale(extremes, has_lanes)) {}

  // The scales of a token to memory; called by one warp.
  __device__ void store(const Problem& problem, int64_t token) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane < problem.output_count) problem.outputs[lane].scales[token] = mine_.scale;
  }

  // Calls use(codes, scale, clamp) for each output.
  template <class Use>
  __device__ __forceinline__ void for_each(const Problem& problem, Use use) const {
    const uint32_t clamps = __ballot_sync(0xffffffffu, mine_.clamps);
    const uint32_t saturates = __ballot_sync(0xffffffffu, mine_.saturates);
#pragma unroll 1
    for (int i = 0; i < problem.output_count; ++i) {
      TokenScale scale = mine_;
      scale.inverse = __shfl_sync(0xffffffffu, mine_.inverse, i);
      scale.clamps = clamps >> i & 1;
      scale.saturates = saturates >> i & 1;
      with_clamp<has_lanes>(scale, [&](auto clamp) {
        if constexpr (clamp() == Clamp::saturated) {
          scale.factor = __shfl_sync(0xffffffffu, mine_.factor, i);
          scale.multiplier = __shfl_sync(0xffffffffu, mine_.multiplier, i);
          scale.constant = __shfl_sync(0xffffffffu, mine_.constant, i);
        }
        use(problem.outputs[i].codes, scale, clamp);
      });
    }
  }

 private:
  TokenScale mine_;
};

// All that is stored of a warp's part of a token: calls with_store(use), to be given a
// store(codes, scale, clamp) that serves all outputs, or store_transformed(). `ratios` are those of
// lane_output(); the first of a token's warps stores the scales.
template <Outputs outputs, bool has_lanes, class WithStore, class StoreTransformed>
__device__ __forceinline__ void store_token(const Problem& problem, int64_t token,
                                            const Reduced<outputs>& reduced, const Ratios& ratios,
                                            bool is_first_warp, WithStore with_store,
                                            StoreTransformed store_transformed) {
  if constexpr (outputs == Outputs::simple) {
    const Output& output = problem.outputs[0];
    const float ratio = output.max_ratio;
    const TokenScale scale(ratio * reduced.max, ratio, ratio, has_lanes);
    if (is_first_warp && threadIdx.x % 32 == 0) output.scales[token] = scale.scale;
    with_store([&](auto store) {
      with_clamp<has_lanes>(scale, [&](auto clamp) { store(output.codes, scale, clamp); });
    });
  } else if (problem.output_count == 0) {
    store_transformed();
  } else {
    const OutputScales<has_lanes> scales(ratios, reduced);
    if (is_first_warp) scales.store(problem, token);
    with_store([&](auto store) { scales.for_each(problem, store); });
  }
}

}  // namespace flatquant
