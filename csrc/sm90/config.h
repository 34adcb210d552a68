// Tile choices of the sm90 kernel, as data, with the arithmetic that limits them. Plain C++.
#pragma once

#include <cstdint>

#include "integers.h"
#include "problem.h"

namespace flatquant::sm90 {

// A shape class: tokens of up to depth rows and cols columns. wgmma takes K in steps of 16, so
// depth and cols are what real sizes round up to; its M of 64 pads the rows further, to row_tiles
// tiles of each block. Where one block cannot hold a token's accumulators, a cluster of two does.
struct ShapeClass {
  int depth, cols;
  constexpr int blocks() const { return depth <= 192 ? 1 : 2; }
  constexpr int row_tiles() const { return (depth + 64 * blocks() - 1) / (64 * blocks()); }
  constexpr bool holds(int rows, int n) const { return rows <= depth && n <= cols; }
};

// Every model's layer sizes with cols a multiple of 8 (tests/shapes.py), one for wide tokens and
// one for ragged ones. A problem goes to the first that holds and serves it.
inline constexpr ShapeClass shape_classes[] = {
    {16, 16},   {16, 32},   {32, 32},   {32, 48},   {32, 64},   {48, 48},   {48, 64},
    {64, 64},   {64, 80},   {64, 96},   {64, 112},  {64, 128},  {64, 192},  {80, 80},
    {80, 96},   {80, 112},  {80, 128},  {96, 96},   {96, 112},  {96, 128},  {112, 128},
    {128, 128}, {128, 144}, {128, 160}, {128, 176}, {128, 208}, {128, 224}, {128, 256},
    {144, 192}, {160, 160}, {176, 176}, {192, 192}, {208, 256}};
constexpr int shape_class_count = sizeof(shape_classes) / sizeof(ShapeClass);

template <int count>
constexpr bool is_among(const ShapeClass (&classes)[count], ShapeClass shape) {
  for (const ShapeClass other : classes) {
    if (shape.depth == other.depth && shape.cols == other.cols) return true;
  }
  return false;
}

// Those that are instantiated for float32 too: fewer, as few models run in it, and no larger ones,
// as a factor takes twice the shared memory. Their columns fill whole panels.
constexpr bool has_float32(ShapeClass shape) {
  constexpr ShapeClass classes[] = {{32, 32}, {64, 64}, {64, 128}, {96, 128}, {128, 128}};
  return is_among(classes, shape);
}

// TMA reads rows in units of 16 bytes. A token whose rows are no multiple of that, but which is one
// itself, as its codes are, arrives as a whole and is cut into rows by its group.
constexpr bool is_ragged(int cols) { return cols % 8 != 0; }

// Those that are instantiated for ragged tokens too. ColumnOrder must have no half word for them.
constexpr bool has_ragged(ShapeClass shape) {
  constexpr ShapeClass classes[] = {{48, 64}, {64, 96}, {128, 160}};
  return is_among(classes, shape);
}

// Those whose products are transposed, Y^T = (right^T @ X^T) @ left, for tokens with both factors
// and all columns: wgmma's M is then the columns, of which none are padded, and rows are padded to
// 16 only. That is less work by nearly a fifth or more.
constexpr bool is_transposed(ShapeClass shape) {
  constexpr ShapeClass classes[] = {{80, 128}, {96, 128}, {144, 192}, {208, 256}};
  return is_among(classes, shape);
}
constexpr bool is_transposed(ShapeClass shape, const Problem& problem) {
  return is_transposed(shape) && problem.cols == shape.cols && problem.left != nullptr &&
         problem.right != nullptr;
}

// Whether the class serves a problem that it holds. What fills too little of it is faster in sm80:
// less than half with ragged tokens, less than five eighths with clusters.
constexpr bool serves(ShapeClass shape, Dtype dtype, int rows, int cols) {
  const int size = rows * cols, full = shape.depth * shape.cols;
  if (is_ragged(cols)) {
    return dtype != Dtype::float32 && has_ragged(shape) && cols % 4 == 0 && rows % 8 == 0 &&
           2 * size >= full;
  }
  return (dtype != Dtype::float32 || has_float32(shape)) &&
         (shape.blocks() == 1 || 8 * size >= 5 * full);
}

// Index into shape_classes, -1 where none serves the problem.
constexpr int find_shape_class(Dtype dtype, int rows, int cols) {
  for (int i = 0; i < shape_class_count; ++i) {
    const ShapeClass shape = shape_classes[i];
    if (shape.holds(rows, cols) && serves(shape, dtype, rows, cols)) return i;
  }
  return -1;
}

// Tokens that share a tile's 64 rows, one below the other, where one would fill at most half of
// them. The left factor is then repeated along the diagonal.
constexpr int stack(Dtype dtype, ShapeClass shape) {
  return dtype == Dtype::float32 || shape.depth > 32 ? 1 : 64 / shape.depth;
}

// Multiply-adds of a token in its class, the padded ones too, where it has one factor only (and is
// never transposed).
constexpr int multiply_adds(Dtype dtype, int rows, int cols) {
  const ShapeClass shape = shape_classes[find_shape_class(dtype, rows, cols)];
  const int tokens = stack(dtype, shape);
  return 64 * shape.row_tiles() * shape.blocks() * shape.cols *
         (tokens * shape.depth + shape.cols) / tokens;
}

constexpr bool serves(Dtype dtype, int rows, int cols) {
  return rows >= 1 && cols >= 1 && find_shape_class(dtype, rows, cols) >= 0;
}

// With one factor only, rows can be cut or joined: left^T @ X is kron(left, I)^T @ X' for X' of
// `repeats` times the rows, X @ right is X' @ kron(I, right) for X' of so many times the columns.
// Returns the problem in the sizes of least work: a token of 32 x 128 without a right factor takes
// half of a tile's rows, one of 64 x 64 all.
constexpr Problem regrouped(const Problem& problem) {
  Problem best = problem;
  if ((problem.left == nullptr) == (problem.right == nullptr)) return best;
  const bool cuts = problem.right == nullptr;
  const int most = cuts ? problem.cols : problem.rows;
  for (int repeats = 2; repeats <= most; ++repeats) {
    if (most % repeats != 0) continue;
    Problem other = problem;
    other.rows = cuts ? problem.rows * repeats : problem.rows / repeats;
    other.cols = cuts ? problem.cols / repeats : problem.cols * repeats;
    (cuts ? other.left_repeats : other.right_repeats) = repeats;
    const Dtype dtype = problem.dtype;
    if (!is_ragged(other.cols) && serves(dtype, other.rows, other.cols) &&
        multiply_adds(dtype, other.rows, other.cols) < multiply_adds(dtype, best.rows, best.cols)) {
      best = other;
    }
  }
  return best;
}

// All matrices in shared memory are operands of 2-byte elements with k as their row: the left
// factor (k, m), the token (k, n) and the right factor (k, n); or transposed the right factor (k,
// m), the left factor (k, n) and the token (n, k), which lies as it does otherwise. Each is cut
// into panels of `width` columns by `depth` rows, a row being one swizzle span (32, 64 or 128
// bytes), panels one after another. The wider the faster, so that the last panel may have columns
// that nobody reads.
struct Panel {
  static constexpr int width(int cols) { return cols <= 16 ? 16 : cols <= 32 ? 32 : 64; }

  // Element offset of (k, col), the 16-byte chunks of a row swizzled as TMA and wgmma
  // do: address bits 4.. ^= address bits 7..
  static constexpr int offset(int width, int depth, int k, int col) {
    const int in_panel = k * width + col % width;
    const int swizzle_mask = width / 8 - 1;
    return col / width * depth * width + (in_panel ^ (((in_panel >> 6) & swizzle_mask) << 3));
  }
};

// Registers of a thread where `warpgroups` of them share an SM; 255 is what one can name.
constexpr int registers(int warpgroups) {
  const int share = 512 / warpgroups / 8 * 8;
  return share < 255 ? share : 255;
}

// A thread holds Y's accumulators (n / 2 for each of its tiles) and W as A fragments (n / 4 for
// each part, see Config); some 32 more serve everything else, and 8 a second part.
constexpr bool registers_suffice(int warpgroups, int n, int parts, int tiles) {
  return n * (2 * tiles + parts) / 4 + 24 + 8 * parts <= registers(warpgroups);
}

// Tokens in work at once, each by a group of warpgroups with so many tiles each: one's epilogue
// runs beside the others' products.
constexpr int tokens_at_once(int warpgroups, int n, int parts, int tiles = 1) {
  int tokens = 8 / warpgroups;
  while (tokens > 1 && !registers_suffice(tokens * warpgroups, n, parts, tiles)) --tokens;
  return tokens;
}

// Where that is one token, the next one's first product can run under its epilogue: a second
// accumulator, and at the least 31 registers beside them.
constexpr bool overlaps(int warpgroups, int n) {
  return tokens_at_once(warpgroups, n, 1) == 1 && n + 31 <= registers(warpgroups);
}

// wgmma multiplies matrices of Operand. One of float32 is the sum of `parts` float16 matrices, with
// 11 bits each: two for Precision::highest, one for Precision::high.
template <class Element_, class Operand_, int depth_, int cols_, int parts_ = 1,
          bool ragged_ = false, bool transposed_ = false>
struct Config {
  using Element = Element_;  // of the problem
  using Operand = Operand_;  // 2 bytes
  static constexpr int parts = parts_;
  static constexpr bool is_float32 = sizeof(Element) == 4;
  static constexpr bool is_ragged = ragged_;
  static constexpr bool is_transposed = transposed_;
  // What the kernel calls a token is a stack of so many, of which each has token_depth of the rows.
  static constexpr int stack =
      sm90::stack(is_float32 ? Dtype::float32 : Dtype::float16, ShapeClass{depth_, cols_});
  static constexpr int token_depth = depth_;
  static constexpr int depth = stack * depth_;
  static constexpr int cols = cols_;
  static constexpr int blocks = ShapeClass{depth, cols}.blocks();  // of a cluster

  // A block's accumulators are row_tiles * 64 by n, transposed if the products are. The first
  // product's K is k, the second's is n.
  static constexpr int row_tiles =
      is_transposed ? cols / 64 / blocks : ShapeClass{depth, cols}.row_tiles();
  static constexpr int n = is_transposed ? depth : cols;
  static constexpr int k = is_transposed ? cols : depth;
  // Each warpgroup has so many of the tiles: one, or all of a token's, one after the other, where
  // more tokens are then in work.
  static constexpr int tiles = !is_float32 && tokens_at_once(1, n, parts, row_tiles) >
                                                  tokens_at_once(row_tiles, n, parts)
                                   ? row_tiles
                                   : 1;
  static_assert(tiles <= 2);

  static constexpr int group_warpgroups = row_tiles / tiles;
  // Each works on one token.
  static constexpr int groups = tokens_at_once(group_warpgroups, n, parts, tiles);
  static constexpr int group_threads = group_warpgroups * 128;
  static constexpr int threads = groups * group_threads;
  static constexpr bool overlaps = !is_float32 && tiles == 1 && sm90::overlaps(row_tiles, n);

  // A stage holds a token, or where both factors leave no room for one, a slice of it, along the
  // first product's K: rows, or columns where transposed.
  static constexpr int slice_k = blocks == 1 ? k : is_transposed ? 32 : 16;
  static constexpr int slices = k / slice_k;  // of a token
  static_assert(slices * slice_k == k);
  static constexpr int slice_rows = is_transposed ? depth : slice_k;
  static constexpr int slice_cols = is_transposed ? slice_k : cols;
  static constexpr int slice_row(int slice) { return is_transposed ? 0 : slice * slice_rows; }
  static constexpr int slice_col(int slice) { return is_transposed ? slice * slice_cols : 0; }

  // Shared memory: SharedStorage, then right, left (what its rows of Y need), the ring of slices
  // and codes on their way to memory, the parts of a matrix one after the other. A float32 token is
  // split in place. The factors are A of the first product and B of the second.
  static constexpr int width = Panel::width(slice_cols);  // of a token
  static constexpr int a_bytes = k * 64 * row_tiles * 2;
  // Narrow panels pad less, which makes room for a stage of 208 columns or a ragged token's codes.
  static constexpr int b_width = (slices > 1 && is_transposed) || is_ragged ? 32 : Panel::width(n);
  static constexpr int b_cols = round_up(n, b_width);  // in whole panels
  static constexpr int b_bytes = round_up(n * b_cols * 2, 1024);
  static constexpr int right_bytes = is_transposed ? a_bytes : b_bytes;
  static constexpr int left_bytes = is_transposed ? b_bytes : a_bytes;
  static constexpr int left_cols = is_transposed ? n : 64 * row_tiles;
  static constexpr int right_cols = is_transposed ? 64 * row_tiles : n;
  static constexpr int right_width = is_transposed ? 64 : b_width;
  static constexpr int panel_cols = round_up(slice_cols, width);
  static constexpr int part_bytes = slice_rows * panel_cols * 2;
  // It arrives in boxes of so many columns; a ragged token as it is.
  static constexpr int box_cols = is_float32 ? cols : width;
  static constexpr int boxes = (slice_cols + box_cols - 1) / box_cols;  // of a slice
  static constexpr int fillers = slices == 1 ? 1 : boxes;
  // Where the first product's B begins from some k of a slice on.
  static constexpr int k_bytes(int first) {
    return is_transposed ? (first / width * slice_rows * width + first % width) * 2
                         : first * width * 2;
  }
  static constexpr int slice_bytes = slice_rows * panel_cols * static_cast<int>(sizeof(Element));
  static_assert(!is_float32 || panel_cols == cols);
  // Two KiB where the stages are many.
  static constexpr int right_offset = slice_bytes <= 2048 ? 2048 : 1024;
  static constexpr int left_offset = right_offset + parts * right_bytes;
  static constexpr int ring_offset = left_offset + parts * left_bytes;
  static constexpr int stage_bytes = round_up(slice_bytes, 1024);
  // Of a group: a token's codes, of int8 at most, transposed ones in quarters that lie in banks of
  // their own. TMA can store them where the block has whole rows.
  static constexpr bool stages_codes = is_transposed || is_ragged;
  static constexpr int codes_bytes = is_transposed ? depth * right_cols + 4 * 32
                                     : is_ragged   ? 64 * row_tiles * cols
                                                   : 0;
  static constexpr bool bulk_stores = blocks == 1;
  static constexpr int stages_that_fit =
      (227 * 1024 - ring_offset - groups * codes_bytes) / stage_bytes;
  // Some 96 KiB in flight cover the latency of memory; each group has two at the least.
  static constexpr int enough_stages = stage_bytes > 8192   ? 12
                                       : stage_bytes < 2048 ? 48
                                                            : 96 * 1024 / stage_bytes;
  static constexpr int max_stages = enough_stages < 2 * groups ? 2 * groups : enough_stages;
  static constexpr int stages_wanted = stages_that_fit < max_stages ? stages_that_fit : max_stages;
  // A multiple of groups: every stage belongs to one group, which fills it again when it is done.
  static constexpr int stages = stages_wanted / groups * groups;
  // Where tokens in flight are few, a stage is filled again as soon as the first product has read
  // it; elsewhere that waits for a barrier that the group needs anyway. Staged codes of whole
  // tokens, too, are stored behind the barrier that this takes.
  static constexpr bool refills_early = stages == groups || overlaps || slices > 1 || stages_codes;
  // Of a sliced token, what is multiplied under the epilogue of the one before, which is what there
  // is room for; or just the first.
  static constexpr int slices_ahead = overlaps && slices > 1 ? stages : 1;
  static constexpr int codes_offset = ring_offset + stages * stage_bytes;
  static constexpr int shared_bytes = codes_offset + groups * codes_bytes;
  static_assert(stages >= 1);
  static_assert(shared_bytes <= 227 * 1024);
  static_assert(tiles == 1 || slices == 1);
  static_assert(stack == 1 || (tiles == 1 && slices == 1 && !overlaps && !stages_codes));
  // Whole panels and tiles of columns.
  static_assert(!is_transposed || (cols % (64 * blocks) == 0 && !is_float32 && !is_ragged));
  // Late stores by TMA take the order without overlapping for granted, those by threads
  // that with it.
  static_assert(!is_transposed || overlaps != bulk_stores);
  static_assert(!overlaps || !is_ragged);
  // What the kernel takes for granted of clusters.
  static_assert(blocks == 1 || (groups == 1 && stages > 1 && stages + slices_ahead - 1 < slices &&
                                !is_float32 && !is_ragged));
  static_assert(boxes % fillers == 0 && fillers * 32 <= threads);
};

}  // namespace flatquant::sm90
