// Checks sm80::Plan (csrc/sm80/config.h) for every size on GPUs with 99, 163 and 227 KiB of shared
// memory for a block, simt::Plan (csrc/simt/config.h) for every size up to 264 with 48 and 227 KiB,
// and plain::Plan (csrc/plain/config.h) for features to 70,000; prints what does not fit and counts
// the plans.
#include <cstdio>
#include <initializer_list>

#include "plain/config.h"
#include "simt/config.h"
#include "sm80/config.h"

int check_plain() {
  using namespace flatquant::plain;
  int plans = 0;
  for (int i = 1; i <= 70100; ++i) {
    const int features = i <= 70000 ? i : INT32_MAX - 977 * (i - 70001);  // and the largest
    for (const int element_size : {2, 4}) {
      for (const int64_t all_tokens : {int64_t{1}, few_tokens, few_tokens + 1}) {
        ++plans;
        const Plan plan(features, all_tokens, element_size);
        const int64_t chunk = 8 * thread_octets(element_size) * plan.token_threads;
        const bool whole_warps = plan.token_threads > 0 && plan.token_threads % 32 == 0 &&
                                 plan.tokens * plan.token_threads <= max_threads;
        // A block that synchronises has one token.
        const bool alone = plan.tokens == 1 || plan.token_threads == 32;
        const bool covers = plan.chunks * chunk >= features && (plan.chunks - 1) * chunk < features;
        const bool reads_once =
            features > max_threads * thread_bytes / element_size || plan.chunks == 1;
        if (!whole_warps || !alone || !covers || !reads_once) {
          std::printf("plain, %d features of %d bytes: warps %d, alone %d, covers %d, once %d\n",
                      features, element_size, whole_warps, alone, covers, reads_once);
        }
      }
    }
  }
  return plans;
}

int check_sm80() {
  using namespace flatquant::sm80;
  int plans = 0;
  const int kibibytes[] = {99, 163, 227};
  for (const int limit : kibibytes) {
    for (int rows = 1; rows <= max_size; ++rows) {
      for (int i = 0; i < 2 * max_size; ++i, ++plans) {
        const int cols = i / 2 + 1, size = i % 2 == 0 ? 2 : 4;
        const Plan plan(rows, cols, size, limit * 1024);
        if (plan.stages == 0) {
          // float32 alone, and that of some 128 x 128 where a block has 227 KiB.
          const bool may = size == 4 && (limit < 227 || rows > 128 || cols > 128);
          if (!may || serves(rows, cols, size, limit * 1024)) {
            std::printf("%d x %d of %d bytes with %d KiB: no plan\n", rows, cols, size, limit);
          }
          continue;
        }
        const int row_parts = parts(plan.cols, plan.streamed, size);
        const int plan_rows = plan.passes * plan.warps / row_parts * warp_rows;
        const bool fits = plan.shared_bytes <= limit * 1024 &&
                          plan.threads() <= 32 * max_warps(plan.cols, plan.streamed, size) &&
                          plan.stages >= (plan.streamed ? 2 : 1);
        const bool covers = plan.cols >= cols && plan_rows >= rows;
        const bool has_barriers = plan.warps == 1 || plan.groups <= 15;
        // W takes a stage of the ring, or the place before it.
        const int w_bytes = plan.pass_rows * plan.cols * size;
        const bool holds_w = !shares_w(plan.cols, plan.streamed, size) ||
                             (plan.streamed ? plan.w_offset + w_bytes <= plan.ring_offset
                                            : w_bytes <= plan.stage_bytes);
        // Extremes are cleared by a thread for each 16 bytes; stages' tokens lie before them.
        const int tokens_bytes = plan.streamed ? 0 : plan.groups * max_stages * 4;
        const int extremes_bytes = plan.groups * plan.extremes_size() * 8;
        const bool has_first = tokens_bytes <= plan.extremes_offset &&
                               plan.extremes_offset % 16 == 0 &&
                               extremes_bytes / 16 <= plan.threads() &&
                               plan.extremes_offset + extremes_bytes <= plan.scratch_offset &&
                               plan.scratch_offset % 16 == 0;
        if (!fits || !covers || !has_barriers || !holds_w || !has_first) {
          std::printf(
              "%d x %d of %d bytes with %d KiB: fits %d, covers %d, barriers %d, W %d, first %d\n",
              rows, cols, size, limit, fits, covers, has_barriers, holds_w, has_first);
        }
      }
    }
  }
  return plans;
}

int check_simt() {
  using namespace flatquant::simt;
  int plans = 0;
  for (const int limit : {48, 227}) {
    for (int rows = 1; rows <= 264; ++rows) {
      for (int cols = 1; cols <= 264; ++cols) {
        for (const Plan& plan :
             {Plan(rows, cols, limit * 1024), Plan::whole(rows, cols, limit * 1024)}) {
          ++plans;
          const int tiles = plan.tokens * plan.tile_rows * plan.tile_cols;
          const bool fits = plan.shared_bytes <= limit * 1024 && plan.threads <= max_threads &&
                            plan.threads >= tiles && plan.threads % 32 == 0;
          const bool covers = plan.row_chunks * plan.tile_rows * plan.tile_height >= rows &&
                              plan.col_chunks * plan.tile_cols * tile >= cols;
          // What a thread brings of a stage is one row of one panel.
          const bool brings = plan.left_depth * plan.tile_rows <= plan.threads &&
                              plan.left_depth * plan.tile_cols <= plan.tile_rows * plan.tile_cols &&
                              plan.right_depth * plan.tile_cols <= plan.threads;
          const bool is_full = plan.tile_rows * plan.tile_height == rows &&
                               plan.tile_cols * tile == cols && rows % plan.left_depth == 0 &&
                               plan.left_depth % tile == 0 && cols % plan.right_depth == 0 &&
                               plan.right_depth % tile == 0 && plan.row_chunks == 1 &&
                               plan.col_chunks == 1 && plan.w_size > 0;
          const int w_end = (flatquant::divide_up(cols, tile) - 1) * plan.w_panel + tile * tile;
          const bool holds_w = plan.w_size == 0 || w_end <= plan.w_pitch;
          if (!fits || !covers || !brings || !holds_w || (plan.is_whole && !is_full)) {
            std::printf("simt, %d x %d with %d KiB: fits %d, covers %d, brings %d, full %d, W %d\n",
                        rows, cols, limit, fits, covers, brings, is_full, holds_w);
          }
        }
      }
    }
  }
  return plans;
}

// The plans that the times in benchmarks/NOTES.md are of: tiles of seven rows and stages of 16
// where they pay.
struct Expected {
  int rows, cols, limit, height;
  bool is_whole;
  int left_depth, right_depth;
};
constexpr Expected expected_plans[] = {
    {112, 128, 227, 7, true, 16, 16}, {112, 128, 163, 8, true, 8, 8},  // else fewer threads an SM
    {128, 128, 227, 8, true, 16, 16}, {56, 64, 48, 7, true, 8, 16},   {64, 64, 48, 8, true, 8, 16},
    {64, 128, 227, 8, true, 8, 8},    {56, 56, 227, 8, false, 7, 8},
};

void check_choices() {
  for (const Expected& e : expected_plans) {
    const auto plan = flatquant::simt::Plan::whole(e.rows, e.cols, e.limit * 1024);
    if (plan.tile_height != e.height || plan.is_whole != e.is_whole ||
        plan.left_depth != e.left_depth || plan.right_depth != e.right_depth) {
      std::printf("simt, %d x %d with %d KiB: height %d, whole %d, stages of %d and %d\n", e.rows,
                  e.cols, e.limit, plan.tile_height, plan.is_whole, plan.left_depth,
                  plan.right_depth);
    }
  }
}

int main() {
  check_choices();
  std::printf("sm80 %d, simt %d, plain %d plans\n", check_sm80(), check_simt(), check_plain());
}
