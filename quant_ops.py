"""The import path of the original operator; everything lives in :mod:`flatquant`."""

from flatquant import (
    CUDA_AVAILABLE,
    dequantize_int4,
    flatquant_dynamic_quantize,
    get_decompose_dim,
)

__all__ = [
    "CUDA_AVAILABLE",
    "dequantize_int4",
    "flatquant_dynamic_quantize",
    "get_decompose_dim",
]
