// How the simt kernel cuts a problem, and the arithmetic of it. Plain C++.
#pragma once

#include "integers.h"

namespace flatquant::simt {

constexpr int tile = 8;              // a thread holds tile x tile sums,
constexpr int low_tile = 7;          // or low_tile x tile
constexpr int max_threads = 512;     // of 128 registers: the sums, two tile edges, the next tile's
constexpr int usual_depth = 8;       // rows of a factor in shared memory at once, at most
constexpr int whole_depth = 16;      // the same where nothing is padded: half as many barriers
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
  int tile_height = tile;  // rows of a thread's sums
  bool is_whole = false;   // nothing is padded or cut into chunks; stages are of whole tiles
  int tokens = 1, tile_rows = 0, tile_cols = 0;
  int row_chunks = 1, col_chunks = 1;
  int threads = 0;
  int left_depth = 0, right_depth = 0;  // rows in shared memory at once of left and X, of right
  // Shared memory, in floats: four zeros, extremes, two stages, W of each token (none if w_size is
  // 0), whose tile rows are w_pitch apart and its tiles w_panel. Where a stage of right takes whole
  // tiles, the store of four neighbours in two tile rows meets no bank twice.
  int w_panel = 0, w_pitch = 0, w_size = 0, stage_size = 0, extremes_size = 0;
  int shared_bytes = 0;

  constexpr Plan(int rows, int cols, int shared_limit, int height = tile) : tile_height(height) {
    const int all_rows = divide_up(rows, height), all_cols = divide_up(cols, tile);
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

  // A plan that is whole, if there is any, else the constructor's.
  static constexpr Plan whole(int rows, int cols, int shared_limit) {
    const Plan usual(rows, cols, shared_limit), low(rows, cols, shared_limit, low_tile);
    // A token of 112x128 is seven warps, by low tiles eight: two for each scheduler.
    const bool fills_warps = low.tokens * low.tile_rows * low.tile_cols == low.threads;
    if (fills_warps && low.has_no_padding(rows, cols) &&
        low.resident(shared_limit) >= usual.resident(shared_limit)) {
      return low.as_whole(rows, cols, shared_limit);
    }
    return usual.has_no_padding(rows, cols) ? usual.as_whole(rows, cols, shared_limit) : usual;
  }

 private:
  constexpr bool has_no_padding(int rows, int cols) const {
    return tile_rows * tile_height == rows && tile_cols * tile == cols && w_size != 0 &&
           rows % left_depth == 0 && cols % right_depth == 0 && left_depth % tile == 0 &&
           right_depth % tile == 0;
  }

  // With stages of whole_depth rows, if as many threads still find room on an SM.
  constexpr Plan as_whole(int rows, int cols, int shared_limit) const {
    Plan flat = *this;
    flat.is_whole = true;
    Plan deep = flat;
    if (rows % whole_depth == 0 && most_of_left() >= whole_depth) deep.left_depth = whole_depth;
    if (cols % whole_depth == 0 && most_of_right() >= whole_depth) deep.right_depth = whole_depth;
    deep.lay_out(cols);
    return deep.resident(shared_limit) == resident(shared_limit) ? deep : flat;
  }

  // Sets what follows from `tokens` and the arguments; kept_cols are the columns of W to be kept.
  constexpr bool fits(int rows_of_tiles, int cols_of_tiles, int kept_cols, int shared_limit) {
    tile_rows = rows_of_tiles;
    tile_cols = cols_of_tiles;
    threads = divide_up(tokens * tile_rows * tile_cols, 32) * 32;
    if (threads > max_threads) return false;
    left_depth = smaller(usual_depth, most_of_left());
    for (right_depth = usual_depth; right_depth > most_of_right();) right_depth /= 2;
    lay_out(kept_cols);
    return shared_bytes <= shared_limit;
  }

  // How deep stages can be of which no thread brings more than one row of a panel.
  constexpr int most_of_left() const { return smaller(tile_rows, tokens * tile_cols); }
  constexpr int most_of_right() const { return tokens * tile_rows; }

  // A stage of right takes a part of a panel of W, or whole ones.
  constexpr void lay_out(int kept_cols) {
    const int left_stage = panel_pitch(left_depth) * (tile_rows + tokens * tile_cols);
    const int right_stage =
        panel_pitch(right_depth) * ((kept_cols == 0 ? tile_rows : 0) + tile_cols);
    stage_size = left_stage > right_stage ? left_stage : right_stage;
    w_panel = right_depth % tile == 0 ? panel_pitch(tile) : tile * tile;
    w_pitch = divide_up(divide_up(kept_cols, tile) * w_panel - 16, 32) * 32 + 16;
    w_size = kept_cols == 0 ? 0 : tile_rows * w_pitch;
    extremes_size = divide_up(2 * tokens, 4) * 4;
    shared_bytes = 4 * (4 + extremes_size + 2 * stage_size + tokens * w_size);
  }

  // Threads on an SM, by the shared memory of those from 8.0 on: what a block may have and a KiB;
  // each block costs one.
  constexpr int resident(int shared_limit) const {
    return smaller(max_threads / threads, (shared_limit + 1024) / (shared_bytes + 1024)) * threads;
  }
};

}  // namespace flatquant::simt
