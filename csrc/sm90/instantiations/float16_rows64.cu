#include "sm90/launch.cuh"

template void flatquant::sm90::launch<__half, 1>(const Problem&, cudaStream_t);
