// Tile choices of the sm80 kernels, as data, with the arithmetic that limits them. Plain C++.
#pragma once

#include "integers.h"
#include "problem.h"

namespace flatquant::sm80 {

constexpr int max_size = 256;  // of rows and of cols

// What Y's columns are padded to, a kernel each; a problem goes to the smallest that holds it.
// resident: both factors stay in shared memory. streamed: for factors that do not fit there.
inline constexpr int resident_cols[] = {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224};
inline constexpr int streamed_cols[] = {64, 128, 160, 192, 224, 256};

// Those that are instantiated for float32 too: resident ones alone, as streamed ones are often
// slower than CUDA cores.
constexpr bool has_float32(int cols, bool streamed) {
  return !streamed && cols % 32 == 0 && cols <= 128;
}

// A warp computes 32 rows, two tiles of the instruction, so that each fragment of B is read from
// shared memory for twice the arithmetic; and all columns, or a part of them where Y in registers
// would be too much.
constexpr int warp_rows = 32;
constexpr int parts(int cols, bool streamed, int element_size) {
  return cols > 224 ? 4 : cols > (streamed || element_size == 4 ? 64 : 128) ? 2 : 1;
}

// W goes from a product to the next in registers, as A fragments, or through shared memory: where
// each of a row's parts needs all of it, and where slices of right would not find it in registers.
constexpr bool shares_w(int cols, bool streamed, int element_size) {
  return streamed || parts(cols, streamed, element_size) > 1;
}

// Warps of a block, one block to an SM: each of the SM's four partitions has 512 registers for a
// lane of its warps. A thread needs one for each of its columns for Y, half as many for W where
// that is not shared (of float32 as many), and some 50 others; 32 more of float32, which is split.
constexpr int max_warps(int cols, bool streamed, int element_size) {
  const bool is_float32 = element_size == 4;
  const int warp_cols = cols / parts(cols, streamed, element_size);
  const int w = shares_w(cols, streamed, element_size) ? 0 : warp_cols * element_size / 4;
  const int needed = 48 + warp_cols + w + (is_float32 ? 32 : 0);
  return needed <= 128 ? 16 : needed <= 168 ? 12 : 8;
}

// Rows of shared memory are 16 bytes longer than a multiple of 32: eight of them, which one
// ldmatrix reads, then start in different banks; so do every other one of four, from each of which
// eight lanes read float32.
constexpr int pitch(int cols, int element_size) { return cols + 16 / element_size; }

constexpr int max_stages = 4;

// How a problem runs on a device; without stages if it does not, as large ones of float32. Offsets
// and bytes are of shared memory, in this order: for the resident kernel which token each stage
// holds, extremes for each warp, scratch for each 32 rows, then for the resident kernel left, right
// and the ring of stages, one token each; for the streamed one W and the ring of slices.
struct Plan {
  int element_size;
  int cols;  // of the kernel
  bool streamed;
  int warps;       // of a token
  int groups = 1;  // tokens that a block works on at once
  int passes = 1;  // in which `warps` go over the token's rows
  int stages = 0;  // of each group
  int pass_rows;   // what a pass computes of W and Y
  int left_pitch;
  int scratch_bytes;  // of 32 rows
  int extremes_offset = 0, scratch_offset = 0;
  int left_offset = 0, right_offset = 0, w_offset = 0;
  int slice_rows = 0;  // of a streamed factor or token
  int ring_offset = 0, stage_bytes = 0;
  int shared_bytes = 0;

  // Of a group, of 8 bytes at most: one for each warp, if it has others, and so many that all are
  // read by 16 bytes.
  constexpr int extremes_size() const { return warps == 1 ? 0 : round_up(warps, 4); }

  constexpr Plan(int rows, int n, int size, int shared_limit) : Plan(rows, n, size, false) {
    if (cols != 0) fit_resident(rows, shared_limit);
    if (stages == 0 && size == 2) {
      *this = Plan(rows, n, size, true);
      while (!fits_streamed(shared_limit) && pass_rows > warp_rows) divide(rows, passes + 1);
    }
  }

  constexpr int threads() const { return groups * warps * 32; }

 private:
  constexpr Plan(int rows, int n, int size, bool is_streamed)
      : element_size(size),
        cols(0),
        streamed(is_streamed),
        warps(0),
        pass_rows(0),
        left_pitch(0),
        scratch_bytes(0) {
    const auto consider = [&](int kernel_cols) {
      const bool exists = size == 2 || has_float32(kernel_cols, streamed);
      if (cols == 0 && kernel_cols >= n && exists) cols = kernel_cols;
    };
    if (streamed) {
      for (const int kernel_cols : streamed_cols) consider(kernel_cols);
    } else {
      for (const int kernel_cols : resident_cols) consider(kernel_cols);
    }
    if (cols == 0) return;
    scratch_bytes = n % 8 != 0 ? 8 * cols : 0;
    divide(rows, 1);
  }

  // In as few passes as registers allow, but no fewer than `least`.
  constexpr void divide(int rows, int least) {
    const int row_parts = parts(cols, streamed, element_size);
    const int most = max_warps(cols, streamed, element_size) / row_parts;  // times 32 rows
    const int blocks = divide_up(rows, warp_rows);
    passes = divide_up(blocks, most);
    if (passes < least) passes = least;
    const int pass_blocks = divide_up(blocks, passes);
    warps = pass_blocks * row_parts;
    pass_rows = pass_blocks * warp_rows;
    left_pitch = pitch(pass_rows, element_size);
  }

  // Sets the offsets of what comes first; returns where it ends.
  constexpr int place_first() {
    extremes_offset = streamed ? 0 : groups * max_stages * 4;
    scratch_offset = extremes_offset + groups * extremes_size() * 8;
    return scratch_offset + groups * (pass_rows / warp_rows) * scratch_bytes;
  }

  // As many groups as registers allow. Two stages each, if no more than a third of the groups have
  // to go for that, else one. Leaves stages = 0 where nothing fits.
  constexpr void fit_resident(int rows, int shared_limit) {
    if (passes != 1) return;
    const int depth = round_up(rows, 16);
    const int most = max_warps(cols, false, element_size) / warps;
    const int row_bytes = pitch(cols, element_size) * element_size;
    const int w_bytes = pass_rows * cols * element_size;
    stage_bytes = depth * row_bytes;
    if (shares_w(cols, false, element_size) && w_bytes > stage_bytes) {
      stage_bytes = w_bytes;  // W takes the token's place
    }
    for (int wanted = 2; wanted >= 1; --wanted) {
      for (groups = most; groups >= 1 && (wanted == 1 || 3 * groups >= 2 * most); --groups) {
        left_offset = place_first();
        right_offset = left_offset + depth * left_pitch * element_size;
        ring_offset = right_offset + cols * row_bytes;
        const int fitting = (shared_limit - ring_offset) / stage_bytes / groups;
        if (ring_offset > shared_limit || fitting < wanted) continue;
        stages = fitting < max_stages ? fitting : max_stages;
        shared_bytes = ring_offset + groups * stages * stage_bytes;
        return;
      }
    }
  }

  // Three slices of 32 rows, each with half the barriers, or at least two of 16.
  constexpr bool fits_streamed(int shared_limit) {
    w_offset = place_first();
    ring_offset = w_offset + pass_rows * cols * element_size;
    for (slice_rows = 32;; slice_rows = 16) {
      stage_bytes = slice_rows * (left_pitch + pitch(cols, element_size)) * element_size;
      const int fitting = (shared_limit - ring_offset) / stage_bytes;
      stages = fitting < max_stages ? fitting : max_stages;
      shared_bytes = ring_offset + stages * stage_bytes;
      if (stages >= 3) return true;
      if (slice_rows == 16) return stages >= 2;
    }
  }
};

// The largest problem streams in two passes even with the 99 KiB of sm_86, sm_89 and sm_120.
static_assert(Plan(max_size, max_size - 1, 2, 99 * 1024).passes == 2);

// There is a plan for all sizes of 16 bits, which need not ask for it at every call.
constexpr bool serves(int rows, int cols, int element_size, int shared_limit) {
  return rows >= 1 && rows <= max_size && cols >= 1 && cols <= max_size &&
         (element_size == 2 || Plan(rows, cols, element_size, shared_limit).stages > 0);
}

template <class Element_, int cols_, bool streamed_, Precision precision_ = Precision::highest>
struct Config {
  using Element = Element_;
  static constexpr int element_size = sizeof(Element);
  static constexpr bool is_float32 = element_size == 4;
  // Each float32 is the sum of two of TF32, or else rounded to one.
  static constexpr bool splits = is_float32 && precision_ == Precision::highest;
  static constexpr int step = is_float32 ? 8 : 16;  // values of k of one instruction
  static constexpr int cols = cols_;
  static constexpr bool streamed = streamed_;
  static constexpr int parts = sm80::parts(cols, streamed, element_size);
  static constexpr int warp_cols = cols / parts;
  static constexpr bool shares_w = sm80::shares_w(cols, streamed, element_size);
  static constexpr int pitch = sm80::pitch(cols, element_size);
  // Neighbouring threads that copy a row of what one warp copies in units of 16 bytes: a power of
  // two.
  static constexpr int row_bytes = warp_cols * element_size;
  static constexpr int row_lanes = row_bytes <= 32    ? 2
                                   : row_bytes <= 64  ? 4
                                   : row_bytes <= 128 ? 8
                                                      : 16;
  static constexpr int max_threads = max_warps(cols, streamed, element_size) * 32;
  // Of problems without padding. Eight warps of 112 columns leave registers to load each step's
  // fragments during the one before.
  static constexpr int max_whole_threads = cols > 192 ? 8 * 32 : max_threads;
  static constexpr bool loads_ahead(bool is_whole) {
    return !streamed && !splits && (!shares_w || is_float32 || (is_whole && cols > 192));
  }
};

}  // namespace flatquant::sm80
