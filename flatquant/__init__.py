"""FlatQuant dynamic int4 quantisation: Y = left^T @ X @ right per token, then codes and scales.

The way of one call: :mod:`flatquant.ops` (checks) -> ``torch.ops.flatquant.dynamic_quantize`` ->
a CUDA kernel, or :mod:`flatquant.reference` in plain PyTorch.
"""

from ._library import CUDA_ARCHS as __cuda_archs__
from ._version import __version__
from .decompose import get_decompose_dim
from .ops import (
    CUDA_AVAILABLE,
    available_kernels,
    dequantize_int4,
    flatquant_dynamic_quantize,
)

__all__ = [
    "CUDA_AVAILABLE",
    "__cuda_archs__",
    "__version__",
    "available_kernels",
    "dequantize_int4",
    "flatquant_dynamic_quantize",
    "get_decompose_dim",
]
