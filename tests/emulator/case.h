// What the drivers have in common: a case comes from a file, its results go to another.
#pragma once

#include <cstdio>

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
  double clip_ratio;
};

// Reads the case at `path`: CaseHeader, then input, left and right as they lie in memory. Calls
// `launch(problem, blocks, seed)` and writes codes and scales, which held bytes of `fill` before.
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
  const auto dtype = static_cast<flatquant::Dtype>(header.dtype);
  const auto storage = static_cast<flatquant::Storage>(header.storage);
  const size_t element = dtype == flatquant::Dtype::float32 ? 4 : 2;
  const size_t features = header.rows * header.cols;
  const Buffer input(((header.tokens - 1) * header.input_stride + features) * element);
  const Buffer left(header.rows * header.rows * element, element);
  const Buffer right(header.cols * header.cols * element, element);
  for (const Buffer* buffer : {&input, &left, &right}) read(buffer->data(), buffer->bytes());
  std::fclose(file);

  const Buffer codes(header.tokens * features / (storage == flatquant::Storage::int32 ? 2 : 1));
  const Buffer scales(header.tokens * sizeof(float));
  for (const Buffer* buffer : {&codes, &scales}) {
    std::memset(buffer->data(), static_cast<int>(header.fill), buffer->bytes());
  }
  auto counter = static_cast<uint32_t>(header.seed);  // any content
  const flatquant::Problem problem{input.data(),
                                   left.data(),
                                   right.data(),
                                   codes.data(),
                                   static_cast<float*>(scales.data()),
                                   header.tokens,
                                   header.input_stride,
                                   static_cast<int>(header.rows),
                                   static_cast<int>(header.cols),
                                   static_cast<float>(header.clip_ratio),
                                   dtype,
                                   storage,
                                   &counter};
  launch(problem, static_cast<unsigned>(header.blocks), header.seed);

  file = std::fopen(arguments[2], "wb");
  for (const Buffer* buffer : {&codes, &scales}) {
    buffer->check_surroundings();
    if (!file || std::fwrite(buffer->data(), 1, buffer->bytes(), file) != buffer->bytes()) {
      fail("cannot write %s", arguments[2]);
    }
  }
  return std::fclose(file);
}

}  // namespace emulator
