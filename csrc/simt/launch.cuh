#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "simt/kernel.cuh"
#include "simt/launch.h"

namespace flatquant::simt {

template <class Element>
void launch(const Problem& problem, cudaStream_t stream) {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "simt", problem);
  with_kernel<Element>(problem, limit, [&](auto* kernel_of_plan, const Plan& plan) {
    // The limit, not the plan's bytes: a kernel serves many plans, and threads share its attribute.
    check_cuda(
        cudaFuncSetAttribute(kernel_of_plan, cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
        "simt", problem);
    const auto blocks = static_cast<unsigned>((problem.tokens + plan.tokens - 1) / plan.tokens);
    kernel_of_plan<<<blocks, plan.threads, plan.shared_bytes, stream>>>(problem, plan);
  });
  check_cuda(cudaGetLastError(), "simt", problem);
}

}  // namespace flatquant::simt
