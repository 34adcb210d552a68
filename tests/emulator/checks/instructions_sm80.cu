// One kernel for each kind of function of csrc/sm80/ampere.cuh that the emulator's twin replaces,
// so that a test can read in the PTX which instruction it is and with which operands.
#include "sm80/ampere.cuh"

using namespace flatquant::sm80;

extern "C" __global__ void named_barrier(int* out) {
  named_barrier_sync(3, 96);
  named_barrier_arrive(4, 64);
  *out = 1;
}
extern "C" __global__ void copy(const void* global, int inside) {
  unsigned char* shared = dynamic_shared_memory();
  cp_async<16>(shared, global, inside);
  cp_async<8>(shared, global, inside);
  cp_async<4>(shared, global, inside);
  cp_async_if(inside, shared, global);
  cp_async_commit();
  cp_async_wait(3);
  cp_async_wait(0);
}
extern "C" __global__ void products(float* out) {
  uint32_t a[4], b[4];
  ldmatrix_transposed(a, dynamic_shared_memory());
  ldmatrix_transposed(b, dynamic_shared_memory() + 512);
  float d[4] = {out[0], out[1], out[2], out[3]};
  mma<__half>(d, a, b);
  mma<__nv_bfloat16>(d, a, b + 2);
  a[0] = round_to_tf32(a[2]);
  mma<float>(d, a, b);
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}
