#include "sm80/launch.cuh"

template void flatquant::sm80::launch<__nv_bfloat16, true>(const Problem&,
                                                           const flatquant::sm80::Plan&,
                                                           cudaStream_t);
