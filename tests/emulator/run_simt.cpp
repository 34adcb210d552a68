// Runs the simt kernel in the emulator: run_simt CASE RESULT (see case.h). The grid follows from
// the problem; the case's `blocks` count the 48 KiB of shared memory that a block may have.
#include "case.h"
#include "simt/kernel.cuh"
#include "with_element.h"

namespace flatquant::simt {
constexpr int memory_bytes = emulator::shared_limit + 64 * 1024;  // with a guard band
alignas(1024) float4 memory[memory_bytes / sizeof(float4)];       // what the kernel declares extern
}  // namespace flatquant::simt

using namespace flatquant;
using namespace flatquant::simt;

template <class Element>
void launch(const Problem& problem, unsigned blocks, uint64_t seed) {
  const int shared_limit = smaller(static_cast<int>(blocks) * usual_shared, emulator::shared_limit);
  auto* bytes = reinterpret_cast<unsigned char*>(memory);
  emulator::Machine& machine = emulator::machine();
  machine.block_starts = [=] { std::memset(bytes, emulator::poison, memory_bytes); };
  with_kernel<Element>(problem, shared_limit, [&](auto* kernel_of_plan, const Plan& plan) {
    machine.block_ended = [=] {
      for (int i = plan.shared_bytes; i < memory_bytes; ++i) {
        if (bytes[i] != emulator::poison) emulator::fail("a store outside the shared memory");
      }
    };
    const auto groups = static_cast<unsigned>((problem.tokens + plan.tokens - 1) / plan.tokens);
    machine.launch(dim3(groups), dim3(plan.threads), plan.shared_bytes, seed,
                   [&] { kernel_of_plan(problem, plan); });
  });
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(
      argument_count, arguments, [](const Problem& problem, unsigned blocks, uint64_t seed) {
        with_element(problem.dtype,
                     [&](auto element) { launch<decltype(element)>(problem, blocks, seed); });
      });
}
