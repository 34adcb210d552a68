// Shared-memory plan of the simt kernel. Host only C++.
#pragma once

namespace flatquant::simt {

constexpr int threads = 256;
constexpr int tile_rows = 64;  // eight for each of the eight warps
constexpr int tile_cols = 32;  // one for each lane
constexpr int tile_depth = 32;
constexpr int a_pitch = tile_rows + 4;  // keeps rows 16-byte aligned and off each other's banks

// One column of U must fit the 48 KiB of shared memory that every GPU has; a factor's elements are
// counted in int.
constexpr int max_rows = 8192;
constexpr int max_cols = 32768;

constexpr bool serves(int rows, int cols) {
  return rows >= 1 && rows <= max_rows && cols >= 1 && cols <= max_cols;
}

struct Plan {
  int chunk_cols;          // columns of Y computed at once; a power of two, at most tile_cols
  bool keeps_transformed;  // Y stays in shared memory until its scale is known; else it is computed
                           // twice
  int shared_bytes;

  constexpr Plan(int rows, int cols, int shared_limit)
      : chunk_cols(tile_cols), keeps_transformed(false), shared_bytes(0) {
    const int fixed = (tile_depth * a_pitch + tile_depth * tile_cols + threads / 32) * 4;
    while (chunk_cols > 1 && fixed + rows * chunk_cols * 4 > shared_limit) chunk_cols /= 2;
    shared_bytes = fixed + rows * chunk_cols * 4;
    const long long transformed = 4LL * rows * cols;
    keeps_transformed = shared_bytes + transformed <= shared_limit;
    if (keeps_transformed) shared_bytes += static_cast<int>(transformed);
  }
};

}  // namespace flatquant::simt
