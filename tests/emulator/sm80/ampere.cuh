// The functions of csrc/sm80/ampere.cuh for the host: what the kernels' own source is compiled with
// to run in the emulator.
#pragma once

#include <cmath>

#include "cuda_emulator.h"
#include "mma.h"

namespace flatquant::sm80 {

inline unsigned char* dynamic_shared_memory() { return emulator::machine().shared().dynamic(); }

inline void named_barrier_sync(int barrier, int threads) {
  emulator::machine().barrier_sync(barrier, threads);
}
inline void named_barrier_arrive(int barrier, int threads) {
  emulator::machine().barrier_arrive(barrier, threads);
}

template <int bytes>
void cp_async(void* shared, const void* global, bool inside) {
  emulator::async_copies().issue(shared, global, bytes, inside);
}
inline void cp_async_if(bool condition, void* shared, const void* global) {
  if (condition) emulator::async_copies().issue(shared, global, 16, true);
}
inline void cp_async_commit() { emulator::async_copies().commit(); }
inline void cp_async_wait(int pending) { emulator::async_copies().wait(std::min(pending, 7)); }

inline void ldmatrix_transposed(uint32_t (&d)[4], const void* shared) {
  emulator::ldmatrix_transposed(d, shared);
}

inline uint32_t round_to_tf32(uint32_t value) {
  // To nearest, ties away from zero.
  return std::isfinite(__uint_as_float(value)) ? (value + 0x1000u) & 0xffffe000u : value;
}

template <class Element>
void mma(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<Element, float>) {
    emulator::mma_unit().multiply_tf32(d, a, b);
  } else {
    emulator::mma_unit().multiply(std::is_same_v<Element, __half> ? emulator::ElementType::half
                                                                  : emulator::ElementType::bfloat16,
                                  d, a, b);
  }
}

}  // namespace flatquant::sm80
