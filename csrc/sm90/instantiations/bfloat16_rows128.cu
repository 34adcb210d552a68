#include "sm90/launch.cuh"

template void flatquant::sm90::launch<__nv_bfloat16, 2>(const Problem&, cudaStream_t);
