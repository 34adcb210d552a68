// One problem as every kernel receives it: plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace flatquant {

enum class Dtype : int { float16, bfloat16, float32 };

// What float32 products round: nothing that float32 keeps, or operands to TF32's 11 bits. After
// torch.get_float32_matmul_precision().
enum class Precision : int { highest, high };

// int8: one code a byte. int32: eight codes a word, element 8i+j in bits 4j..4j+3 of word i.
enum class Storage : int { int8, int32 };

// One quantisation of Y: scale = max(max_ratio * max(Y, 0), min_ratio * max(-Y, 0)) / 7.
struct Output {
  // (tokens, features) int8 or (tokens, features / 8) int32, contiguous, aligned to 16 bytes
  void* codes;
  float* scales;  // (tokens)
  float max_ratio, min_ratio;
  // Where one is on the device; it is read instead of that above.
  const float* device_max_ratio = nullptr;
  const float* device_min_ratio = nullptr;
};

constexpr int max_outputs = 8;

// Whether a launch wants Problem::counter, to share the last tokens out as SMs get to them. All
// draw from one word, which hands out about one number a nanosecond: small tokens would wait for
// it.
constexpr bool shares_tokens(int64_t tokens, int features) {
  return tokens >= 2048 && features >= 2048;
}

// Y = left^T @ X @ right for each token X (rows x cols). A null factor is the identity. Where one
// is missing, a kernel may take the rows for others, see sm90::regrouped().
struct Problem {
  const void* input;  // (tokens, rows * cols) of dtype, token t at element t * input_stride
  const void* left;   // (left_size(), left_size()) of dtype, contiguous, for kron(left, I)
  const void* right;  // (right_size(), right_size()) of dtype, contiguous, for kron(I, right)
  int64_t tokens;
  int64_t input_stride;                     // elements
  int rows;                                 // M
  int cols;                                 // N
  int left_repeats = 1, right_repeats = 1;  // the sizes of I
  Dtype dtype;
  Precision precision = Precision::highest;  // of float32
  Storage storage;
  int output_count;  // 0: Y itself is stored
  Output outputs[max_outputs];
  void* transformed = nullptr;  // (tokens, rows * cols) of transformed_dtype, contiguous
  Dtype transformed_dtype = Dtype::float32;
  uint32_t* counter = nullptr;  // scratch of this launch, one word of any content, or none

  constexpr int left_size() const { return rows / left_repeats; }
  constexpr int right_size() const { return cols / right_repeats; }

  // Which element of the array is (row, col) of the matrix that a factor stands for, -1 for a zero
  // of the identity's; 0 on the diagonal where the factor is missing.
  constexpr int left_index(int row, int col) const {
    const int repeats = left == nullptr ? rows : left_repeats;
    if (row % repeats != col % repeats) return -1;
    return row / repeats * left_size() + col / repeats;
  }
  constexpr int right_index(int row, int col) const {
    const int size = right_size();
    if (row / size != col / size) return -1;
    return row % size * size + col % size;
  }

  // Whether a kernel needs no more than max|Y| and one ratio on the host.
  constexpr bool is_simple() const {
    return output_count == 1 && outputs[0].max_ratio == outputs[0].min_ratio &&
           outputs[0].device_max_ratio == nullptr && outputs[0].device_min_ratio == nullptr;
  }
};

}  // namespace flatquant
