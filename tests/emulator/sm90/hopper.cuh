// The functions of csrc/sm90/hopper.cuh for the host: what the kernel's own source is compiled with
// to run in the emulator.
#pragma once

#include "async_copies.h"
#include "cuda_emulator.h"
#include "mbarrier.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace flatquant::sm90 {

inline unsigned char* dynamic_shared_memory() { return emulator::machine().shared().dynamic(); }

inline void named_barrier_sync(int barrier, int threads) {
  emulator::machine().barrier_sync(8 + barrier, threads);  // CUTLASS keeps 0..7
}

inline void cluster_sync() { emulator::machine().cluster_sync(); }
template <class Object>
Object* in_block(Object* object, int rank) {
  return static_cast<Object*>(emulator::machine().counterpart(object, rank));
}

inline void exit_if(bool condition) {
  if (condition) throw emulator::ThreadExit();
}

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  emulator::mbarriers().init(barrier, arrivals);
}
inline void mbarrier_init_fence() { emulator::mbarriers().init_fence(); }
inline void mbarrier_arrive_expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  emulator::mbarriers().arrive(barrier, bytes);
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  emulator::mbarriers().wait(barrier, parity);
}

inline void wait_for_previous_kernel() { emulator::machine().self().has_waited = true; }
// Before an access to memory that the kernel before may write or read. Ordinary ones go unseen.
inline void check_waited() {
  if (!emulator::machine().self().has_waited) {
    emulator::fail("an access to memory before the wait for the previous kernel");
  }
}
inline void start_next_kernel() { check_waited(); }

template <int bytes>
void copy_async(void* shared, const void* global, bool condition) {
  check_waited();
  emulator::async_copies().issue(shared, global, bytes, condition);
}
inline void copy_async_wait() {
  emulator::async_copies().commit();
  emulator::async_copies().wait(0);
}

inline void fence_proxy_async() { emulator::machine().shared().publish(); }

inline void tma_prefetch_map(const CUtensorMap* map) { emulator::TensorMap::decode(map); }
inline void tma_load_3d(const CUtensorMap* map, Mbarrier* barrier, void* shared, int x, int y,
                        int z) {
  check_waited();
  emulator::tma_load(map, barrier, shared, x, y, z);
}
inline void tma_prefetch_3d(const CUtensorMap* map, int x, int, int) {
  check_waited();
  emulator::tma_prefetch(map, x);
}

inline void bulk_load(const void* global, Mbarrier* barrier, void* shared, int bytes) {
  check_waited();
  emulator::bulk_load(global, barrier, shared, bytes);
}
inline void bulk_store(const void* shared, void* global, int bytes) {
  check_waited();
  emulator::bulk_stores().issue(shared, global, bytes);
}
inline void bulk_store_wait() { emulator::bulk_stores().wait(); }

enum class Swizzle : int { bytes32 = 32, bytes64 = 64, bytes128 = 128 };

inline uint64_t wgmma_descriptor(const void* shared, Swizzle swizzle, int panel_stride) {
  const int span = static_cast<int>(swizzle);
  return emulator::Descriptor{emulator::shared_address(shared), panel_stride, 8 * span, 0, span}
      .encode();
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <class Element>
constexpr emulator::ElementType wgmma_element =
    std::is_same_v<Element, __half> ? emulator::ElementType::half : emulator::ElementType::bfloat16;

enum class Major { n, k };

template <class Element, int n, Major b_major = Major::n>
void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  const bool along_k = b_major == Major::k;
  emulator::wgmma_unit().issue({wgmma_element<Element>, n, false, a, b, along_k, accumulate}, d,
                               nullptr);
}
template <class Element, int n>
void wgmma(float (&d)[n / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  emulator::wgmma_unit().issue({wgmma_element<Element>, n, true, 0, b, false, accumulate}, d, a);
}

template <class... Registers>
void wgmma_begin(Registers&... registers) {
  (emulator::wgmma_unit().fence(registers, sizeof registers), ...);
}
inline void wgmma_commit() { emulator::wgmma_unit().commit(); }
inline void wgmma_wait_previous() { emulator::wgmma_unit().wait_previous(); }
template <class... Accumulators>
void wgmma_wait(Accumulators&... d) {
  emulator::wgmma_unit().wait({d...});
}

}  // namespace flatquant::sm90
