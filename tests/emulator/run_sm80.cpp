// Runs the sm80 kernels in the emulator: run_sm80 CASE RESULT (see case.h). The seed also chooses
// the device's shared memory, and with it the kernel and its stages.
#include <iterator>
#include <utility>

#include "case.h"
#include "sm80/kernel.cuh"
#include "with_element.h"

using namespace flatquant;
using namespace flatquant::sm80;

// Of GPUs; and less, so that small problems stream too, where that is enough.
Plan make_plan(const Problem& problem, uint64_t seed) {
  constexpr int kibibytes[] = {227, 163, 99, 48, 24};
  const auto element_size = static_cast<int>(emulator::dtype_bytes(problem.dtype));
  for (int i = seed % std::size(kibibytes); i > 0; --i) {
    const Plan plan(problem.rows, problem.cols, element_size, kibibytes[i] * 1024);
    if (plan.stages >= (plan.streamed ? 2 : 1)) return plan;
  }
  return Plan(problem.rows, problem.cols, element_size, kibibytes[0] * 1024);
}

template <class Element, int cols, bool streamed>
void launch_if(const Problem& problem, const Plan& plan, unsigned blocks, uint64_t seed) {
  if (plan.streamed != streamed || plan.cols != cols) return;
  emulator::attach_sm80();
  with_config<Element, cols, streamed>(problem, [&](auto config) {
    using Class = decltype(config);
    if (plan.threads() > Class::max_threads) emulator::fail("%d threads", plan.threads());
    with_kernel<Class>(problem, plan, [&](auto kernel) {
      emulator::machine().launch(dim3(blocks), dim3(plan.threads()), plan.shared_bytes, seed,
                                 [&] { kernel(problem, plan); });
    });
  });
}

template <class Element, int... resident, int... streamed>
void launch(const Problem& problem, unsigned blocks, uint64_t seed,
            std::integer_sequence<int, resident...>, std::integer_sequence<int, streamed...>) {
  const Plan plan = make_plan(problem, seed);
  (launch_if<Element, resident_cols[resident], false>(problem, plan, blocks, seed), ...);
  (launch_if<Element, streamed_cols[streamed], true>(problem, plan, blocks, seed), ...);
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(
      argument_count, arguments, [](const Problem& problem, unsigned blocks, uint64_t seed) {
        const auto element_size = static_cast<int>(emulator::dtype_bytes(problem.dtype));
        if (!serves(problem.rows, problem.cols, element_size, 227 * 1024)) {
          emulator::fail("sm80 does not serve %d x %d", problem.rows, problem.cols);
        }
        const std::make_integer_sequence<int, std::size(resident_cols)> resident;
        const std::make_integer_sequence<int, std::size(streamed_cols)> streamed;
        with_element(problem.dtype, [&](auto element) {
          launch<decltype(element)>(problem, blocks, seed, resident, streamed);
        });
      });
}
