// From a dtype to its type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

namespace flatquant {

// Calls use(element), a value of the type of `dtype`'s elements.
template <class Use>
void with_element(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::float16:
      return use(__half());
    case Dtype::bfloat16:
      return use(__nv_bfloat16());
    case Dtype::float32:
      return use(float());
  }
}

}  // namespace flatquant
