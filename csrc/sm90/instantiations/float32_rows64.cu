#include "sm90/launch.cuh"

template void flatquant::sm90::launch<float, 1>(const Problem&, cudaStream_t);
