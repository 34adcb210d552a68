#include "sm80/launch.cuh"

template void flatquant::sm80::launch<float, false>(const Problem&, const flatquant::sm80::Plan&,
                                                    cudaStream_t);
