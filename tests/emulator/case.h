// What the drivers have in common: a case comes from a file, its results go to another.
#pragma once

#include <cstdio>
#include <vector>

#include "cuda_emulator.h"
#include "problem.h"

namespace emulator {

// Memory that ends at a page without access (up to alignment to 16 bytes), as a tensor on the GPU
// may; filled with the poison.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t alignment = 16) : bytes_(bytes) {
    const size_t page = 4096, pages = (bytes + alignment + page - 1) / page * page;
    auto* memory = static_cast<unsigned char*>(
        mmap(nullptr, page + pages + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory + page, pages, PROT_READ | PROT_WRITE);
    begin_ = memory + page;
    end_ = begin_ + pages;
    std::memset(begin_, poison, pages);
    data_ = end_ - (bytes + alignment - 1) / alignment * alignment;
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void check_surroundings() const {
    for (const unsigned char* byte = begin_; byte < end_; ++byte) {
      if ((byte < data_ || byte >= data_ + bytes_) && *byte != poison) {
        fail("a store %td bytes into an array of %zu", byte - data_, bytes_);
      }
    }
  }

 private:
  size_t bytes_;
  unsigned char *begin_, *end_, *data_;
};

struct CaseHeader {
  int64_t rows, cols, tokens, input_stride, dtype, storage, blocks, seed, fill;
  int64_t has_left, has_right;
  int64_t output_count, ratios_on_device, transformed_dtype, precision, input_alignment;
  float ratios[flatquant::max_outputs][2];
};

inline size_t dtype_bytes(flatquant::Dtype dtype) {
  return dtype == flatquant::Dtype::float32 ? 4 : 2;
}

// Reads the case at `path`: CaseHeader, then input and the factors that there are, as they lie in
// memory. Calls `launch(problem, blocks, seed)` and writes codes and scales of each output, or Y,
// which held bytes of `fill` before.
template <class Launch>
int run_case(int argument_count, char** arguments, Launch launch) {
  if (argument_count != 3) {
    std::fprintf(stderr, "usage: %s CASE RESULT\n", arguments[0]);
    return 2;
  }
  std::FILE* file = std::fopen(arguments[1], "rb");
  auto read = [&](void* to, size_t bytes) {
    if (!file || std::fread(to, 1, bytes, file) != bytes) fail("cannot read %s", arguments[1]);
  };
  CaseHeader header;
  read(&header, sizeof header);
  const size_t features = header.rows * header.cols;
  flatquant::Problem problem = {};
  problem.tokens = header.tokens;
  problem.input_stride = header.input_stride;
  problem.rows = static_cast<int>(header.rows);
  problem.cols = static_cast<int>(header.cols);
  problem.dtype = static_cast<flatquant::Dtype>(header.dtype);
  problem.precision = static_cast<flatquant::Precision>(header.precision);
  problem.storage = static_cast<flatquant::Storage>(header.storage);
  problem.output_count = static_cast<int>(header.output_count);
  problem.transformed_dtype = static_cast<flatquant::Dtype>(header.transformed_dtype);
  auto counter = static_cast<uint32_t>(header.seed);  // any content
  problem.counter = &counter;

  const size_t element = dtype_bytes(problem.dtype);
  const auto read_array = [&](size_t elements, size_t alignment) {
    const Buffer buffer(elements * element, alignment);
    read(buffer.data(), buffer.bytes());
    return buffer.data();
  };
  problem.input =
      read_array((header.tokens - 1) * header.input_stride + features, header.input_alignment);
  if (header.has_left) problem.left = read_array(header.rows * header.rows, element);
  if (header.has_right) problem.right = read_array(header.cols * header.cols, element);
  std::fclose(file);

  std::vector<Buffer> results;
  const auto add_result = [&](size_t bytes) {
    results.emplace_back(bytes);
    std::memset(results.back().data(), static_cast<int>(header.fill), bytes);
    return results.back().data();
  };
  const bool packed = problem.storage == flatquant::Storage::int32;
  for (int i = 0; i < problem.output_count; ++i) {
    flatquant::Output& output = problem.outputs[i];
    output.codes = add_result(header.tokens * features / (packed ? 2 : 1));
    output.scales = static_cast<float*>(add_result(header.tokens * sizeof(float)));
    if (header.ratios_on_device) {
      const auto on_device = [](float ratio) {
        const Buffer buffer(sizeof ratio, sizeof ratio);
        return static_cast<const float*>(std::memcpy(buffer.data(), &ratio, sizeof ratio));
      };
      output.max_ratio = output.min_ratio = __uint_as_float(0xffffffffu);
      output.device_max_ratio = on_device(header.ratios[i][0]);
      output.device_min_ratio = on_device(header.ratios[i][1]);
    } else {
      output.max_ratio = header.ratios[i][0];
      output.min_ratio = header.ratios[i][1];
    }
  }
  if (problem.output_count == 0) {
    problem.transformed =
        add_result(header.tokens * features * dtype_bytes(problem.transformed_dtype));
  }
  launch(problem, static_cast<unsigned>(header.blocks), header.seed);

  file = std::fopen(arguments[2], "wb");
  for (const Buffer& buffer : results) {
    buffer.check_surroundings();
    if (!file || std::fwrite(buffer.data(), 1, buffer.bytes(), file) != buffer.bytes()) {
      fail("cannot write %s", arguments[2]);
    }
  }
  return std::fclose(file);
}

}  // namespace emulator
