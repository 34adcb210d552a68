// One kernel for each function of csrc/sm90/hopper.cuh that the emulator's twin replaces, so that a
// test can read in the PTX which instruction it is and with which operands.
#include "sm90/hopper.cuh"

using namespace flatquant::sm90;

extern "C" __global__ void named_barrier(int* out) {
  named_barrier_sync(3, 96);
  *out = 1;
}
extern "C" __global__ void cluster(unsigned* shared) {
  *in_block(shared, 1) = 2;
  cluster_sync();
}
extern "C" __global__ void early_end(int* out, bool condition) {
  exit_if(condition);
  *out = 1;
}
extern "C" __global__ void mbarrier(Mbarrier* barrier) {
  mbarrier_init(barrier, 5);
  mbarrier_init_fence();
  mbarrier_arrive_expect_bytes(barrier, 4096);
  mbarrier_wait(barrier, 1);
}
extern "C" __global__ void copy(const __grid_constant__ CUtensorMap map, Mbarrier* barrier,
                                void* shared, int x, int y, int z) {
  tma_load_3d(&map, barrier, shared, x, y, z);
  tma_prefetch_3d(&map, x, y, z);
  bulk_load(&map, barrier, shared, 48);
  fence_proxy_async();
}
extern "C" __global__ void store(const void* shared, void* global) {
  bulk_store(shared, global, 48);
  bulk_store_wait();
}
extern "C" __global__ void products(float* out, uint64_t a, uint64_t b) {
  float d[12];
  uint32_t registers[4];
  for (int i = 0; i < 12; ++i) d[i] = out[i];
  for (int i = 0; i < 4; ++i) registers[i] = __float_as_uint(out[12 + i]);
  wgmma_begin(registers);
  wgmma_begin(d);
  wgmma<__half, 24>(d, a, b, false);
  wgmma<__half, 24, Major::k>(d, a, b, true);
  wgmma<__nv_bfloat16, 24>(d, registers, b, true);
  wgmma_commit();
  wgmma_wait_previous();
  wgmma_wait(d);
  for (int i = 0; i < 12; ++i) out[i] = d[i];
}
extern "C" __global__ void dependent_launch(int* out) {
  wait_for_previous_kernel();
  start_next_kernel();
  *out = 1;
}
extern "C" __global__ void copies(void* shared, const void* global, bool condition) {
  copy_async<16>(shared, global, condition);
  copy_async<8>(shared, global, condition);
  copy_async<4>(shared, global, condition);
  copy_async_wait();
}
