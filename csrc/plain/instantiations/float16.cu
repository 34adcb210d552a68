#include "plain/launch.cuh"

template void flatquant::plain::launch<__half>(const Problem&, cudaStream_t);
