#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"
#include "sm80/config.h"

namespace flatquant::sm80 {

// Does not check serves() (config.h); the plan is the problem's on the current device, and
// plan.streamed == streamed. One definition per translation unit in instantiations/.
template <class Element, bool streamed>
void launch(const Problem& problem, const Plan& plan, cudaStream_t stream);

}  // namespace flatquant::sm80
