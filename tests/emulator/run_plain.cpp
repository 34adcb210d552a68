// Runs the plain kernel in the emulator: run_plain CASE RESULT (see case.h). The case's blocks are
// the tokens that the launch is planned for.
#include "case.h"
#include "plain/kernel.cuh"
#include "with_element.h"

namespace flatquant::plain {
constexpr int places = 64;                 // with a guard band
alignas(1024) int2 warp_extremes[places];  // what the kernel declares extern
}  // namespace flatquant::plain

using namespace flatquant;

template <class Element>
void launch(const Problem& problem, int64_t planned_tokens, uint64_t seed) {
  const plain::Plan plan(problem.cols, planned_tokens, sizeof(Element));
  auto* bytes = reinterpret_cast<unsigned char*>(plain::warp_extremes);
  const int memory_bytes = sizeof plain::warp_extremes, used_bytes = plan.shared_bytes();
  emulator::Machine& machine = emulator::machine();
  machine.block_starts = [=] { std::memset(bytes, emulator::poison, memory_bytes); };
  machine.block_ended = [=] {
    for (int i = used_bytes; i < memory_bytes; ++i) {
      if (bytes[i] != emulator::poison) emulator::fail("a store outside the shared memory");
    }
  };
  const auto blocks = static_cast<unsigned>((problem.tokens + plan.tokens - 1) / plan.tokens);
  machine.launch(dim3(blocks), dim3(plan.token_threads, plan.tokens), used_bytes, seed,
                 [&] { plain::kernel<Element>(problem, plan.chunks); });
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(argument_count, arguments,
                            [](const Problem& problem, unsigned planned_tokens, uint64_t seed) {
                              with_element(problem.dtype, [&](auto element) {
                                launch<decltype(element)>(problem, planned_tokens, seed);
                              });
                            });
}
