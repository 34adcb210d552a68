#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "plain/kernel.cuh"
#include "plain/launch.h"

namespace flatquant::plain {

template <class Element>
void launch(const Problem& problem, cudaStream_t stream) {
  const Plan plan(problem.cols, problem.tokens, sizeof(Element));
  const auto blocks = static_cast<unsigned>((problem.tokens + plan.tokens - 1) / plan.tokens);
  const dim3 threads(plan.token_threads, plan.tokens);
  kernel<Element><<<blocks, threads, plan.shared_bytes(), stream>>>(problem, plan.chunks);
  check_cuda(cudaGetLastError(), "plain", problem);
}

}  // namespace flatquant::plain
