// Tile choices of the sm90 kernel, as data, with the arithmetic that limits them. Host only C++.
#pragma once

#include <cstdint>

namespace flatquant::sm90 {

// A shape class: tokens of up to depth rows and cols columns. wgmma takes K in steps of 16, so
// depth and cols are what real sizes round up to; its M of 64 pads the rows further, to row_tiles
// tiles.
struct ShapeClass {
  int depth, cols;
  constexpr int row_tiles() const { return (depth + 63) / 64; }
  constexpr bool holds(int rows, int n) const { return rows <= depth && n <= cols; }
};

// Every model's layer sizes with cols a multiple of 8 (tests/shapes.py), and one for wide tokens.
// A problem goes to the first that holds it.
inline constexpr ShapeClass shape_classes[] = {
    {16, 16},   {16, 32},   {32, 32},   {32, 48},   {32, 64},   {48, 48},   {48, 64},   {64, 64},
    {64, 80},   {64, 96},   {64, 112},  {64, 128},  {64, 192},  {80, 80},   {80, 96},   {80, 112},
    {80, 128},  {96, 96},   {96, 112},  {96, 128},  {112, 128}, {128, 128}, {128, 144}, {128, 176},
    {128, 208}, {128, 224}, {128, 256}, {144, 192}, {160, 160}, {176, 176}, {192, 192}};
constexpr int shape_class_count = sizeof(shape_classes) / sizeof(ShapeClass);

// Index into shape_classes, -1 where none holds the problem.
constexpr int find_shape_class(int rows, int cols) {
  for (int i = 0; i < shape_class_count; ++i) {
    if (shape_classes[i].holds(rows, cols)) return i;
  }
  return -1;
}

// The copy engine reads rows in units of 16 bytes.
constexpr bool serves(int rows, int cols) {
  return rows >= 1 && cols >= 1 && cols % 8 == 0 && find_shape_class(rows, cols) >= 0;
}

// All matrices in shared memory are operands of 2-byte elements with k as their row: the left
// factor as it lies (k, m), the token (k, n) and the right factor (k, n). Each is cut into panels
// of `width` columns by `depth` rows, a row being one swizzle span (32, 64 or 128 bytes), panels
// one after another.
struct Panel {
  static constexpr int width(int cols) { return cols % 64 == 0 ? 64 : cols % 32 == 0 ? 32 : 16; }

  // Element offset of (k, col), the 16-byte chunks of a row swizzled as the copy engine and wgmma
  // do: address bits 4.. ^= address bits 7..
  static constexpr int offset(int width, int depth, int k, int col) {
    const int in_panel = k * width + col % width;
    const int swizzle_mask = width / 8 - 1;
    return col / width * depth * width + (in_panel ^ (((in_panel >> 6) & swizzle_mask) << 3));
  }
};

// Order of the right factor's columns in shared memory. An accumulator row gives a thread two
// neighbouring columns of every eight; the right factor's columns are permuted so that those are
// consecutive features: a whole int4 word from each four blocks of eight, `vector` such words side
// by side where that makes wider stores. A last half group of two blocks gives half a word.
template <int cols>
struct ColumnOrder {
  static_assert(cols % 16 == 0);
  static constexpr int words = cols / 32;  // per thread and row
  static constexpr int vector = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
  static constexpr bool has_half_word = cols % 32 != 0;

  // First feature column of a thread's word; quad_lane is its lane % 4.
  static constexpr int word_column(int word, int quad_lane) {
    return ((word / vector * 4 + quad_lane) * vector + word % vector) * 8;
  }
  static constexpr int half_word_column(int quad_lane) { return 32 * words + 4 * quad_lane; }

  // Where column `col` of the right factor is put.
  static constexpr int position(int col) {
    const int quad_lane = col < 32 * words ? col / 8 / vector % 4 : col % 16 / 4;
    const int word = col / 8 / (4 * vector) * vector + col / 8 % vector;
    const int block = col < 32 * words ? 4 * word + col % 8 / 2 : 4 * words + col % 4 / 2;
    return 8 * block + 2 * quad_lane + col % 2;
  }
};

// Registers. The block starts with what fits all its warpgroups and the producer's then gives most
// of its share to the consumers' (setmaxnreg).
constexpr int producer_registers = 24;
constexpr int consumer_registers(int warpgroups) {
  constexpr int registers[] = {0, 240, 240, 160, 112};
  return registers[warpgroups];
}

// A consumer thread holds Y's accumulator (cols / 2) and, where it starts the next token's first
// product before this token's epilogue, that one's accumulator too; else W as A fragments
// (cols / 4). Everything else takes about 40.
constexpr bool overlaps(int warpgroups, int cols) {
  return cols + 40 <= consumer_registers(warpgroups);
}

// Tokens in work at once, each by row_tiles consumer warpgroups: as many as may overlap.
constexpr int tokens_at_once(int row_tiles, int cols) {
  int tokens = 4 / row_tiles;
  while (tokens > 1 && !overlaps(tokens * row_tiles, cols)) --tokens;
  return tokens;
}

template <class Element_, int depth_, int cols_>
struct Config {
  using Element = Element_;
  using Order = ColumnOrder<cols_>;
  static constexpr int depth = depth_;
  static constexpr int cols = cols_;
  static constexpr int row_tiles = ShapeClass{depth, cols}.row_tiles();

  static constexpr int groups = tokens_at_once(row_tiles, cols);  // a group works on one token
  static constexpr int group_threads = row_tiles * 128;
  static constexpr int consumers = groups * group_threads;
  static constexpr int threads = consumers + 128;
  static constexpr bool overlaps = sm90::overlaps(consumers / 128, cols);

  // Shared memory: SharedStorage in the first KiB, then right, left and the ring of tokens.
  static constexpr int width = Panel::width(cols);
  static constexpr int token_bytes = depth * cols * 2;
  static constexpr int right_offset = 1024;
  static constexpr int left_offset = right_offset + (cols * cols * 2 + 1023) / 1024 * 1024;
  static constexpr int ring_offset = left_offset + depth * 64 * row_tiles * 2;
  static constexpr int stage_bytes = (token_bytes + 1023) / 1024 * 1024;
  static constexpr int stages_that_fit = (227 * 1024 - ring_offset) / stage_bytes;
  // Some 64 KiB in flight cover the latency of memory; more than 32 stages was not tried.
  static constexpr int max_stages = 32;
  static constexpr int stages_wanted = stages_that_fit < max_stages ? stages_that_fit : max_stages;
  // A multiple of groups gives every stage to one group. A barrier's parity tells two phases apart;
  // a group that had not itself used the last phase could take an older one for the one it awaits.
  static constexpr int stages = stages_wanted / groups * groups;
  static constexpr int shared_bytes = ring_offset + stages * stage_bytes;
  static_assert(stages >= 1);
};

}  // namespace flatquant::sm90
