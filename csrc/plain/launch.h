#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace flatquant::plain {

// The problem has no factors. One definition per dtype in instantiations/.
template <class Element>
void launch(const Problem& problem, cudaStream_t stream);

}  // namespace flatquant::plain
