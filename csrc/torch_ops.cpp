// The only file that knows torch: schemas, checks, allocation, stream. Through torch's stable ABI,
// so that one binary serves every torch from 2.10 on.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_check.h"
#include "dispatch.h"
#include "plain/launch.h"
#include "problem.h"
#include "simt/launch.h"
#include "sm80/launch.h"
#include "sm90/launch.h"
#include "with_element.h"

namespace flatquant {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::string_view compiled_architectures = FLATQUANT_CUDA_ARCHS;

template <class Element>
void launch_sm90(const Problem& given, cudaStream_t stream) {
  const Problem problem = sm90::regrouped(given);
  const int shape = sm90::find_shape_class(problem.dtype, problem.rows, problem.cols);
  switch (sm90::shape_classes[shape].row_tiles()) {
    case 1:
      return sm90::launch<Element, 1>(problem, stream);
    case 2:
      return sm90::launch<Element, 2>(problem, stream);
    default:  // float32 has no shape class of so many rows
      if constexpr (!std::is_same_v<Element, float>) sm90::launch<Element, 3>(problem, stream);
  }
}

template <class Element>
void launch_sm80(const Problem& problem, cudaStream_t stream) {
  const sm80::Plan plan(problem.rows, problem.cols, sizeof(Element),
                        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "sm80", problem));
  STD_TORCH_CHECK(plan.stages > 0, "flatquant: kernel 'sm80' has no plan for ", describe(problem));
  if constexpr (sizeof(Element) == 2) {  // no plan of float32 streams
    if (plan.streamed) return sm80::launch<Element, true>(problem, plan, stream);
  }
  sm80::launch<Element, false>(problem, plan, stream);
}

void launch(std::string_view kernel, const Problem& problem, cudaStream_t stream) {
  // Every name in kernel_table has its branch here. A kernel that no built architecture can run is
  // left out of the binary.
  if constexpr (FLATQUANT_NEWEST_ARCH >= 90) {
    if (kernel == "sm90") {
      return with_element(problem.dtype,
                          [&](auto element) { launch_sm90<decltype(element)>(problem, stream); });
    }
  }
  if constexpr (FLATQUANT_NEWEST_ARCH >= 80) {
    if (kernel == "sm80") {
      return with_element(problem.dtype,
                          [&](auto element) { launch_sm80<decltype(element)>(problem, stream); });
    }
  }
  const bool is_plain = kernel == "plain";
  STD_TORCH_CHECK(is_plain || kernel == "simt", "flatquant: kernel '", std::string(kernel),
                  "' is in the table and has no launcher");
  with_element(problem.dtype, [&](auto element) {
    using Element = decltype(element);
    is_plain ? plain::launch<Element>(problem, stream) : simt::launch<Element>(problem, stream);
  });
}

Precision to_precision(const std::string& name) {
  STD_TORCH_CHECK(name == "highest" || name == "high",
                  "flatquant: float32_precision must be 'highest' or 'high', got '", name, "'");
  return name == "highest" ? Precision::highest : Precision::high;
}

Dtype to_dtype(ScalarType type, const char* name = "input") {
  STD_TORCH_CHECK(
      type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float,
      "flatquant: ", name, " must be float16, bfloat16 or float32, got ", toString(type));
  return type == ScalarType::Half       ? Dtype::float16
         : type == ScalarType::BFloat16 ? Dtype::bfloat16
                                        : Dtype::float32;
}

// As Python writes a shape: (3, 4).
std::string list(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::string text;
  for (const int64_t number : numbers) {
    text += (text.empty() ? "" : ", ") + std::to_string(number);
  }
  return "(" + text + ")";
}

std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda()  ? "cuda:" + std::to_string(tensor.get_device_index())
         : tensor.is_cpu() ? "cpu"
                           : "another device";
}

// Side of a square contiguous factor like `input` in dtype and device.
int64_t check_factor(const Tensor& factor, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) >= 1,
                  "flatquant: ", name, " must be a square matrix, got shape ",
                  list(factor.sizes()));
  STD_TORCH_CHECK(factor.is_contiguous(), "flatquant: ", name, " must be contiguous, got strides ",
                  list(factor.strides()));
  STD_TORCH_CHECK(factor.scalar_type() == input.scalar_type(), "flatquant: ", name,
                  " must have the dtype of input, ", toString(input.scalar_type()), ", got ",
                  toString(factor.scalar_type()));
  STD_TORCH_CHECK(factor.is_cuda() && factor.get_device_index() == input.get_device_index(),
                  "flatquant: ", name, " must be on the device of input, ", device_name(input),
                  ", got ", device_name(factor));
  return factor.size(0);
}

// The one stride between tokens that [..., features] has if its leading dimensions collapse.
int64_t token_stride(const Tensor& input) {
  const int64_t features = input.size(-1);
  STD_TORCH_CHECK(features <= 1 || input.stride(-1) == 1,
                  "flatquant: input must be contiguous along its last dimension, got strides ",
                  list(input.strides()));
  int64_t stride = features, expected = 0;
  bool first = true;
  for (int64_t dim = input.dim() - 2; dim >= 0; --dim) {
    if (input.size(dim) == 1) continue;
    if (first) {
      stride = expected = input.stride(dim);
      first = false;
    }
    STD_TORCH_CHECK(input.numel() == 0 || input.stride(dim) == expected,
                    "flatquant: input's leading dimensions must collapse to one stride, got shape ",
                    list(input.sizes()), " with strides ", list(input.strides()));
    expected *= input.size(dim);
  }
  return stride;
}

// Memory for the scales and, for launches that want one, Problem::counter. It lies behind the
// scales, so that only the results are allocated.
std::pair<Tensor, uint32_t*> empty_scales(const Tensor& input, const std::vector<int64_t>& sizes,
                                          const Problem& problem) {
  const int64_t tokens = problem.tokens;
  if (!shares_tokens(tokens, problem.rows * problem.cols)) {
    return {torch::stable::new_empty(input, sizes, ScalarType::Float), nullptr};
  }
  const std::vector<int64_t> with_counter{tokens + 1};
  const Tensor all = torch::stable::new_empty(input, with_counter, ScalarType::Float);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * sizes[dim];
  AtenTensorHandle scales = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      all.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, &scales));
  return {Tensor(scales), static_cast<uint32_t*>(all.mutable_data_ptr()) + tokens};
}

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// What a kernel asks of these tensors beyond what the table knows: those on tensor cores count
// tokens in int32, and sm90 reads 16-byte units.
bool fits_memory(std::string_view kernel, const Problem& problem) {
  const int units = problem.dtype == Dtype::float32 ? 4 : 8;  // elements
  if (problem.tokens > INT32_MAX && (kernel == "sm80" || kernel == "sm90")) return false;
  return kernel != "sm90" || (problem.input_stride % units == 0 && aligned(problem.input, 16) &&
                              aligned(problem.left, 16) && aligned(problem.right, 16));
}

int current_compute_capability(const Problem& problem) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, "auto", problem) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, "auto", problem);
}

std::string_view choose_kernel(const std::string& asked, const Problem& problem) {
  const bool transforms = problem.left != nullptr || problem.right != nullptr;
  const Query query{current_compute_capability(problem),
                    compiled_architectures,
                    problem.dtype,
                    problem.precision,
                    transforms ? problem.rows : 0,
                    transforms ? problem.cols : 0};
  for (const KernelEntry& kernel : kernel_table) {
    if (asked != "auto" && asked != kernel.name) continue;
    if (kernel.serves(query) && fits_memory(kernel.name, problem)) return kernel.name;
  }
  STD_TORCH_CHECK(covers(compiled_architectures, query.compute_capability),
                  "flatquant: ", not_covered(query));
  const std::string names = kernel_names(query);
  STD_TORCH_CHECK(false, "flatquant: kernel '", asked, "' does not serve ", describe(problem),
                  " with row stride ", problem.input_stride, " on sm_", query.compute_capability,
                  "; for these sizes there is: ",
                  names.empty() ? std::string("none but the reference (use_cuda=False)") : names);
}

void run(const std::string& kernel, const Problem& problem, int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(choose_kernel(kernel, problem), problem, static_cast<cudaStream_t>(stream));
}

// The problem without what is stored. A factor that is not there leaves its size to the other; with
// neither, a token is one row.
Problem make_problem(const Tensor& input, const std::optional<Tensor>& left_trans,
                     const std::optional<Tensor>& right_trans, bool pack_int32,
                     const std::string& float32_precision) {
  STD_TORCH_CHECK(input.is_cuda() && input.dim() >= 1,
                  "flatquant: input must be a CUDA tensor of at least one dimension, got one of ",
                  input.dim(), " on ", device_name(input));
  const Dtype dtype = to_dtype(input.scalar_type());
  const int64_t features = input.size(-1);
  STD_TORCH_CHECK(features >= 1 && features <= INT32_MAX,
                  "flatquant: input must have 1 to 2^31 - 1 features, got ", features);
  int64_t rows = left_trans ? check_factor(*left_trans, input, "left_trans") : 1;
  int64_t cols = right_trans ? check_factor(*right_trans, input, "right_trans") : features / rows;
  if (!left_trans) rows = features / cols;
  STD_TORCH_CHECK(features == rows * cols, "flatquant: input has ", features,
                  " features, the factors ", rows, " * ", cols);
  STD_TORCH_CHECK(!pack_int32 || features % 8 == 0,
                  "flatquant: pack_int32 needs features to be a multiple of 8, got ", features);
  Problem problem{};
  problem.input = input.const_data_ptr();
  problem.left = left_trans ? left_trans->const_data_ptr() : nullptr;
  problem.right = right_trans ? right_trans->const_data_ptr() : nullptr;
  problem.tokens = input.numel() / features;
  problem.input_stride = token_stride(input);
  problem.rows = static_cast<int>(rows);
  problem.cols = static_cast<int>(cols);
  problem.dtype = dtype;
  problem.precision = to_precision(float32_precision);
  problem.storage = pack_int32 ? Storage::int32 : Storage::int8;
  return problem;
}

// Memory for one more output of the problem; the ratios are the caller's to set.
std::pair<Tensor, Tensor> add_output(Problem& problem, const Tensor& input) {
  const bool packed = problem.storage == Storage::int32;
  const auto input_sizes = input.sizes();
  std::vector<int64_t> sizes(input_sizes.begin(), input_sizes.end() - 1);
  Tensor scales;
  if (problem.output_count == 0) {
    std::tie(scales, problem.counter) = empty_scales(input, sizes, problem);
  } else {
    scales = torch::stable::new_empty(input, sizes, ScalarType::Float);
  }
  sizes.push_back(packed ? input.size(-1) / 8 : input.size(-1));
  Tensor codes =
      torch::stable::new_empty(input, sizes, packed ? ScalarType::Int : ScalarType::Char);
  Output& output = problem.outputs[problem.output_count++];
  output.codes = codes.mutable_data_ptr();
  output.scales = static_cast<float*>(scales.mutable_data_ptr());
  return {codes, scales};
}

float to_ratio(double clip_ratio) {
  const float ratio = static_cast<float>(clip_ratio);
  STD_TORCH_CHECK(std::isfinite(ratio) && ratio > 0,
                  "flatquant: clip_ratio must be finite and > 0 as float32, got ", clip_ratio);
  return ratio;
}

const float* device_ratio(const Tensor& ratio, const Tensor& input) {
  STD_TORCH_CHECK(ratio.is_cuda() && ratio.get_device_index() == input.get_device_index() &&
                      ratio.scalar_type() == ScalarType::Float && ratio.numel() == 1,
                  "flatquant: a clip ratio on the device must be one float32 on ",
                  device_name(input), ", got ", ratio.numel(), " of ",
                  toString(ratio.scalar_type()), " on ", device_name(ratio));
  return static_cast<const float*>(ratio.const_data_ptr());
}

std::tuple<Tensor, Tensor> dynamic_quantize(Tensor input, Tensor left_trans, Tensor right_trans,
                                            double clip_ratio, bool pack_int32, std::string kernel,
                                            std::string float32_precision) {
  Problem problem = make_problem(input, left_trans, right_trans, pack_int32, float32_precision);
  const float ratio = to_ratio(clip_ratio);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto [codes, scales] = add_output(problem, input);
  problem.outputs[0].max_ratio = problem.outputs[0].min_ratio = ratio;
  if (problem.tokens > 0) run(kernel, problem, device);
  return {codes, scales};
}

std::vector<Tensor> dynamic_quantize_many(Tensor input, std::optional<Tensor> left_trans,
                                          std::optional<Tensor> right_trans,
                                          std::vector<double> clip_ratios,
                                          std::vector<Tensor> device_clip_ratios, bool pack_int32,
                                          std::string kernel, std::string float32_precision) {
  Problem problem = make_problem(input, left_trans, right_trans, pack_int32, float32_precision);
  const size_t ratios = clip_ratios.size();
  STD_TORCH_CHECK(ratios % 2 == 0 && ratios >= 2 && ratios <= 2 * max_outputs,
                  "flatquant: clip_ratios must hold 1 to ", max_outputs, " pairs, got ", ratios,
                  " numbers");
  const size_t on_device = std::count(clip_ratios.begin(), clip_ratios.end(), 0.0);
  STD_TORCH_CHECK(device_clip_ratios.size() == on_device,
                  "flatquant: device_clip_ratios must hold one for each 0 in clip_ratios, ",
                  on_device, ", got ", device_clip_ratios.size());
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto next = device_clip_ratios.begin();
  std::vector<Tensor> results;
  for (size_t i = 0; i < ratios; i += 2) {
    auto [codes, scales] = add_output(problem, input);
    results.push_back(codes);
    results.push_back(scales);
    Output& output = problem.outputs[i / 2];
    const auto set = [&](double clip_ratio, float& ratio, const float*& pointer) {
      if (clip_ratio == 0.0) {
        pointer = device_ratio(*next++, input);
      } else {
        ratio = to_ratio(clip_ratio);
      }
    };
    set(clip_ratios[i], output.max_ratio, output.device_max_ratio);
    set(clip_ratios[i + 1], output.min_ratio, output.device_min_ratio);
  }
  if (problem.tokens > 0) run(kernel, problem, device);
  return results;
}

Tensor kronecker_transform(Tensor input, std::optional<Tensor> left_trans,
                           std::optional<Tensor> right_trans, ScalarType out_dtype,
                           std::string kernel, std::string float32_precision) {
  Problem problem = make_problem(input, left_trans, right_trans, false, float32_precision);
  STD_TORCH_CHECK(left_trans || right_trans,
                  "flatquant: left_trans and right_trans must not both be None, got None, None");
  problem.transformed_dtype = to_dtype(out_dtype, "out_dtype");
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto sizes = input.sizes();
  Tensor result =
      torch::stable::new_empty(input, std::vector<int64_t>(sizes.begin(), sizes.end()), out_dtype);
  problem.transformed = result.mutable_data_ptr();
  if (problem.tokens > 0) run(kernel, problem, device);
  return result;
}

std::string kernel_names_op(int64_t rows, int64_t cols, ScalarType dtype,
                            int64_t compute_capability, std::string float32_precision) {
  if (rows > INT32_MAX || cols > INT32_MAX) return "";
  return kernel_names({static_cast<int>(compute_capability), compiled_architectures,
                       to_dtype(dtype), to_precision(float32_precision), static_cast<int>(rows),
                       static_cast<int>(cols)});
}

std::string cuda_archs() { return std::string(compiled_architectures); }

}  // namespace

STABLE_TORCH_LIBRARY(flatquant, m) {
  m.def(
      "dynamic_quantize(Tensor input, Tensor left_trans, Tensor right_trans, "
      "float clip_ratio=1.0, bool pack_int32=False, str kernel_name=\"auto\", "
      "str float32_precision=\"highest\") -> (Tensor, Tensor)");
  m.def(
      "dynamic_quantize_many(Tensor input, Tensor? left_trans, Tensor? right_trans, "
      "float[] clip_ratios, Tensor[] device_clip_ratios, bool pack_int32=False, "
      "str kernel_name=\"auto\", str float32_precision=\"highest\") -> Tensor[]");
  m.def(
      "kronecker_transform(Tensor input, Tensor? left_trans, Tensor? right_trans, "
      "ScalarType out_dtype, str kernel_name=\"auto\", str float32_precision=\"highest\") -> "
      "Tensor");
  m.def(
      "kernel_names(int M, int N, ScalarType dtype, int compute_capability, "
      "str float32_precision=\"highest\") -> str");
  m.def("cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flatquant, CUDA, m) {
  m.impl("dynamic_quantize", TORCH_BOX(&dynamic_quantize));
  m.impl("dynamic_quantize_many", TORCH_BOX(&dynamic_quantize_many));
  m.impl("kronecker_transform", TORCH_BOX(&kronecker_transform));
}

STABLE_TORCH_LIBRARY_IMPL(flatquant, CompositeExplicitAutograd, m) {
  m.impl("kernel_names", TORCH_BOX(&kernel_names_op));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}

}  // namespace flatquant
