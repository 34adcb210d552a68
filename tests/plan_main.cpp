// Checks sm80::Plan (csrc/sm80/config.h) for every size on GPUs with 99, 163 and 227 KiB of shared
// memory for a block; prints what does not fit and counts the plans.
#include <cstdio>

#include "sm80/config.h"

using namespace flatquant::sm80;

int main() {
  int plans = 0;
  const int kibibytes[] = {99, 163, 227};
  for (const int limit : kibibytes) {
    for (int rows = 1; rows <= max_size; ++rows) {
      for (int cols = 1; cols <= max_size; ++cols, ++plans) {
        const Plan plan(rows, cols, limit * 1024);
        const int plan_rows = plan.passes * plan.warps * 16 * row_tiles(plan.cols, plan.streamed);
        const bool fits = plan.shared_bytes <= limit * 1024 &&
                          plan.threads() <= 32 * max_warps(plan.cols, plan.streamed) &&
                          plan.stages >= (plan.streamed ? 2 : 1);
        const bool covers = plan.cols >= cols && plan_rows >= rows;
        const bool has_barriers = plan.warps == 1 || plan.groups <= 15;
        if (!fits || !covers || !has_barriers) {
          std::printf("%d x %d with %d KiB: fits %d, covers %d, barriers %d\n", rows, cols, limit,
                      fits, covers, has_barriers);
        }
      }
    }
  }
  std::printf("%d plans\n", plans);
}
