// The Ampere instructions the kernels use, each wrapped once and named after what it does.
// The emulator of the tests has a file of this name with the same functions for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

namespace flatquant::sm80 {

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char sm80_memory[];
  return sm80_memory;
}

// Barrier 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts this thread as there, but does not wait for the others.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- asynchronous copies ---

// `bytes` (4, 8 or 16) from global to shared memory, both aligned to them; zeros unless `inside`.
template <int bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool inside) {
  using Unit = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, uint>>;
  const Unit& from = *static_cast<const Unit*>(global);
  Unit& to = *static_cast<Unit*>(shared);
  if constexpr (bytes == 16) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Unit>::copy(from, to, inside);
  } else {
    cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Unit>::copy(from, to, inside);
  }
}

// The same of 16 bytes, or nothing.
__device__ __forceinline__ void cp_async_if(bool condition, void* shared, const void* global) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.cg.shared.global.L2::128B [%1], [%2], "
      "16;}" ::"r"(static_cast<int>(condition)),
      "r"(cute::cast_smem_ptr_to_uint(shared)), "l"(global)
      : "memory");
}

__device__ __forceinline__ void cp_async_commit() { cute::cp_async_fence(); }

// Returns once no more than the `pending` newest of the groups that this thread has committed are
// in flight; of more than three it waits for those before the newest three.
__device__ __forceinline__ void cp_async_wait(int pending) {
  // No switch, which would become a jump table.
  if (pending >= 2) {
    pending == 2 ? cute::cp_async_wait<2>() : cute::cp_async_wait<3>();
  } else {
    pending == 0 ? cute::cp_async_wait<0>() : cute::cp_async_wait<1>();
  }
}

// --- tensor cores ---

// Four 8 x 8 matrices of 2-byte elements, transposed. Lane 8 * i + r gives the address of row r of
// matrix i, 16 bytes aligned to 16; d[i] are elements (2 * (lane % 4) + {0, 1}, lane / 4) of it.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&d)[4], const void* shared) {
  cute::SM75_U16x8_LDSM_T::copy(*static_cast<const cute::uint128_t*>(shared), d[0], d[1], d[2],
                                d[3]);
}

// The bits of a float32 rounded to TF32; Inf and NaN stay.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(value));
  return rounded;
}

// D (16 x 8, float) += A (16 x 16, of float 16 x 8) @ B (16 x 8, of float 8 x 8).
template <class Element>
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<Element, float>) {
    cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0],
                                             b[1], d[0], d[1], d[2], d[3]);
  } else {
    using Op =
        std::conditional_t<std::is_same_v<Element, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                           cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    Op::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
  }
}

}  // namespace flatquant::sm80
