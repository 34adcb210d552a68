// The Hopper instructions the kernel uses, each wrapped once and named after what it does.
// The emulator of the tests has a file of this name with the same functions for the host.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_desc.hpp>

namespace flatquant::sm90 {

// --- shared memory and barriers ---

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  cutlass::arch::NamedBarrier::sync(static_cast<uint32_t>(threads), static_cast<uint32_t>(barrier));
}

// Waits for all threads of the cluster, and for what they have stored to each other's blocks.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// Where an object in this block's shared memory lies in that of another block of the cluster.
template <class Object>
__device__ __forceinline__ Object* in_block(Object* object, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(object)), "r"(rank));
  return reinterpret_cast<Object*>(address);
}

// Ends the thread if the condition holds, without a branch that the compiler would know of.
__device__ __forceinline__ void exit_if(bool condition) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p exit;}" ::"r"(static_cast<int>(condition))
               : "memory");
}

using Mbarrier = uint64_t;

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(barrier, arrivals);
}
// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void mbarrier_init_fence() { cutlass::arch::fence_barrier_init(); }

__device__ __forceinline__ void mbarrier_arrive_expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}
// Returns once the phase with this parity has completed.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  cutlass::arch::ClusterBarrier::wait(barrier, parity);
}

// Ordinary shared-memory stores before it are seen by wgmma and TMA after it.
__device__ __forceinline__ void fence_proxy_async() { cutlass::arch::fence_view_async_shared(); }

// Starts a copy of 16, 8 or 4 bytes from global to shared memory; zeros arrive if not `condition`.
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool condition) {
  using Unit = std::conditional_t<bytes == 16, cute::uint128_t,
                                  std::conditional_t<bytes == 8, uint64_t, uint32_t>>;
  cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Unit>::copy(*static_cast<const Unit*>(global),
                                                    *static_cast<Unit*>(shared), condition);
}
// Returns once all copies that this thread started have arrived.
__device__ __forceinline__ void copy_async_wait() {
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
}

// --- programmatic dependent launch ---

// Returns once the kernels before this one have ended: what they wrote is there, and what they read
// may be overwritten.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The next kernel of the stream may begin beside this one, if it was launched with that attribute.
// Behind the wait: what it does ahead of its own wait is then at most beside this kernel, and not
// beside those before it, for which nobody may have allowed that.
__device__ __forceinline__ void start_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- TMA ---

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
}

// Box of a 3-D tensor map at coordinates (x innermost) into shared memory; what lies outside the
// tensor arrives as zeros. Completes on `barrier` with the box's bytes.
__device__ __forceinline__ void tma_load_3d(const CUtensorMap* map, Mbarrier* barrier, void* shared,
                                            int x, int y, int z) {
  // Not evict-first, though every token is read only once: slower at full bandwidth (NOTES.md).
  cute::SM90_TMA_LOAD_3D::copy(
      map, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), shared, x, y, z);
}

// The same box to the L2 cache only.
__device__ __forceinline__ void tma_prefetch_3d(const CUtensorMap* map, int x, int y, int z) {
  cute::SM90_TMA_LOAD_3D::PREFETCH::copy(map, x, y, z);
}

// Starts a copy of `bytes`, a multiple of 16, between addresses that are multiples of 16. Completes
// on `barrier` with them.
__device__ __forceinline__ void bulk_load(const void* global, Mbarrier* barrier, void* shared,
                                          int bytes) {
  cute::SM90_BULK_COPY_G2S::copy(global, barrier, shared, bytes);
}

// The other way. After bulk_store_wait() all that the thread stores so has been read from shared
// memory, though it may not have been written yet.
__device__ __forceinline__ void bulk_store(const void* shared, void* global, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(shared, global, bytes);
  cute::tma_store_arrive();
}
__device__ __forceinline__ void bulk_store_wait() { cute::tma_store_wait<0>(); }

// --- tensor cores ---

// Width in bytes of a row of the swizzled shared-memory panel (see Panel in config.h).
enum class Swizzle : int { bytes32 = 32, bytes64 = 64, bytes128 = 128 };

// Descriptor of a wgmma operand that is contiguous along its M or N dimension ("MN-major"):
// `panel_stride` bytes between neighbouring swizzle-wide panels, eight K rows to a swizzle atom. Or
// of one that is contiguous along K: of one panel, eight rows of N to an atom.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, Swizzle swizzle,
                                                     int panel_stride) {
  using cute::SM90::GMMA::LayoutType;
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(shared) >> 4;
  descriptor.bitfield.leading_byte_offset_ = panel_stride >> 4;
  descriptor.bitfield.stride_byte_offset_ = 8 * static_cast<int>(swizzle) >> 4;
  descriptor.bitfield.base_offset_ = 0;
  descriptor.bitfield.layout_type_ =
      static_cast<uint8_t>(swizzle == Swizzle::bytes128  ? LayoutType::B128
                           : swizzle == Swizzle::bytes64 ? LayoutType::B64
                                                         : LayoutType::B32);
  return descriptor;
}

// The descriptor `bytes` further on. The address is in the low word and does not carry out of it.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000u) | low;
}

template <class Element>
struct WgmmaElement;
template <>
struct WgmmaElement<__half> {
  using type = cutlass::half_t;
};
template <>
struct WgmmaElement<__nv_bfloat16> {
  using type = cutlass::bfloat16_t;
};

// Along which dimension B is contiguous.
enum class Major { n, k };

// D (64 x n, float) = A (64 x 16) @ B (16 x n) + (accumulate ? D : 0), asynchronously.
// A in shared memory, contiguous along M; B in shared memory.
template <class Element, int n, Major b_major, int... i>
__device__ __forceinline__ void wgmma_call(float (&d)[n / 2], uint64_t a, uint64_t b,
                                           bool accumulate, std::integer_sequence<int, i...>) {
  namespace gmma = cute::SM90::GMMA;
  using T = typename WgmmaElement<Element>::type;
  constexpr auto major = b_major == Major::n ? gmma::Major::MN : gmma::Major::K;
  using Op =
      decltype(gmma::ss_op_selector<T, T, float, cute::Shape<cute::_64, cute::Int<n>, cute::_16>,
                                    gmma::Major::MN, major>());
  Op::fma(a, b, d[i]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <class Element, int n, Major b_major = Major::n>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_call<Element, n, b_major>(d, a, b, accumulate, std::make_integer_sequence<int, n / 2>());
}

// The same with A in registers: a warp's 16 x 16 fragment, as mma.sync has it; B contiguous along
// N.
template <class Element, int n, int... i>
__device__ __forceinline__ void wgmma_call(float (&d)[n / 2], const uint32_t* a, uint64_t b,
                                           bool accumulate, std::integer_sequence<int, i...>) {
  namespace gmma = cute::SM90::GMMA;
  using T = typename WgmmaElement<Element>::type;
  using Op =
      decltype(gmma::rs_op_selector<T, T, float, cute::Shape<cute::_64, cute::Int<n>, cute::_16>,
                                    gmma::Major::K, gmma::Major::MN>());
  Op::fma(a[0], a[1], a[2], a[3], b, d[i]...,
          accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <class Element, int n>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint32_t* a, uint64_t b,
                                      bool accumulate) {
  wgmma_call<Element, n>(d, a, b, accumulate, std::make_integer_sequence<int, n / 2>());
}

// A chain of wgmma: begin, wgmma ..., commit, and wait before its registers are used again. begin
// and wait name registers so that the compiler moves no other use of them in between.
template <class Register, int count>
__device__ __forceinline__ void fence_registers(Register (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) cute::warpgroup_fence_operand(registers[i]);
}
template <class... Registers>
__device__ __forceinline__ void wgmma_begin(Registers&... registers) {
  (fence_registers(registers), ...);
  cute::warpgroup_arrive();
}
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
// For all but what was committed last.
__device__ __forceinline__ void wgmma_wait_previous() { cute::warpgroup_wait<1>(); }
template <class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  cute::warpgroup_wait<0>();
  (fence_registers(registers), ...);
}

}  // namespace flatquant::sm90
