#include "plain/launch.cuh"

template void flatquant::plain::launch<float>(const Problem&, cudaStream_t);
