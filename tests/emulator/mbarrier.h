// mbarrier objects of the PTX ISA: arrivals and transaction bytes, phase by phase. The state lies
// in the object's own eight bytes, as on the GPU, so that whatever overwrites it breaks it.
#pragma once

#include <set>

#include "cuda_emulator.h"

namespace emulator {

struct MbarrierState {
  uint64_t parity : 1;       // of the phase that is not complete yet; the first is 0
  uint64_t pending : 20;     // arrivals
  uint64_t count : 20;       // arrivals a phase
  int64_t bytes : 22;        // transactions expected and not completed; may be negative
  uint64_t overwritten : 1;  // 0; poison sets it
};
static_assert(sizeof(MbarrierState) == 8);

class Mbarriers {
 public:
  void block_starts() { objects_.clear(); }

  void init(uint64_t* object, int count) {
    const uint32_t address = shared_address(object);
    if (address % 8 != 0) fail("mbarrier at %#x is not aligned to 8 bytes", address);
    if (count < 1 || count >= 1 << 20) fail("mbarrier for %d arrivals", count);
    if (objects_.count(object)) fail("mbarrier at %#x is initialised twice", address);
    objects_[object].initialised_by = machine().thread();
    store(object, {0, static_cast<uint64_t>(count), static_cast<uint64_t>(count), 0, 0});
  }
  // fence.mbarrier_init
  void init_fence() {
    for (auto& [at, object] : objects_) {
      if (object.initialised_by == machine().thread()) object.visible_to_async = true;
    }
  }
  void check_visible_to_async(uint64_t* object) {
    if (!find(object).visible_to_async) {
      fail("TMA may not see the mbarrier at %#x: no fence", shared_address(object));
    }
  }

  // Adds `expected` bytes to the phase (0 for none), then arrives.
  void arrive(uint64_t* object, uint32_t expected) {
    MbarrierState state = load(object);
    add_bytes(object, state, expected);
    if (state.pending == 0) fail("an arrival too many at mbarrier %#x", shared_address(object));
    --state.pending;
    update(object, state);
  }
  void complete_bytes(uint64_t* object, uint32_t bytes) {
    MbarrierState state = load(object);
    add_bytes(object, state, -static_cast<int64_t>(bytes));
    update(object, state);
  }

  // mbarrier.try_wait.parity until it is true: `parity` is that of the current phase, which is not
  // complete, or of the one before, which is.
  void wait(uint64_t* object, uint32_t parity) {
    if (parity > 1) fail("parity %u", parity);
    machine().wait(
        find(object).queue,
        [&] {
          const MbarrierState state = load(object);
          return format(
              "mbarrier %#x, parity %u; it has parity %d, %d arrivals of %d and %d bytes "
              "to come",
              shared_address(object), parity, static_cast<int>(state.parity),
              static_cast<int>(state.pending), static_cast<int>(state.count),
              static_cast<int>(state.bytes));
        },
        [&] { return load(object).parity != parity; });
  }

 private:
  struct Object {
    int initialised_by = -1;
    bool visible_to_async = false;
    WaitQueue queue;
  };

  Object& find(uint64_t* object) {
    const uint32_t address = shared_address(object);  // of this block
    const auto found = objects_.find(object);
    if (found == objects_.end()) fail("no mbarrier was initialised at %#x", address);
    return found->second;
  }
  MbarrierState load(uint64_t* object) {
    find(object);
    MbarrierState state;
    std::memcpy(&state, object, sizeof state);
    if (state.overwritten) fail("mbarrier at %#x was overwritten", shared_address(object));
    return state;
  }
  static void store(uint64_t* object, const MbarrierState& state) {
    std::memcpy(object, &state, sizeof state);
  }
  static void add_bytes(uint64_t* object, MbarrierState& state, int64_t bytes) {
    constexpr int64_t limit = (1 << 20) - 1;
    const int64_t sum = state.bytes + bytes;
    if (sum > limit || sum < -limit) {
      fail("transaction count %lld of mbarrier %#x is out of range", static_cast<long long>(sum),
           shared_address(object));
    }
    state.bytes = sum;
  }
  void update(uint64_t* object, MbarrierState state) {
    const bool complete = state.pending == 0 && state.bytes == 0;
    if (complete) {
      state.parity ^= 1;
      state.pending = state.count;
    }
    store(object, state);
    if (complete) machine().notify(find(object).queue);
  }

  std::map<const uint64_t*, Object> objects_;
};

inline Mbarriers& mbarriers() {
  static Mbarriers instance;
  return instance;
}

}  // namespace emulator
