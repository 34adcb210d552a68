// Does the emulator notice mistakes with cp.async? check_sm80 MISTAKE runs a small kernel that
// makes it: a warp copies a vector, another one stores it.
#include <string>

#include "sm80/ampere.cuh"

using namespace flatquant::sm80;

constexpr int count = 32;
static uint32_t source[count], result[count];
static std::string mistake;
static bool makes(const char* name) { return mistake == name; }

static void kernel() {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    const int odd = makes("misaligned copy") ? 1 : 0;
    cp_async<4>(reinterpret_cast<unsigned char*>(shared + lane) + odd, source + lane, true);
    if (!makes("no commit")) cp_async_commit();
    cp_async_commit();
    if (!makes("no wait")) cp_async_wait(makes("too many pending") ? 2 : 1);
    if (makes("misaligned row")) {
      uint32_t d[4];
      ldmatrix_transposed(d, shared + 1);
    }
  }
  if (threadIdx.x < 32 || makes("arrival instead of a wait")) {
    named_barrier_arrive(1, 64);
  } else if (!makes("no barrier")) {
    named_barrier_sync(1, 64);
  }
  if (threadIdx.x >= 32) result[lane] = shared[lane];
}

int main(int argument_count, char** arguments) {
  mistake = argument_count > 1 ? arguments[1] : "";
  for (int i = 0; i < count; ++i) source[i] = 1000 + i;
  emulator::attach_sm80();
  for (int seed = 0; seed < 50; ++seed) {
    emulator::machine().launch(dim3(1), dim3(64), count * 4 + 16, seed, kernel);
    if (std::memcmp(source, result, sizeof result) != 0) {
      emulator::fail("wrong result with seed %d", seed);
    }
  }
  return 0;
}
