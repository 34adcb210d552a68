// Tile choices of the sm80 kernels, as data, with the arithmetic that limits them. Plain C++.
#pragma once

namespace flatquant::sm80 {

constexpr int max_size = 256;  // of rows and of cols

constexpr bool serves(int rows, int cols) {
  return rows >= 1 && rows <= max_size && cols >= 1 && cols <= max_size;
}

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// What Y's columns are padded to, a kernel each; a problem goes to the smallest that holds it.
// resident: both factors stay in shared memory. streamed: for factors that do not fit there.
inline constexpr int resident_cols[] = {16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224};
inline constexpr int streamed_cols[] = {64, 128, 160, 192, 224, 256};

// 16-row tiles of a warp. With two, each fragment of B is read from shared memory for twice the
// arithmetic; Y then takes a thread `cols` registers, W as A fragments cols / 2.
constexpr int row_tiles(int cols, bool streamed) { return cols <= 128 && !streamed ? 2 : 1; }

// Warps of a block, one block to an SM: each of the SM's four partitions has 512 registers for a
// lane of its warps, and a thread needs 3/4 * cols * row_tiles for Y and W and some 40 others.
constexpr int max_warps(int cols, bool streamed) {
  const int needed = cols * row_tiles(cols, streamed) * 3 / 4;
  return needed <= 84 ? 16 : needed <= 144 ? 12 : 8;
}

// Rows of shared memory are 16 bytes longer than a multiple of 32: eight of them, which one
// ldmatrix reads, then start in different banks.
constexpr int pitch(int cols) { return cols + 8; }

constexpr int max_stages = 8;
constexpr int slice_rows = 32;  // of a streamed factor or token

// How a problem runs on a device. Offsets and bytes are of shared memory, in this order: extremes
// for each warp, scratch for each warp, then for the resident kernel left, right and the ring of
// stages, one token each; for the streamed one the ring of slices.
struct Plan {
  int cols;  // of the kernel
  bool streamed;
  int warps;       // of a token; each has row_tiles tiles
  int groups = 1;  // tokens that a block works on at once
  int passes = 1;  // in which `warps` go over the token's rows
  int stages = 0;  // of each group
  int left_cols;   // what left's columns, W's rows, are padded to
  int left_pitch;
  int scratch_bytes;  // of a warp
  int left_offset = 0, right_offset = 0;
  int ring_offset = 0, stage_bytes = 0;
  int shared_bytes = 0;

  static constexpr int scratch_offset = 16 * 8;

  constexpr Plan(int rows, int n, int shared_limit) : Plan(rows, n, false) {
    if (cols != 0) fit_resident(rows, shared_limit);
    if (stages == 0) {
      *this = Plan(rows, n, true);
      fit_streamed(shared_limit);
    }
  }

  constexpr int threads() const { return groups * warps * 32; }

 private:
  constexpr Plan(int rows, int n, bool is_streamed)
      : cols(0), streamed(is_streamed), warps(0), left_cols(0), left_pitch(0), scratch_bytes(0) {
    if (streamed) {
      for (const int c : streamed_cols) cols = cols == 0 && c >= n ? c : cols;
    } else {
      for (const int c : resident_cols) cols = cols == 0 && c >= n ? c : cols;
    }
    if (cols == 0) return;
    const int warp_rows = 16 * row_tiles(cols, streamed);
    const int most = max_warps(cols, streamed);
    const int blocks = round_up(rows, warp_rows) / warp_rows;
    passes = round_up(blocks, most) / most;
    warps = round_up(blocks, passes) / passes;
    left_cols = passes * warps * warp_rows;
    left_pitch = pitch(left_cols);
    scratch_bytes = n % 8 != 0 ? 8 * cols : 0;
  }

  // As many groups as registers allow. Two stages each, if no more than a third of the groups have
  // to go for that, else one. Leaves stages = 0 where nothing fits.
  constexpr void fit_resident(int rows, int shared_limit) {
    if (passes != 1) return;
    const int depth = round_up(rows, 16);
    const int most = max_warps(cols, false) / warps;
    stage_bytes = depth * pitch(cols) * 2;
    for (int wanted = 2; wanted >= 1; --wanted) {
      for (groups = most; groups >= 1 && (wanted == 1 || 3 * groups >= 2 * most); --groups) {
        left_offset = scratch_offset + groups * warps * scratch_bytes;
        right_offset = left_offset + depth * left_pitch * 2;
        ring_offset = right_offset + cols * pitch(cols) * 2;
        const int fitting = (shared_limit - ring_offset) / stage_bytes / groups;
        if (ring_offset > shared_limit || fitting < wanted) continue;
        stages = fitting < max_stages ? fitting : max_stages;
        shared_bytes = ring_offset + groups * stages * stage_bytes;
        return;
      }
    }
  }

  constexpr void fit_streamed(int shared_limit) {
    ring_offset = scratch_offset + warps * scratch_bytes;
    stage_bytes = slice_rows * (left_pitch + pitch(cols)) * 2;
    const int fitting = (shared_limit - ring_offset) / stage_bytes;
    stages = fitting < 4 ? fitting : 4;
    shared_bytes = ring_offset + stages * stage_bytes;
  }
};

// The largest problem streams in two stages even with the 99 KiB of sm_86, sm_89 and sm_120.
static_assert(Plan(max_size, max_size - 1, 99 * 1024).stages >= 2);

template <class Element_, int cols_, bool streamed>
struct Config {
  using Element = Element_;
  static constexpr int cols = cols_;
  static constexpr int row_tiles = sm80::row_tiles(cols, streamed);
  static constexpr int warp_rows = 16 * row_tiles;
  static constexpr int pitch = sm80::pitch(cols);
  // Neighbouring threads that copy a row of a token in units of 16 bytes: a power of two.
  static constexpr int row_lanes = cols <= 16    ? 2
                                   : cols <= 32  ? 4
                                   : cols <= 64  ? 8
                                   : cols <= 128 ? 16
                                                 : 32;
  static constexpr int max_threads = max_warps(cols, streamed) * 32;
};

}  // namespace flatquant::sm80
