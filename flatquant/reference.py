"""The operator in plain PyTorch, on any device: the meaning the kernels are held to.

With ``compute_dtype=torch.float64`` it is the oracle of the tests. Nothing is rounded between the
two products, except that float32 products on CUDA follow ``torch.get_float32_matmul_precision()``.
Results for one token may depend on the batch in the last bits, as those of any matrix product in
PyTorch do; the kernels promise more.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .packing import pack_int4


@torch.no_grad()
def transform(
    input_tensor: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``Y = left_trans^T @ X @ right_trans`` for each token, X row-major [M, N].

    Args:
        input_tensor: ``[..., M * N]``.
        left_trans: ``[M, M]``.
        right_trans: ``[N, N]``.
        compute_dtype: dtype that everything is converted to first, and of the result.

    Returns:
        Y, ``[..., M * N]``.
    """
    M, N = left_trans.shape[0], right_trans.shape[0]
    tokens = input_tensor.to(compute_dtype).reshape(-1, M, N)
    with _without_autocast(input_tensor.device.type):  # it would round both products' operands
        half = left_trans.to(compute_dtype).T @ tokens
        transformed: Tensor = half @ right_trans.to(compute_dtype)
    return transformed.reshape(input_tensor.shape)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # Meta tensors know no autocast; asking torch which devices do, torch.compile cannot trace.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@torch.no_grad()
def quantize(transformed: Tensor, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformed tokens.

    ``scale = (clip_ratio * max|Y|) / 7`` in float32, ``q = clamp(round_half_even(Y / scale))`` in
    the dtype of ``transformed`` (float32 or float64). A token whose scale is 0 gets codes 0 and
    scale 1; one with NaN or Inf gets codes 0 and scale NaN or +Inf.

    Args:
        transformed: Y, ``[..., features]``.
        clip_ratio: finite, > 0.

    Returns:
        int8 codes ``[..., features]`` and float32 scales ``[...]``.
    """
    absmax = transformed.abs().amax(-1).to(torch.float32)
    # CUDA divides by a Python number through its reciprocal, which is not the correctly rounded
    # quotient; a tensor divides exactly.
    scales = (absmax * clip_ratio) / torch.full_like(absmax, 7.0)
    usable = scales.isfinite() & (scales != 0)
    codes = (transformed / scales.unsqueeze(-1).to(transformed.dtype)).round().clamp(-8, 7)
    codes = torch.where(usable.unsqueeze(-1), codes, 0).to(torch.int8)
    return codes, torch.where(scales == 0, 1.0, scales)


def dynamic_quantize(
    input_tensor: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """:func:`transform`, then :func:`quantize`, then packing if asked for.

    Returns:
        int8 codes ``[..., features]``, or int32 words ``[..., features / 8]`` with ``pack_int32``,
        and float32 scales ``[...]``.
    """
    transformed = transform(input_tensor, left_trans, right_trans, compute_dtype)
    codes, scales = quantize(transformed, clip_ratio)
    return (pack_int4(codes) if pack_int32 else codes), scales
