// How the simt kernel cuts a problem, and the arithmetic of it. Plain C++.
#pragma once

#include "integers.h"

namespace flatquant::simt {

constexpr int tile = 8;              // a thread holds tile x tile sums
constexpr int max_threads = 512;     // of 128 registers: the sums, two tile edges, the next tile's
constexpr int max_depth = 8;         // rows of a factor in shared memory at once
constexpr int usual_threads = 128;   // four such blocks fill an SM, and wait at different times
constexpr int usual_shared = 49152;  // bytes that every GPU gives a block without asking

constexpr int max_size = 32768;  // a factor's elements are counted in int

// What a tile needs of the rows of a stage lies together, a panel (depth, tile): a thread's loads
// then differ by constants. Four floats more keep eight panels off each other's banks.
constexpr int panel_pitch(int depth) { return depth * tile + 4; }

constexpr bool serves(int rows, int cols) {
  return rows >= 1 && rows <= max_size && cols >= 1 && cols <= max_size;
}

// A block computes `tokens` tokens side by side, each with tile_rows x tile_cols threads. A token
// that is too large for that is cut into row chunks, and into column chunks too where not even one
// tile row of W = left^T X fits in shared memory. All chunks but one are then computed twice. How a
// problem is cut changes no sum's order, so no bit of the result.
struct Plan {
  int tokens = 1, tile_rows = 0, tile_cols = 0;
  int row_chunks = 1, col_chunks = 1;
  int threads = 0;
  int left_depth = 0, right_depth = 0;  // rows in shared memory at once of left and X, of right
  // Shared memory, in floats: four zeros, extremes, two stages, W of each token (none if w_size is
  // 0), whose tile rows are w_pitch apart and its tiles w_panel. Where a stage of right is a tile
  // deep, the store of four neighbours in two tile rows meets no bank twice.
  int w_panel = 0, w_pitch = 0, w_size = 0, stage_size = 0, extremes_size = 0;
  int shared_bytes = 0;

  constexpr Plan(int rows, int cols, int shared_limit) {
    const int all_rows = divide_up(rows, tile), all_cols = divide_up(cols, tile);
    for (tokens = usual_threads / (all_rows * all_cols); tokens > 1; --tokens) {
      if (fits(all_rows, all_cols, cols, usual_shared)) return;
    }
    tokens = 1;
    while (!fits(divide_up(all_rows, row_chunks), all_cols, cols, shared_limit)) {
      if (++row_chunks > all_rows) break;
    }
    if (row_chunks <= all_rows) return;
    fits(smaller(all_rows, 4), smaller(all_cols, 64), 0, shared_limit);
    row_chunks = divide_up(all_rows, tile_rows);
    col_chunks = divide_up(all_cols, tile_cols);
  }

  // Whether all tiles and stages are full.
  constexpr bool is_whole(int rows, int cols) const {
    return rows % tile == 0 && cols % tile == 0 && w_size != 0 && row_chunks == 1 &&
           left_depth == max_depth && right_depth == max_depth;
  }

 private:
  // Sets what follows from `tokens` and the arguments; kept_cols are the columns of W to be kept.
  constexpr bool fits(int rows_of_tiles, int cols_of_tiles, int kept_cols, int shared_limit) {
    tile_rows = rows_of_tiles;
    tile_cols = cols_of_tiles;
    threads = divide_up(tokens * tile_rows * tile_cols, 32) * 32;
    if (threads > max_threads) return false;
    // No thread brings more than one row of a panel. A stage of right takes no two panels of W.
    left_depth = smaller(max_depth, smaller(tile_rows, tokens * tile_cols));
    for (right_depth = max_depth; right_depth > tokens * tile_rows;) right_depth /= 2;
    const int left_stage = panel_pitch(left_depth) * (tile_rows + tokens * tile_cols);
    const int right_stage =
        panel_pitch(right_depth) * ((kept_cols == 0 ? tile_rows : 0) + tile_cols);
    stage_size = left_stage > right_stage ? left_stage : right_stage;
    w_panel = right_depth == max_depth ? panel_pitch(max_depth) : tile * tile;
    w_pitch = divide_up(divide_up(kept_cols, tile) * w_panel - 16, 32) * 32 + 16;
    w_size = kept_cols == 0 ? 0 : tile_rows * w_pitch;
    extremes_size = divide_up(2 * tokens, 4) * 4;
    shared_bytes = 4 * (4 + extremes_size + 2 * stage_size + tokens * w_size);
    return shared_bytes <= shared_limit;
  }
};

}  // namespace flatquant::simt
