// Compares the fragments of the emulator's ldmatrix and mma, at the addresses that the sm80 kernels
// give, with the layouts of CuTe's atoms for the instructions, on the host.
#include "../cuda_emulator.h"
// The emulator replaces the functions of csrc/sm80/ampere.cuh.
#include "../case.h"
#include "sm80/kernel.cuh"

#include <cute/atom/mma_traits_sm80.hpp>

using namespace flatquant::sm80;
using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;

static int compared = 0, wrong = 0;

static void expect_equal(float ours, float theirs, const char* what, int lane, int value) {
  ++compared;
  if (ours == theirs) return;
  if (++wrong <= 20)
    std::printf("%s, lane %d, value %d: %g not %g\n", what, lane, value, ours, theirs);
}

static float half_of(const uint32_t* registers, int value) {
  return emulator::to_float(emulator::ElementType::half,
                            static_cast<uint16_t>(registers[value / 2] >> 16 * (value % 2)));
}

int main() {
  constexpr int pitch_a = pitch(16, 2), pitch_b = pitch(16, 2);
  emulator::Machine& machine = emulator::machine();
  machine.launch(dim3(1), dim3(32), 16 * (pitch_a + pitch_b) * 2, 1, [&] {
    auto* a = reinterpret_cast<__half*>(dynamic_shared_memory());  // (k, row)
    __half* b = a + 16 * pitch_a;                                  // (k, col)
    const auto element_a = [](int k, int row) { return float((5 * k + 3 * row) % 17 - 8); };
    const auto element_b = [](int k, int col) { return float((7 * k + 2 * col) % 13 - 6); };
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
      a[i / 16 * pitch_a + i % 16] = element_a(i / 16, i % 16);
      b[i / 16 * pitch_b + i % 16] = element_b(i / 16, i % 16);
    }
    __syncwarp();
    uint32_t fragment_a[4], fragments_b[4];
    ldmatrix_transposed(fragment_a, a + a_offset<__half>(pitch_a));
    ldmatrix_transposed(fragments_b, b + b_offset<__half>(pitch_b));
    for (int value = 0; value < 8; ++value) {
      const int at = typename Traits::ALayout()(lane, value);  // row + 16 * k
      expect_equal(half_of(fragment_a, value), element_a(at / 16, at % 16), "A", lane, value);
    }
    for (int block = 0; block < 2; ++block) {
      for (int value = 0; value < 4; ++value) {
        const int at = typename Traits::BLayout()(lane, value);  // col + 8 * k
        expect_equal(half_of(fragments_b + 2 * block, value), element_b(at / 8, at % 8 + 8 * block),
                     "B", lane, value);
      }
      float d[4] = {0.5f, 0.5f, 0.5f, 0.5f};
      mma<__half>(d, fragment_a, fragments_b + 2 * block);
      for (int value = 0; value < 4; ++value) {
        const int at = typename Traits::CLayout()(lane, value);  // row + 16 * col
        float sum = 0.5f;
        for (int k = 0; k < 16; ++k) {
          sum += element_a(k, at % 16) * element_b(k, at / 16 + 8 * block);
        }
        expect_equal(d[value], sum, "D", lane, value);
      }
    }
    using Tf32 = cute::MMA_Traits<cute::SM80_16x8x8_F32TF32TF32F32_TN>;
    uint32_t tf32_a[4], tf32_b[2];
    for (int value = 0; value < 4; ++value) {
      const int at = typename Tf32::ALayout()(lane, value);  // row + 16 * k
      tf32_a[value] = __float_as_uint(element_a(at / 16, at % 16));
    }
    for (int value = 0; value < 2; ++value) {
      const int at = typename Tf32::BLayout()(lane, value);  // col + 8 * k
      tf32_b[value] = __float_as_uint(element_b(at / 8, at % 8));
    }
    float d[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    mma<float>(d, tf32_a, tf32_b);
    for (int value = 0; value < 4; ++value) {
      const int at = typename Tf32::CLayout()(lane, value);  // row + 16 * col
      float sum = 0.5f;
      for (int k = 0; k < 8; ++k) sum += element_a(k, at % 16) * element_b(k, at / 16);
      expect_equal(d[value], sum, "D of TF32", lane, value);
    }
  });
  std::printf("%d comparisons, %d wrong\n", compared, wrong);
  return wrong != 0;
}
