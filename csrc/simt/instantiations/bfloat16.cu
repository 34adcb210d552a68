#include "simt/launch.cuh"

template void flatquant::simt::launch<__nv_bfloat16>(const Problem&, cudaStream_t);
