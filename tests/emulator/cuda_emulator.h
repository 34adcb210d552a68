// Runs CUDA kernels on the host, one cluster of blocks after another. The threads of a cluster are
// fibers of one operating-system thread, which switch where they synchronise; which one goes on is
// a pseudo-random choice, so that a seed names an interleaving and many seeds explore them. Work of
// asynchronous units (TMA, tensor cores) is an event that happens at a random point, late
// or early. What breaks a rule ends the process with a message, and so does a deadlock.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__  // dynamic: the driver of a kernel defines the array; static: not modelled
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr int warp_size = 32;
constexpr int warpgroup_size = 128;
constexpr int shared_limit = 227 * 1024;
constexpr int max_cluster = 2;
constexpr unsigned char poison = 0xff;  // NaN in every floating-point type

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* pattern, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t below(uint32_t bound) {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z ^ z >> 31) >> 32) * bound >> 32);
  }

 private:
  uint64_t state_;
};

// The dynamic shared memory of a block, between guard bands, as ordinary loads and stores see it,
// and a second view, the one of the asynchronous units. A store reaches the second view with the
// next fence of its thread (or of any other thread: the model does not know who stored).
class SharedMemory {
 public:
  SharedMemory() : generic_(allocate()), async_(allocate()) {}

  void reset(int bytes) {
    bytes_ = bytes;
    std::memset(generic_, poison, window);
    std::memset(async_, poison, window);
  }
  unsigned char* dynamic() { return generic_ + reserved; }
  int bytes() const { return bytes_; }

  // Address in the shared window; the system keeps the first KiB of it, as on sm_90.
  uint32_t address(const void* pointer) const {
    const auto offset = static_cast<const unsigned char*>(pointer) - generic_;
    if (offset < reserved || offset >= reserved + bytes_) {
      fail("a pointer %td bytes into the shared memory of %d bytes", offset - reserved, bytes_);
    }
    return static_cast<uint32_t>(offset);
  }
  unsigned char* async_view(uint32_t address, int count) const {
    check(address, count);
    return async_ + address;
  }
  unsigned char* generic_view(uint32_t address, int count) const {
    check(address, count);
    return generic_ + address;
  }
  // What lies there in the memory of another block of the cluster.
  void* counterpart(const SharedMemory& other, const void* pointer) const {
    return other.generic_ + address(pointer);
  }
  void publish() { std::memcpy(async_ + reserved, generic_ + reserved, bytes_); }

  void check_guards() const {
    for (int i = 0; i < window; ++i) {
      const bool guard = i < reserved || i >= reserved + bytes_;
      if (guard && generic_[i] != poison) {
        fail("a store %d bytes into the shared memory of %d bytes", i - reserved, bytes_);
      }
    }
  }

 private:
  static constexpr int reserved = 1024;
  static constexpr int window = 256 * 1024;

  void check(uint32_t address, int count) const {
    if (address < reserved || static_cast<int>(address) + count > reserved + bytes_) {
      fail("%d bytes at shared address %#x are outside the block's %d bytes", count, address,
           bytes_);
    }
  }
  static unsigned char* allocate() {
    return static_cast<unsigned char*>(std::aligned_alloc(4096, window));
  }

  unsigned char* generic_;
  unsigned char* async_;
  int bytes_ = 0;
};

using WaitQueue = std::vector<int>;  // threads

// bar.sync and bar.arrive: hardware barrier of one block, or of a cluster.
struct Barrier {
  std::string name;
  int threads = 0;  // that take part, 0 between uses
  int arrived = 0;
  int generation = 0;
  WaitQueue queue;
};

// A rendezvous of a warp's lanes, for collectives.
struct Warp {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  int generation = 0;
  uint32_t slots[2][warp_size];  // a lane may be one collective ahead of another that still reads
  WaitQueue queue;
};

struct ThreadExit {};  // thrown by a thread that ends early

struct Thread {
  ucontext_t context;
  unsigned char* stack = nullptr;
  bool done = false;
  bool has_waited = false;  // for the kernel before this one
  const std::function<std::string()>* waits_for = nullptr;
};

// What an asynchronous unit will do for a block of the cluster.
struct Event {
  int rank;
  std::function<void()> action;
};

class Machine {
 public:
  Machine() {
    // On a stack of its own: the reason may be that a fiber's is full.
    static unsigned char signal_stack[64 * 1024];
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_handler = [](int) { fail("an access outside all arrays, or a full stack"); };
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
  }

  // Calls `body` in every thread of every block; the clusters, of so many blocks along x, run one
  // after another, in any order.
  void launch(dim3 grid, dim3 block, int shared_bytes, uint64_t seed,
              const std::function<void()>& body, int cluster = 1) {
    threads_ = block.x * block.y * block.z;
    cluster_ = cluster;
    if (threads_ < 1 || threads_ * cluster > 1024) fail("blocks of %d threads", threads_);
    if (shared_bytes > shared_limit) fail("%d bytes of shared memory", shared_bytes);
    if (cluster > max_cluster || grid.x % cluster != 0) fail("clusters of %d blocks", cluster);
    if (cluster > 1 && threads_ % warp_size != 0) fail("a cluster of partial warps");
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    random_ = Random(seed);
    std::vector<unsigned> order(grid.x * grid.y * grid.z / cluster);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i * cluster;
    while (!order.empty()) {
      const unsigned i = block_number_ = take(order);
      block_ = uint3{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      for (int rank = 0; rank < cluster; ++rank) memories_[rank].reset(shared_bytes);
      run_cluster();
      for (int rank = 0; rank < cluster; ++rank) memories_[rank].check_guards();
    }
  }

  // The number of the thread that runs, in the cluster; those of all its blocks, and of one.
  int thread() const { return current_; }
  int cluster_threads() const { return cluster_ * threads_; }
  int threads() const { return threads_; }
  // That of the block whose thread or event this is.
  SharedMemory& shared() { return memories_[rank_]; }
  void* counterpart(const void* pointer, int rank) {
    if (rank < 0 || rank >= cluster_) fail("block %d of a cluster of %d", rank, cluster_);
    bool runs = false;
    for (int i = 0; i < threads_; ++i) runs = runs || !pool_[rank * threads_ + i].done;
    if (!runs) fail("the shared memory of a block that has ended");
    if (cluster_barrier_.generation == 0) fail("the shared memory of a block that may not run yet");
    return shared().counterpart(memories_[rank], pointer);
  }
  Thread& self() { return pool_[current_]; }
  Random& random() { return random_; }

  // An action of an asynchronous unit, some time later; if `late`, when nothing else can happen.
  void post(std::function<void()> event, bool late = false) {
    events_[late].push_back({rank_, std::move(event)});
  }

  // Lets others run.
  void yield() {
    ready(current_);
    suspend();
  }
  // Something that `condition` depends on has changed: whoever waits looks again.
  void notify(WaitQueue& queue) {
    for (int thread : queue) ready(thread);
    queue.clear();
  }
  template <class Condition>
  void wait(WaitQueue& queue, const std::function<std::string()>& what, Condition condition) {
    if (random_.below(2)) yield();
    while (!condition()) {
      self().waits_for = &what;
      queue.push_back(current_);
      suspend();
      self().waits_for = nullptr;
    }
  }

  void barrier_sync(int id, int threads) { sync(named_barrier(id, threads), threads); }
  void barrier_arrive(int id, int threads) { arrive(named_barrier(id, threads), threads); }
  // barrier.cluster
  void cluster_sync() { sync(cluster_barrier_, cluster_threads()); }

  // Every lane of `mask` gives a value and gets all of them.
  const uint32_t* exchange(uint32_t mask, uint32_t value, const char* name) {
    const int lane = current_ % warp_size;
    const int lanes = cluster_threads() - current_ / warp_size * warp_size;
    Warp& warp = warps_[current_ / warp_size];
    if (!(mask >> lane & 1)) fail("%s by lane %d outside its mask %#x", name, lane, mask);
    if (lanes < warp_size && mask >> lanes != 0) fail("%s with lanes that do not exist", name);
    if (warp.arrived == 0) warp.mask = mask, warp.name = name;
    if (warp.mask != mask || warp.name != name) {
      fail("%s with mask %#x, others of the warp: %s with %#x", name, mask, warp.name, warp.mask);
    }
    const int generation = warp.generation;
    uint32_t* slots = warp.slots[generation % 2];
    slots[lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
      warp.arrived = 0;
      ++warp.generation;
      notify(warp.queue);
    }
    wait(
        warp.queue, [&] { return format("%s: lanes %#x of %#x", name, warp.arrived, mask); },
        [&] { return warp.generation != generation; });
    return slots;
  }

  std::string where() const {
    if (current_ < 0) return format("block %u", block_number_);
    return format("block %u, thread %d", block_number_ + rank_, current_ - rank_ * threads_);
  }

  // Called when a cluster starts and when it has ended.
  std::function<void()> block_starts = [] {}, block_ended = [] {};

 private:
  static constexpr size_t stack_bytes = 128 * 1024;

  Barrier& named_barrier(int id, int threads) {
    if (id < 0 || id >= 16) fail("barrier %d: there are 16", id);
    if (threads % warp_size != 0 || threads < 1 || threads > threads_) {
      fail("barrier %d for %d threads", id, threads);
    }
    return barriers_[rank_][id];
  }
  void arrive(Barrier& barrier, int threads) {
    if (barrier.threads == 0) barrier.threads = threads;
    if (barrier.threads != threads) {
      fail("%s for %d threads, others wait at it as %d", barrier.name.c_str(), threads,
           barrier.threads);
    }
    if (++barrier.arrived == threads) {
      barrier.threads = barrier.arrived = 0;
      ++barrier.generation;
      notify(barrier.queue);
    }
  }
  void sync(Barrier& barrier, int threads) {
    const int generation = barrier.generation;
    arrive(barrier, threads);
    wait(
        barrier.queue,
        [&] {
          return format("%s: %d of %d arrived", barrier.name.c_str(), barrier.arrived,
                        barrier.threads);
        },
        [&] { return barrier.generation != generation; });
  }

  void run_cluster() {
    for (auto& barriers : barriers_) {
      for (int id = 0; id < 16; ++id) barriers[id] = Barrier{format("barrier %d", id)};
    }
    cluster_barrier_ = Barrier{"cluster barrier"};
    for (Warp& warp : warps_) warp = Warp();
    redraw();
    block_starts();
    for (int i = 0; i < cluster_threads(); ++i) {
      Thread& thread = pool_[i];
      if (!thread.stack) thread.stack = new_stack();
      thread.done = thread.has_waited = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack;
      thread.context.uc_stack.ss_size = stack_bytes;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, enter, 0);
      ready(i);
    }
    alive_ = cluster_threads();
    schedule();
    block_ended();
  }

  void schedule() {
    while (alive_ > 0) {
      if (--steps_until_redraw_ < 0) redraw();
      const bool none = ready_[0].empty() && ready_[1].empty();
      if (!events_[0].empty() && (none || random_.below(1024) < event_chance_)) {
        happen(take(events_[0]));
      } else if (!none) {
        resume(take(ready_[ready_[0].empty()]));
      } else if (!events_[1].empty()) {
        happen(take(events_[1]));
      } else {
        report_deadlock();
      }
    }
    if (!events_[0].empty() || !events_[1].empty()) {
      fail("the block ended with asynchronous work in flight");
    }
  }

  void resume(int thread) {
    current_ = thread;
    rank_ = thread / threads_;
    const unsigned i = static_cast<unsigned>(thread % threads_);
    threadIdx = uint3{i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    blockIdx = block_;
    blockIdx.x += static_cast<unsigned>(rank_);
    swapcontext(&scheduler_, &pool_[thread].context);
    current_ = -1;
    if (pool_[thread].done) --alive_;
  }
  void happen(const Event& event) {
    rank_ = event.rank;
    event.action();
  }
  void suspend() { swapcontext(&self().context, &scheduler_); }
  void ready(int thread) { ready_[slow_[thread / warp_size]].push_back(thread); }

  template <class T>
  T take(std::vector<T>& from) {
    std::swap(from[random_.below(static_cast<uint32_t>(from.size()))], from.back());
    T result = std::move(from.back());
    from.pop_back();
    return result;
  }

  // How the coming steps are scheduled: some warps run only when no other can, and events come
  // late, now and then, or at once.
  void redraw() {
    steps_until_redraw_ = 64 << random_.below(8);
    constexpr uint32_t chances[] = {0, 1, 64, 1024};
    event_chance_ = chances[random_.below(4)];
    const uint32_t slow = random_.below(4);
    const bool whole_groups = random_.below(2);
    for (int warp = 0; warp < max_warps; ++warp) {
      slow_[warp] = whole_groups && warp % 4 != 0 ? slow_[warp - 1] : random_.below(4) < slow;
    }
    std::vector<int> all;
    for (std::vector<int>& list : ready_) {
      all.insert(all.end(), list.begin(), list.end());
      list.clear();
    }
    for (int thread : all) ready(thread);
  }

  [[noreturn]] void report_deadlock() {
    std::map<std::string, std::vector<int>> waiting;
    for (int i = 0; i < cluster_threads(); ++i) {
      if (!pool_[i].done) waiting[(*pool_[i].waits_for)()].push_back(i);
    }
    std::string report = "deadlock";
    for (const auto& [what, threads] : waiting) {
      report += format("\n  %zu threads (%d..%d) wait for %s", threads.size(), threads.front(),
                       threads.back(), what.c_str());
    }
    fail("%s", report.c_str());
  }

  static void enter();

  static unsigned char* new_stack() {
    constexpr size_t guard = 4096;
    void* memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    mprotect(memory, guard, PROT_NONE);
    return static_cast<unsigned char*>(memory) + guard;
  }

  static constexpr int max_warps = 32;
  Thread pool_[max_warps * warp_size];
  Warp warps_[max_warps];
  Barrier barriers_[max_cluster][16];
  Barrier cluster_barrier_;
  SharedMemory memories_[max_cluster];
  bool slow_[max_warps] = {};
  std::vector<int> ready_[2];     // of quick and of slow warps
  std::vector<Event> events_[2];  // and late ones
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  Random random_{0};
  uint3 block_ = {};
  unsigned block_number_ = 0;
  int threads_ = 0, cluster_ = 1, alive_ = 0, current_ = -1, rank_ = 0;
  int steps_until_redraw_ = 0;
  uint32_t event_chance_ = 0;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void Machine::enter() {
  try {
    (*machine().body_)();
  } catch (const ThreadExit&) {
  }
  machine().self().done = true;
}

inline void fail(const char* pattern, ...) {
  std::fprintf(stderr, "emulator: %s: ", machine().where().c_str());
  va_list arguments;
  va_start(arguments, pattern);
  std::vfprintf(stderr, pattern, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::_Exit(1);
}

inline uint32_t shared_address(const void* pointer) { return machine().shared().address(pointer); }

}  // namespace emulator

inline void __syncthreads() { emulator::machine().barrier_sync(0, emulator::machine().threads()); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::machine().exchange(mask, 0, "__syncwarp");
}

// `source` gives the lane to read from, within segments of `width` lanes.
template <class T, class Source>
T emulated_shuffle(unsigned mask, T value, int width, const char* name, Source source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int lane = emulator::machine().thread() % emulator::warp_size;
  const uint32_t* all = emulator::machine().exchange(mask, bits, name);
  const int from = source(lane, lane / width * width);
  const bool inside = from / width == lane / width && from >= 0;
  if (inside && !(mask >> from & 1)) emulator::fail("%s from lane %d outside its mask", name, from);
  std::memcpy(&value, &all[inside ? from : lane], 4);
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = emulator::warp_size) {
  return emulated_shuffle(mask, value, width, "__shfl_sync",
                          [&](int, int first) { return first + source % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = emulator::warp_size) {
  return emulated_shuffle(mask, value, width, "__shfl_xor_sync",
                          [&](int lane, int) { return lane ^ lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = emulator::warp_size) {
  return emulated_shuffle(mask, value, width, "__shfl_down_sync",
                          [&](int lane, int) { return lane + lanes; });
}
// Byte i of the result is that of the eight of a and b which nibble i of the selector numbers.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint32_t* all = emulator::machine().exchange(mask, predicate != 0, "__ballot_sync");
  unsigned result = 0;
  for (int lane = 0; lane < emulator::warp_size; ++lane) {
    if (mask >> lane & 1) result |= all[lane] << lane;
  }
  return result;
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4);
  const uint32_t* all =
      emulator::machine().exchange(mask, static_cast<uint32_t>(value), "__reduce_max_sync");
  for (int lane = 0; lane < emulator::warp_size; ++lane) {
    if (mask >> lane & 1) value = std::max(value, static_cast<T>(all[lane]));
  }
  return value;
}

// Fibers do not preempt each other, so ordinary accesses are atomic.
template <class T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
inline uint32_t atomicInc(uint32_t* address, uint32_t most) {
  const uint32_t old = *address;
  *address = old >= most ? 0 : old + 1;
  return old;
}
template <class T>
T atomicExch(T* address, T value) {
  return std::exchange(*address, value);
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
