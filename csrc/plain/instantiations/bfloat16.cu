#include "plain/launch.cuh"

template void flatquant::plain::launch<__nv_bfloat16>(const Problem&, cudaStream_t);
