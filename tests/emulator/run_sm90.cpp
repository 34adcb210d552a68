// Runs the sm90 kernel in the emulator: run_sm90 CASE RESULT (see case.h).
#include <utility>

#include "case.h"
#include "sm90/kernel.cuh"
#include "with_element.h"

using namespace flatquant;
using namespace flatquant::sm90;

// As launch.cuh makes it.
template <class Config>
CUtensorMap make_input_map(const Problem& problem) {
  if (Config::is_ragged) return {};
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  constexpr int element = sizeof(typename Config::Element);
  return emulator::TensorMap{emulator::TensorMap::expected_magic,
                             static_cast<const unsigned char*>(problem.input),
                             {size(problem.cols), size(problem.rows), size(problem.tokens)},
                             {size(problem.cols * element), size(problem.input_stride * element)},
                             {Config::box_cols, Config::slice_rows / Config::stack, Config::stack},
                             element,
                             Config::is_float32 ? 0 : Config::width * 2}
      .encode();
}

template <class Class, Outputs outputs>
void launch_class(const Problem& problem, unsigned blocks, uint64_t seed) {
  const CUtensorMap map = make_input_map<Class>(problem);
  emulator::attach_sm90();
  emulator::machine().launch(
      dim3(blocks * Class::blocks), dim3(Class::threads), Class::shared_bytes, seed,
      [&] { kernel<Class, outputs>(map, problem); }, Class::blocks);
}

template <class Element, int index>
void launch_class(const Problem& problem, unsigned blocks, uint64_t seed) {
  with_instantiation<Element, index>(problem, [&](auto config, auto outputs) {
    launch_class<decltype(config), outputs()>(problem, blocks, seed);
  });
}

template <class Element, int... indices>
void launch(const Problem& problem, unsigned blocks, uint64_t seed,
            std::integer_sequence<int, indices...>) {
  const int wanted = find_shape_class(problem.dtype, problem.rows, problem.cols);
  ((wanted == indices ? launch_class<Element, indices>(problem, blocks, seed) : void()), ...);
}

int main(int argument_count, char** arguments) {
  return emulator::run_case(
      argument_count, arguments, [](const Problem& problem, unsigned blocks, uint64_t seed) {
        if (!serves(problem.dtype, problem.rows, problem.cols)) {
          emulator::fail("sm90 does not serve %d x %d", problem.rows, problem.cols);
        }
        const Problem best = regrouped(problem);
        const auto classes = std::make_integer_sequence<int, shape_class_count>();
        with_element(problem.dtype,
                     [&](auto element) { launch<decltype(element)>(best, blocks, seed, classes); });
      });
}
