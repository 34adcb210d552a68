// Runs the simt kernel in the emulator: run_simt CASE RESULT (see case.h).
#include "case.h"
#include "simt/kernel.cuh"

namespace flatquant::simt {
constexpr int memory_bytes = emulator::shared_limit + 64 * 1024;  // with a guard band
alignas(1024) float4 memory[memory_bytes / sizeof(float4)];       // what the kernel declares extern
}  // namespace flatquant::simt

using namespace flatquant;
using namespace flatquant::simt;

template <class Element>
void launch(const Problem& problem, unsigned blocks, uint64_t seed) {
  // Small problems keep Y in shared memory; with this limit larger ones do not, as on an older GPU.
  const Plan plan(problem.rows, problem.cols, 48 * 1024);
  auto* bytes = reinterpret_cast<unsigned char*>(memory);
  emulator::Machine& machine = emulator::machine();
  machine.block_starts = [=] { std::memset(bytes, emulator::poison, memory_bytes); };
  machine.block_ended = [=] {
    for (int i = plan.shared_bytes; i < memory_bytes; ++i) {
      if (bytes[i] != emulator::poison) emulator::fail("a store outside the shared memory");
    }
  };
  machine.launch(dim3(blocks), dim3(threads), plan.shared_bytes, seed,
                 [&] { kernel<Element>(problem, plan); });
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(argument_count, arguments,
                            [](const Problem& problem, unsigned blocks, uint64_t seed) {
                              switch (problem.dtype) {
                                case Dtype::float16:
                                  return launch<__half>(problem, blocks, seed);
                                case Dtype::bfloat16:
                                  return launch<__nv_bfloat16>(problem, blocks, seed);
                                case Dtype::float32:
                                  return launch<float>(problem, blocks, seed);
                              }
                            });
}
