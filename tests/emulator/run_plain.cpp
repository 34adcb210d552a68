// Runs the plain kernel in the emulator: run_plain CASE RESULT. The case is a Header, then the
// input as it lies in memory; the result is codes and scales of each output.
#include <vector>

#include "case.h"
#include "plain/kernel.cuh"

namespace flatquant::plain {
constexpr int places = 64;                 // with a guard band
alignas(1024) int2 warp_extremes[places];  // what the kernel declares extern
}  // namespace flatquant::plain

using namespace flatquant;

struct Header {
  int64_t features, tokens, input_stride, dtype, storage;
  int64_t planned_tokens;  // how many the launch is planned for
  int64_t input_alignment, seed, fill;
  int64_t output_count, ratios_on_device;
  float ratios[max_outputs][2];
};

template <class Element>
void launch(const Problem& problem, const Header& header) {
  const plain::Plan plan(problem.cols, header.planned_tokens, sizeof(Element));
  auto* bytes = reinterpret_cast<unsigned char*>(plain::warp_extremes);
  const int memory_bytes = sizeof plain::warp_extremes, used_bytes = plan.shared_bytes();
  emulator::Machine& machine = emulator::machine();
  machine.block_starts = [=] { std::memset(bytes, emulator::poison, memory_bytes); };
  machine.block_ended = [=] {
    for (int i = used_bytes; i < memory_bytes; ++i) {
      if (bytes[i] != emulator::poison) emulator::fail("a store outside the shared memory");
    }
  };
  const auto blocks = static_cast<unsigned>((problem.tokens + plan.tokens - 1) / plan.tokens);
  machine.launch(dim3(blocks), dim3(plan.token_threads, plan.tokens), used_bytes, header.seed,
                 [&] { plain::kernel<Element>(problem, plan.chunks); });
}

int main(int argument_count, char** arguments) {
  if (argument_count != 3) {
    std::fprintf(stderr, "usage: %s CASE RESULT\n", arguments[0]);
    return 2;
  }
  Header header;
  std::FILE* file = std::fopen(arguments[1], "rb");
  auto read = [&](void* to, size_t bytes) {
    if (!file || std::fread(to, 1, bytes, file) != bytes) {
      emulator::fail("cannot read %s", arguments[1]);
    }
  };
  read(&header, sizeof header);
  Problem problem = {};
  problem.tokens = header.tokens;
  problem.input_stride = header.input_stride;
  problem.rows = 1;
  problem.cols = static_cast<int>(header.features);
  problem.dtype = static_cast<Dtype>(header.dtype);
  problem.storage = static_cast<Storage>(header.storage);
  problem.output_count = static_cast<int>(header.output_count);
  const size_t elements = (header.tokens - 1) * header.input_stride + header.features;
  const emulator::Buffer input(elements * (problem.dtype == Dtype::float32 ? 4 : 2),
                               header.input_alignment);
  read(input.data(), input.bytes());
  std::fclose(file);
  problem.input = input.data();

  const size_t code_bytes =
      header.tokens * header.features / (problem.storage == Storage::int32 ? 2 : 1);
  std::vector<emulator::Buffer> results;
  for (int i = 0; i < problem.output_count; ++i) {
    const emulator::Buffer codes(code_bytes), scales(header.tokens * sizeof(float));
    for (const emulator::Buffer* buffer : {&codes, &scales}) {
      std::memset(buffer->data(), static_cast<int>(header.fill), buffer->bytes());
      results.push_back(*buffer);
    }
    const float* ratios = header.ratios[i];
    Output& output = problem.outputs[i];
    output = {codes.data(), static_cast<float*>(scales.data()), ratios[0], ratios[1]};
    if (header.ratios_on_device) {
      output.max_ratio = output.min_ratio = -1.0f;
      output.device_max_ratio = &ratios[0];
      output.device_min_ratio = &ratios[1];
    }
  }
  switch (problem.dtype) {
    case Dtype::float16:
      launch<__half>(problem, header);
      break;
    case Dtype::bfloat16:
      launch<__nv_bfloat16>(problem, header);
      break;
    case Dtype::float32:
      launch<float>(problem, header);
      break;
  }

  file = std::fopen(arguments[2], "wb");
  for (const emulator::Buffer& buffer : results) {
    buffer.check_surroundings();
    if (!file || std::fwrite(buffer.data(), 1, buffer.bytes(), file) != buffer.bytes()) {
      emulator::fail("cannot write %s", arguments[2]);
    }
  }
  return std::fclose(file);
}
