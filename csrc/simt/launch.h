#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace flatquant::simt {

// Does not check serves() (config.h). One definition per dtype in instantiations/.
template <class Element>
void launch(const Problem& problem, cudaStream_t stream);

}  // namespace flatquant::simt
