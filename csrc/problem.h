// One quantisation problem as every kernel receives it: plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace flatquant {

enum class Dtype : int { float16, bfloat16, float32 };

// int8: one code a byte. int32: eight codes a word, element 8i+j in bits 4j..4j+3 of word i.
enum class Storage : int { int8, int32 };

// Y = left^T @ X @ right for each token X (rows x cols), scale = clip_ratio * max|Y| / 7.
struct Problem {
  const void* input;  // (tokens, rows * cols) of dtype, token t at element t * input_stride
  const void* left;   // (rows, rows) of dtype, contiguous
  const void* right;  // (cols, cols) of dtype, contiguous
  void* codes;        // (tokens, features) int8 or (tokens, features / 8) int32, contiguous
  float* scales;      // (tokens)
  int64_t tokens;
  int64_t input_stride;  // elements
  int rows;              // M
  int cols;              // N
  float clip_ratio;
  Dtype dtype;
  Storage storage;
  uint32_t* counter = nullptr;  // scratch of this launch, one word of any content, or none
};

}  // namespace flatquant
