#include "simt/launch.cuh"

template void flatquant::simt::launch<__half>(const Problem&, cudaStream_t);
