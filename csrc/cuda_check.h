// CUDA calls that fail throw, naming the kernel and the problem.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "problem.h"

namespace flatquant {

inline std::string describe(const Problem& problem) {
  constexpr const char* dtypes[] = {"float16", "bfloat16", "float32"};
  constexpr const char* precisions[] = {" at precision highest", " at precision high"};
  return std::to_string(problem.tokens) + " tokens of " + std::to_string(problem.rows) + " x " +
         std::to_string(problem.cols) + " " + dtypes[static_cast<int>(problem.dtype)] +
         (problem.dtype == Dtype::float32 ? precisions[static_cast<int>(problem.precision)] : "");
}

inline void check_cuda(cudaError_t error, const char* kernel, const Problem& problem) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // a launch error would otherwise be reported again by the next caller
  throw std::runtime_error(std::string("flatquant: kernel '") + kernel + "' failed on " +
                           describe(problem) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute, const char* kernel, const Problem& problem) {
  int device, value;
  check_cuda(cudaGetDevice(&device), kernel, problem);
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), kernel, problem);
  return value;
}

}  // namespace flatquant
