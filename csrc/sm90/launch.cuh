// From a problem to a launch: tensor map, grid and the instantiation for the shape class.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda_check.h"
#include "sm90/kernel.cuh"
#include "sm90/launch.h"

namespace flatquant::sm90 {

// The encoder comes from the driver at run time, so that the library does not link libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(const Problem& problem) {
  static void* const encoder = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    check_cuda(error, "sm90", problem);
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("flatquant: kernel 'sm90' failed on " + describe(problem) +
                               ": the driver has no cuTensorMapEncodeTiled (CUDA 12)");
    }
    return function;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encoder);
}

// Input as (tokens, rows, cols), cols innermost; a box is one panel of a slice. Ragged tokens need
// none.
template <class Config>
CUtensorMap make_input_map(const Problem& problem) {
  if constexpr (Config::is_ragged) return {};
  using Element = typename Config::Element;
  constexpr CUtensorMapDataType type = Config::is_float32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : std::is_same_v<Element, __half>
                                           ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr CUtensorMapSwizzle swizzle = Config::is_float32    ? CU_TENSOR_MAP_SWIZZLE_NONE
                                         : Config::width == 64 ? CU_TENSOR_MAP_SWIZZLE_128B
                                         : Config::width == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                               : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(problem.cols),
                              static_cast<cuuint64_t>(problem.rows),
                              static_cast<cuuint64_t>(problem.tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(problem.cols) * sizeof(Element),
                                static_cast<cuuint64_t>(problem.input_stride) * sizeof(Element)};
  const cuuint32_t box[] = {Config::box_cols, Config::slice_rows / Config::stack, Config::stack};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(problem)(
      &map, type, 3, const_cast<void*>(problem.input), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("flatquant: kernel 'sm90' failed on " + describe(problem) +
                             ": tensor map rejected, CUresult " + std::to_string(result));
  }
  return map;
}

template <class Config, Outputs outputs>
void launch_kernel(const Problem& problem, cudaStream_t stream) {
  const CUtensorMap map = make_input_map<Config>(problem);
  check_cuda(
      cudaFuncSetAttribute(kernel<Config, outputs>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Config::shared_bytes),
      "sm90", problem);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, "sm90", problem);
  const int64_t clusters =
      std::min<int64_t>(token_count<Config>(problem), multiprocessors / Config::blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * Config::blocks));
  config.blockDim = dim3(Config::threads);
  config.dynamicSmemBytes = Config::shared_bytes;
  config.stream = stream;
  // So that what comes before its wait runs beside a kernel that allows this, as it does itself.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {Config::blocks, 1, 1};
  config.attrs = attributes;
  config.numAttrs = Config::blocks > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel<Config, outputs>, map, problem), "sm90", problem);
}

// Launches class `index` if it is the problem's; only classes of `row_tiles` are instantiated.
template <class Element, int row_tiles, int index>
void launch_if(int wanted, const Problem& problem, cudaStream_t stream) {
  if constexpr (shape_classes[index].row_tiles() == row_tiles) {
    if (index != wanted) return;
    with_instantiation<Element, index>(problem, [&](auto config, auto outputs) {
      launch_kernel<decltype(config), outputs()>(problem, stream);
    });
  }
}

template <class Element, int row_tiles, int... indices>
void launch_any(const Problem& problem, cudaStream_t stream,
                std::integer_sequence<int, indices...>) {
  const int wanted = find_shape_class(problem.dtype, problem.rows, problem.cols);
  (launch_if<Element, row_tiles, indices>(wanted, problem, stream), ...);
}

template <class Element, int row_tiles>
void launch(const Problem& problem, cudaStream_t stream) {
  launch_any<Element, row_tiles>(problem, stream,
                                 std::make_integer_sequence<int, shape_class_count>());
}

}  // namespace flatquant::sm90
