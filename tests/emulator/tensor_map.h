// TMA: tiled loads of a 3-D tensor map, whose fields lie in the bytes of CUtensorMap
// (the true encoding is the driver's secret), and loads and stores of bytes as they follow each
// other.
#pragma once

#include "mbarrier.h"

namespace emulator {

struct TensorMap {
  static constexpr uint64_t expected_magic = 0x70616d5f726f736e;
  uint64_t magic;
  const unsigned char* base;
  uint64_t sizes[3];    // elements, innermost first
  uint64_t strides[2];  // bytes, of dimensions 1 and 2
  uint32_t box[3];      // elements
  uint32_t element_bytes;
  uint32_t swizzle_span;  // bytes: 128, 64 or 32, or 0 for rows as they are

  // Checks the rules of cuTensorMapEncodeTiled that an unlucky problem could break.
  CUtensorMap encode() const {
    if (magic != expected_magic) fail("not a tensor map");
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) fail("tensor map: base not aligned to 16");
    for (uint64_t size : sizes) {
      if (size < 1 || size > uint64_t{1} << 32) {
        fail("tensor map: size %llu", static_cast<unsigned long long>(size));
      }
    }
    for (uint64_t stride : strides) {
      if (stride % 16 != 0 || stride >= uint64_t{1} << 40) {
        fail("tensor map: stride of %llu bytes", static_cast<unsigned long long>(stride));
      }
    }
    for (uint32_t length : box) {
      if (length < 1 || length > 256) fail("tensor map: box length %u", length);
    }
    // A row shorter than the span is allowed, but this model does not know how it lies.
    if (swizzle_span != 0 && box[0] * element_bytes != swizzle_span) {
      fail("tensor map: box rows of %u bytes, swizzle span %u", box[0] * element_bytes,
           swizzle_span);
    }
    CUtensorMap map = {};
    static_assert(sizeof(TensorMap) <= sizeof map);
    std::memcpy(&map, this, sizeof *this);
    return map;
  }
  static TensorMap decode(const CUtensorMap* map) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("tensor map not aligned to 64 bytes");
    TensorMap result;
    std::memcpy(&result, map, sizeof result);
    if (result.magic != expected_magic) fail("not a tensor map");
    return result;
  }
};

// Which 16-byte chunk of its row a chunk lies in: address bits 4.. ^= bits 7.., one bit for a span
// of 32 bytes, two for 64, three for 128.
inline uint32_t swizzle(uint32_t address, uint32_t span) {
  if (span == 0) return address;
  return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

// The map of a box that begins at x, which hardware takes in units of 16 bytes only: it stops with
// an illegal instruction.
inline TensorMap map_of_box(const CUtensorMap* encoded, int x) {
  const TensorMap map = TensorMap::decode(encoded);
  if (int64_t{x} * map.element_bytes % 16 != 0) fail("tensor map: box begins at %d", x);
  return map;
}

// cp.async.bulk.prefetch.tensor.3d.L2, which changes nothing but the time that a load takes.
inline void tma_prefetch(const CUtensorMap* encoded, int x) { map_of_box(encoded, x); }

// cp.async.bulk.tensor.3d.shared.global.tile with mbarrier completion. Until it is done, its
// destination holds NaNs. Copies have no order among each other, and a few take very long.
inline void tma_load(const CUtensorMap* encoded, uint64_t* barrier, void* destination, int x, int y,
                     int z) {
  const TensorMap map = map_of_box(encoded, x);
  mbarriers().check_visible_to_async(barrier);
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const uint32_t bytes = row_bytes * map.box[1] * map.box[2];
  const uint32_t to = shared_address(destination);
  if (to % 128 != 0) fail("copy to %#x, not aligned to 128 bytes", to);
  SharedMemory& shared = machine().shared();
  std::memset(shared.generic_view(to, bytes), poison, bytes);
  std::memset(shared.async_view(to, bytes), poison, bytes);

  const bool late = machine().random().below(24) == 0;
  auto copy = [=, &shared] {
    uint32_t row_address = to;
    for (uint32_t k = 0; k < map.box[2]; ++k) {
      for (uint32_t j = 0; j < map.box[1]; ++j, row_address += row_bytes) {
        for (uint32_t i = 0; i < map.box[0]; ++i) {
          const int64_t at[] = {int64_t{x} + i, int64_t{y} + j, int64_t{z} + k};
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
          }
          unsigned char element[8] = {};
          if (inside) {
            const int64_t offset =
                at[0] * map.element_bytes + at[1] * map.strides[0] + at[2] * map.strides[1];
            std::memcpy(element, map.base + offset, map.element_bytes);
          }
          const uint32_t address = swizzle(row_address + i * map.element_bytes, map.swizzle_span);
          std::memcpy(shared.generic_view(address, map.element_bytes), element, map.element_bytes);
          std::memcpy(shared.async_view(address, map.element_bytes), element, map.element_bytes);
        }
      }
    }
    mbarriers().complete_bytes(barrier, bytes);
  };
  machine().post(copy, late);
}

// The shared address of a cp.async.bulk, whose addresses and size must be multiples of 16.
inline uint32_t bulk_address(const void* shared, const void* global, uint32_t bytes) {
  const uint32_t address = shared_address(shared);
  if (address % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    fail("bulk copy of %u bytes between %#x and %p, not all multiples of 16", bytes, address,
         global);
  }
  return address;
}

// cp.async.bulk.shared.global with mbarrier completion, likewise.
inline void bulk_load(const void* from, uint64_t* barrier, void* destination, uint32_t bytes) {
  mbarriers().check_visible_to_async(barrier);
  const uint32_t to = bulk_address(destination, from, bytes);
  SharedMemory& shared = machine().shared();
  std::memset(shared.generic_view(to, bytes), poison, bytes);
  std::memset(shared.async_view(to, bytes), poison, bytes);
  auto copy = [=, &shared] {
    std::memcpy(shared.generic_view(to, bytes), from, bytes);
    std::memcpy(shared.async_view(to, bytes), from, bytes);
    mbarriers().complete_bytes(barrier, bytes);
  };
  machine().post(copy, machine().random().below(24) == 0);
}

// cp.async.bulk.global.shared in bulk groups: shared memory is read some time after the store was
// issued and before its thread has waited for it.
class BulkStores {
 public:
  void block_starts() {
    for (ThreadState& thread : threads_) thread = ThreadState();
  }

  void issue(const void* source, void* global, uint32_t bytes) {
    const uint32_t from = bulk_address(source, global, bytes);
    const unsigned char* const view = machine().shared().async_view(from, bytes);
    ThreadState& thread = threads_[machine().thread()];
    ++thread.in_flight;
    auto copy = [=, &thread] {
      std::memcpy(global, view, bytes);
      --thread.in_flight;
      machine().notify(thread.queue);
    };
    machine().post(copy, machine().random().below(24) == 0);
  }

  // cp.async.bulk.wait_group.read 0
  void wait() {
    ThreadState& thread = threads_[machine().thread()];
    machine().wait(
        thread.queue, [&] { return format("%d bulk stores", thread.in_flight); },
        [&] { return thread.in_flight == 0; });
  }

 private:
  struct ThreadState {
    int in_flight = 0;
    WaitQueue queue;
  };

  ThreadState threads_[1024];
};

inline BulkStores& bulk_stores() {
  static BulkStores stores;
  return stores;
}

}  // namespace emulator
