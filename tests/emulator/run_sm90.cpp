// Runs the sm90 kernel in the emulator: run_sm90 CASE RESULT (see case.h).
#include <utility>

#include "case.h"
#include "sm90/kernel.cuh"

using namespace flatquant;
using namespace flatquant::sm90;

// As launch.cuh makes it.
template <class Config>
CUtensorMap make_input_map(const Problem& problem) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  return emulator::TensorMap{emulator::TensorMap::expected_magic,
                             static_cast<const unsigned char*>(problem.input),
                             {size(problem.cols), size(problem.rows), size(problem.tokens)},
                             {size(problem.cols * 2), size(problem.input_stride * 2)},
                             {Config::width, Config::depth, 1},
                             2,
                             Config::width * 2}
      .encode();
}

template <class Element, int index>
void launch_class(const Problem& problem, unsigned blocks, uint64_t seed) {
  using Class = Config<Element, shape_classes[index].depth, shape_classes[index].cols>;
  const CUtensorMap map = make_input_map<Class>(problem);
  emulator::attach_sm90();
  const auto run =
      problem.is_simple() ? kernel<Class, Outputs::simple> : kernel<Class, Outputs::any>;
  emulator::machine().launch(dim3(blocks), dim3(Class::threads), Class::shared_bytes, seed,
                             [&] { run(map, problem); });
}

template <class Element, int... indices>
void launch(const Problem& problem, unsigned blocks, uint64_t seed,
            std::integer_sequence<int, indices...>) {
  const int wanted = find_shape_class(problem.rows, problem.cols);
  ((wanted == indices ? launch_class<Element, indices>(problem, blocks, seed) : void()), ...);
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(
      argument_count, arguments, [](const Problem& problem, unsigned blocks, uint64_t seed) {
        if (!serves(problem.rows, problem.cols)) {
          emulator::fail("sm90 does not serve %d x %d", problem.rows, problem.cols);
        }
        const Problem best = regrouped(problem);
        const auto classes = std::make_integer_sequence<int, shape_class_count>();
        if (problem.dtype == Dtype::float16) {
          launch<__half>(best, blocks, seed, classes);
        } else {
          launch<__nv_bfloat16>(best, blocks, seed, classes);
        }
      });
}
