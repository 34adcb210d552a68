#include "simt/launch.cuh"

template void flatquant::simt::launch<float>(const Problem&, cudaStream_t);
