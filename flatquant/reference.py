"""The operator in plain PyTorch, on any device: the meaning the kernels are held to.

With ``compute_dtype=torch.float64`` it is the oracle of the tests. Nothing is rounded between the
two products, except that float32 products on CUDA follow ``torch.get_float32_matmul_precision()``.
Results for one token may depend on the batch in the last bits, as those of any matrix product in
PyTorch do; the kernels promise more.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._checks import ClipRatio, Ratio, as_pair
from .packing import pack_int4


@torch.no_grad()
def transform(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``Y = left_trans^T @ X @ right_trans`` for each token, X row-major [M, N].

    Args:
        input_tensor: ``[..., M * N]``.
        left_trans: ``[M, M]``, or None: ``Y = X @ right_trans``.
        right_trans: ``[N, N]``, or None: ``Y = left_trans^T @ X``. Without either, Y is X.
        compute_dtype: dtype that everything is converted to first, and of the result.

    Returns:
        Y, ``[..., M * N]``.
    """
    transformed = input_tensor.to(compute_dtype)
    if left_trans is None and right_trans is None:
        return transformed
    features = input_tensor.shape[-1]
    if right_trans is not None:
        N = right_trans.shape[0]
    else:
        assert left_trans is not None
        N = features // left_trans.shape[0]
    transformed = transformed.reshape(-1, features // N, N)
    with _without_autocast(input_tensor.device.type):  # it would round the products' operands
        if left_trans is not None:
            transformed = left_trans.to(compute_dtype).T @ transformed
        if right_trans is not None:
            transformed = transformed @ right_trans.to(compute_dtype)
    return transformed.reshape(input_tensor.shape)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # Meta tensors know no autocast; asking torch which devices do, torch.compile cannot trace.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@torch.no_grad()
def quantize(transformed: Tensor, clip_ratio: ClipRatio = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformed tokens.

    ``scale = max(max_ratio * max(Y, 0), min_ratio * max(-Y, 0)) / 7`` in float32, which is
    ``clip_ratio * max|Y| / 7`` for one ratio; ``q = clamp(round_half_even(Y / scale))`` in the
    dtype of ``transformed`` (float32 or float64). A token whose scale is 0 gets codes 0 and scale
    1; one with NaN or Inf gets codes 0 and scale NaN or +Inf.

    Args:
        transformed: Y, ``[..., features]``.
        clip_ratio: one ratio or the pair ``(max_ratio, min_ratio)``, each a number or one float32
            on the device; finite, > 0.

    Returns:
        int8 codes ``[..., features]`` and float32 scales ``[...]``.
    """
    max_ratio, min_ratio = map(_as_scalar, as_pair(clip_ratio))
    above = transformed.amax(-1).clamp(min=0).to(torch.float32)
    below = (-transformed.amin(-1)).clamp(min=0).to(torch.float32)
    largest = torch.maximum(above * max_ratio, below * min_ratio)
    # CUDA divides by a Python number through its reciprocal, which is not the correctly rounded
    # quotient; a tensor divides exactly.
    scales = largest / torch.full_like(largest, 7.0)
    usable = scales.isfinite() & (scales != 0)
    codes = (transformed / scales.unsqueeze(-1).to(transformed.dtype)).round().clamp(-8, 7)
    codes = torch.where(usable.unsqueeze(-1), codes, 0).to(torch.int8)
    return codes, torch.where(scales == 0, 1.0, scales)


def _as_scalar(ratio: Ratio) -> Ratio:
    # One of shape [1] would give the scale of a single token a dimension.
    return ratio.reshape(()) if isinstance(ratio, Tensor) else ratio


def dynamic_quantize(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: ClipRatio = 1.0,
    pack_int32: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """:func:`transform`, then :func:`quantize`, then packing if asked for.

    Returns:
        int8 codes ``[..., features]``, or int32 words ``[..., features / 8]`` with ``pack_int32``,
        and float32 scales ``[...]``.
    """
    return dynamic_quantize_many(
        input_tensor, left_trans, right_trans, [clip_ratio], pack_int32, compute_dtype
    )[0]


def dynamic_quantize_many(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratios: Sequence[ClipRatio],
    pack_int32: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """One :func:`transform`, quantised with each of the clip ratios.

    Returns:
        What :func:`dynamic_quantize` gives, for each clip ratio.
    """
    transformed = transform(input_tensor, left_trans, right_trans, compute_dtype)
    outputs = [quantize(transformed, clip_ratio) for clip_ratio in clip_ratios]
    return [(pack_int4(codes) if pack_int32 else codes, scales) for codes, scales in outputs]
