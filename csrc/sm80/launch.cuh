// From a plan to a launch: grid and the instantiation for its columns.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda_check.h"
#include "sm80/kernel.cuh"
#include "sm80/launch.h"

namespace flatquant::sm80 {

// Launches the kernel for the index-th number of columns if that is the plan's.
template <class Element, bool streamed, int index>
void launch_if(const Problem& problem, const Plan& plan, cudaStream_t stream) {
  constexpr int cols = streamed ? streamed_cols[index] : resident_cols[index];
  if (plan.cols != cols) return;
  void (*kernel)(Problem, Plan) = nullptr;
  with_config<Element, cols, streamed>(problem, [&](auto config) {
    with_kernel<decltype(config)>(
        problem, plan, [&](void (*instantiation)(Problem, Plan)) { kernel = instantiation; });
  });
  // The device's limit, not the plan's bytes: the kernel serves many plans, and threads share it.
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "sm80", problem);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
             "sm80", problem);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, "sm80", problem);
  const auto blocks = static_cast<unsigned>(std::min(problem.tokens, multiprocessors));
  kernel<<<blocks, plan.threads(), plan.shared_bytes, stream>>>(problem, plan);
  check_cuda(cudaGetLastError(), "sm80", problem);
}

template <class Element, bool streamed, int... indices>
void launch_any(const Problem& problem, const Plan& plan, cudaStream_t stream,
                std::integer_sequence<int, indices...>) {
  (launch_if<Element, streamed, indices>(problem, plan, stream), ...);
}

template <class Element, bool streamed>
void launch(const Problem& problem, const Plan& plan, cudaStream_t stream) {
  constexpr int count = streamed ? std::size(streamed_cols) : std::size(resident_cols);
  launch_any<Element, streamed>(problem, plan, stream, std::make_integer_sequence<int, count>());
}

}  // namespace flatquant::sm80
