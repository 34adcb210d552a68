// cp.async. A copy takes place some time after it was issued and before its thread has waited for
// it; until then its destination holds NaNs.
#pragma once

#include <deque>

#include "cuda_emulator.h"

namespace emulator {

class AsyncCopies {
 public:
  void block_starts() {
    for (ThreadState& thread : threads_) thread = ThreadState();
  }
  void block_ended() {
    for (const ThreadState& thread : threads_) {
      if (thread.open.count > 0) fail("the block ended with a copy that was not committed");
    }
  }

  void issue(void* shared, const void* global, int bytes, bool inside) {
    const uint32_t to = shared_address(shared);
    if (to % bytes != 0) fail("cp.async to %#x, not aligned to %d bytes", to, bytes);
    if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
      fail("cp.async from %p, not aligned to %d bytes", global, bytes);
    }
    unsigned char* const target = machine().shared().generic_view(to, bytes);
    std::memset(target, poison, bytes);
    ThreadState& thread = self();
    ++thread.open.count;
    const int number = thread.first + static_cast<int>(thread.groups.size());
    machine().post([this, &thread, number, target, global, bytes, inside] {
      if (inside) {
        std::memcpy(target, global, bytes);
      } else {
        std::memset(target, 0, bytes);
      }
      const int index = number - thread.first;
      // Of the group that is still open when it is the next one.
      Group& group =
          index < static_cast<int>(thread.groups.size()) ? thread.groups[index] : thread.open;
      --group.count;
      machine().notify(thread.queue);
    });
  }

  void commit() {
    ThreadState& thread = self();
    thread.groups.push_back(thread.open);
    thread.open = Group();
  }

  // Until at most the `pending` newest groups of the thread are in flight.
  void wait(int pending) {
    ThreadState& thread = self();
    while (static_cast<int>(thread.groups.size()) > pending) {
      machine().wait(
          thread.queue, [&] { return format("%d copies", thread.groups.front().count); },
          [&] { return thread.groups.front().count == 0; });
      thread.groups.pop_front();
      ++thread.first;
    }
  }

 private:
  struct Group {
    int count = 0;  // copies in flight
  };
  struct ThreadState {
    std::deque<Group> groups;  // committed, oldest first
    Group open;
    int first = 0;  // number of the oldest
    WaitQueue queue;
  };

  ThreadState& self() { return threads_[machine().thread()]; }

  ThreadState threads_[1024];
};

inline AsyncCopies& async_copies() {
  static AsyncCopies copies;
  return copies;
}

}  // namespace emulator
