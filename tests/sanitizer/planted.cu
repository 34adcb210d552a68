// One mistake for each tool of compute-sanitizer: what scripts/sanitize.sh must see before it
// believes a clean run. The argument says which.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(int* out) { out[blockDim.x + threadIdx.x] = 1; }

__global__ void race(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[63 - threadIdx.x];  // without __syncthreads()
}

__global__ void uninitialised(int* out) { out[threadIdx.x] += 1; }

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

int main(int, char** arguments) {
  int* out;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 2;
  const char* tool = arguments[1];
  if (!std::strcmp(tool, "memcheck")) out_of_bounds<<<1, 64>>>(out);
  if (!std::strcmp(tool, "racecheck")) race<<<1, 64>>>(out);
  if (!std::strcmp(tool, "initcheck")) uninitialised<<<1, 64>>>(out);
  if (!std::strcmp(tool, "synccheck")) divergent_barrier<<<1, 64>>>(out);
  cudaDeviceSynchronize();
  return 0;
}
