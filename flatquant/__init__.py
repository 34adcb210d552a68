"""FlatQuant dynamic int4 quantisation: Y = left^T @ X @ right per token, then codes and scales.

The way of one call: :mod:`flatquant.ops` (checks) -> ``torch.ops.flatquant`` ->
a CUDA kernel, or :mod:`flatquant.reference` in plain PyTorch.
"""

from ._library import CUDA_ARCHS as __cuda_archs__
from ._version import __version__
from .calibration import Calibration, calibrate
from .decompose import get_decompose_dim
from .models import (
    FlatQuantActivation,
    clip_ratio_from_logits,
    load_flat_matrices,
    save_flat_matrices,
)
from .ops import (
    CUDA_AVAILABLE,
    ClipRatio,
    available_kernels,
    dequantize_int4,
    fake_quantize,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    kronecker_transform,
)

__all__ = [
    "CUDA_AVAILABLE",
    "Calibration",
    "ClipRatio",
    "FlatQuantActivation",
    "__cuda_archs__",
    "__version__",
    "available_kernels",
    "calibrate",
    "clip_ratio_from_logits",
    "dequantize_int4",
    "fake_quantize",
    "flatquant_dynamic_quantize",
    "flatquant_dynamic_quantize_many",
    "get_decompose_dim",
    "kronecker_transform",
    "load_flat_matrices",
    "save_flat_matrices",
]
