#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace flatquant::sm90 {

// Does not check serves() (config.h). One definition per translation unit in instantiations/.
template <class Element, int row_tiles>
void launch(const Problem& problem, cudaStream_t stream);

}  // namespace flatquant::sm90
