// Does the emulator notice mistakes? check_emulator MISTAKE runs a small kernel that makes it: one
// warpgroup multiplies two 64 x 64 matrices that another warp has had copied to shared memory.
// Then the two blocks of a cluster give each other a number, and a block stores some to global
// memory in bulk. The exit status is 0 only if the product and the numbers are right; a broken rule
// has its message.
#include <cmath>
#include <string>

#include "sm90/hopper.cuh"

using namespace flatquant::sm90;

constexpr int size = 64, matrix_bytes = size * size * 2;
static float product[size][size];
static std::string mistake;
static bool makes(const char* name) { return mistake == name; }

static void store_product(const float (&d)[size / 2]) {
  for (int i = 0; i < size / 2; ++i) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    product[row][i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }
}

static void kernel(const CUtensorMap& map_a, const CUtensorMap& map_b) {
  if (!makes("no wait for the kernel before")) wait_for_previous_kernel();
  unsigned char* const memory = dynamic_shared_memory();
  auto* full = reinterpret_cast<Mbarrier*>(memory);
  unsigned char *a = memory + 1024, *b = a + matrix_bytes;
  if (threadIdx.x == 0) {
    if (!makes("no init")) mbarrier_init(full, 1);
    if (!makes("no init fence")) mbarrier_init_fence();
    if (makes("overflow")) memory[1024 + 2 * matrix_bytes] = 1;
    if (makes("overwritten barrier")) std::memset(full, emulator::poison, 8);
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) {
      if (makes("early exit")) {
        tma_load_3d(&map_a, full, a, 0, 0, 0);
        return;
      }
      mbarrier_arrive_expect_bytes(full, 2 * matrix_bytes + (makes("too many bytes") ? 16 : 0));
      if (makes("two arrivals")) mbarrier_arrive_expect_bytes(full, 0);
      const int col = makes("misaligned box") ? 4 : 0;
      tma_load_3d(&map_a, full, a + (makes("misaligned copy") ? 64 : 0), col, 0, 0);
      tma_load_3d(&map_b, full, b, 0, 0, 0);
    }
    return;
  }
  if (makes("early exit")) return;
  if (makes("barrier counts")) named_barrier_sync(0, threadIdx.x < 64 ? 64 : 128);
  if (makes("partial barrier") && threadIdx.x >= 32) named_barrier_sync(0, 128);
  if (!makes("no wait")) mbarrier_wait(full, makes("wrong parity") ? 1 : 0);
  if (makes("store without fence") || makes("store with fence")) {
    // B again, by ordinary stores.
    unsigned char copy[matrix_bytes / 128];
    unsigned char* part = b + threadIdx.x * sizeof copy;
    std::memcpy(copy, part, sizeof copy);
    part = (b += matrix_bytes) + threadIdx.x * sizeof copy;
    std::memcpy(part, copy, sizeof copy);
    if (makes("store with fence")) fence_proxy_async();
    named_barrier_sync(0, 128);
  }

  float d[size / 2] = {};
  if (!makes("no wgmma fence")) wgmma_begin(d);
  if (makes("write after fence")) d[3] = 1.0f;
  const int other = makes("descriptors disagree") && threadIdx.x == 77;
  for (int k = 0; k < size; k += 16) {
    const uint64_t a_k = advance(wgmma_descriptor(a, Swizzle::bytes128, 0), k * 128);
    const uint64_t b_k = advance(wgmma_descriptor(b, Swizzle::bytes128, 0), (k + other) * 128);
    wgmma<__half, size>(d, a_k, b_k, k > 0);
    if (makes("write to accumulators")) d[5] = 0.0f;
    if (!makes("no commit")) wgmma_commit();
    wgmma_wait_previous();
  }
  if (makes("early use")) store_product(d);
  if (makes("no wait for wgmma")) return;
  if (!makes("no wait for the last wgmma")) wgmma_wait(d);
  if (!makes("early use")) store_product(d);
}

static int given[2];

static void cluster_kernel() {
  int* const number = reinterpret_cast<int*>(dynamic_shared_memory());
  Mbarrier* const barrier = reinterpret_cast<Mbarrier*>(number + 2);
  const int rank = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 5) mbarrier_init(barrier, 1);
  if (!makes("early store")) cluster_sync();
  if (makes("barrier of another block") && threadIdx.x == 5) {
    mbarrier_arrive_expect_bytes(in_block(barrier, 1 - rank), 0);
  }
  if (makes("block ended") && rank == 0) return;
  if (threadIdx.x == 5) *in_block(number, makes("no such block") ? 2 : 1 - rank) = rank;
  if (makes("part of a cluster") && threadIdx.x >= 32) return;
  if (!makes("no cluster barrier")) cluster_sync();
  if (threadIdx.x == 0) given[rank] = *number;
}

alignas(16) static int stored[2][64];

static void store_kernel() {
  wait_for_previous_kernel();
  int* const numbers = reinterpret_cast<int*>(dynamic_shared_memory());
  for (int round = 0; round < 2; ++round) {
    numbers[threadIdx.x] = 64 * round + static_cast<int>(threadIdx.x);
    if (!makes("bulk store without fence")) fence_proxy_async();
    named_barrier_sync(0, 64);
    if (threadIdx.x == 0) {
      const int from = makes("misaligned bulk store") ? 1 : 0;
      bulk_store(numbers + from, stored[round], sizeof stored[round]);
      if (!makes("no wait for bulk store")) bulk_store_wait();
    }
    named_barrier_sync(0, 64);
  }
}

static float element(int matrix, int k, int col) { return (k * 7 + col * (matrix + 3)) % 11 - 5; }

static CUtensorMap make_map(int matrix) {
  static __half values[2][size][size];
  for (int k = 0; k < size; ++k) {
    for (int col = 0; col < size; ++col) values[matrix][k][col] = element(matrix, k, col);
  }
  emulator::TensorMap map{emulator::TensorMap::expected_magic,
                          reinterpret_cast<unsigned char*>(values[matrix]),
                          {size, size, 1},
                          {size * 2, matrix_bytes},
                          {size, size, 1},
                          2,
                          128};
  return map.encode();
}

int main(int argument_count, char** arguments) {
  mistake = argument_count > 1 ? arguments[1] : "";
  const CUtensorMap a = make_map(0), b = make_map(1);
  emulator::Machine& machine = emulator::machine();
  emulator::attach_sm90();
  const int bytes = 1024 + (mistake.find("store w") == 0 ? 3 : 2) * matrix_bytes;
  for (int seed = 0; seed < 50; ++seed) {
    for (auto& row : product) std::fill(row, row + size, -1.0f);
    machine.launch(dim3(1), dim3(256), bytes, seed, [&] { kernel(a, b); });
    for (int row = 0; row < size; ++row) {
      for (int col = 0; col < size; ++col) {
        float expected = 0.0f;
        for (int k = 0; k < size; ++k) expected += element(0, k, row) * element(1, k, col);
        if (product[row][col] != expected) emulator::fail("wrong product with seed %d", seed);
      }
    }
  }
  for (int seed = 0; seed < 50; ++seed) {
    given[0] = given[1] = -1;
    machine.launch(dim3(2), dim3(64), 16, seed, cluster_kernel, 2);
    if (given[0] != 1 || given[1] != 0) emulator::fail("wrong number with seed %d", seed);
  }
  for (int seed = 0; seed < 50; ++seed) {
    std::memset(stored, -1, sizeof stored);
    machine.launch(dim3(1), dim3(64), sizeof stored[0], seed, store_kernel);
    for (int i = 0; i < 128; ++i) {
      if (stored[i / 64][i % 64] != i) emulator::fail("wrong copy with seed %d", seed);
    }
  }
  return 0;
}
