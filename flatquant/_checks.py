"""Argument checks of the public functions and of the operator's CPU and fake implementations.

Every message names the argument, what it must be and what it was.
"""

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# clip_ratio is used as float32: outside these bounds it would become 0 or Inf there.
_SMALLEST_CLIP_RATIO = 2.0**-149
_LARGEST_CLIP_RATIO = torch.finfo(torch.float32).max


def check_problem(
    input_tensor: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float,
    pack_int32: bool,
) -> tuple[int, int]:
    """Check the arguments of one quantisation; the factor sizes ``(M, N)`` if they are right."""
    check_tensor("input_tensor", input_tensor)
    dtype, shape = input_tensor.dtype, input_tensor.shape
    if dtype not in DTYPES:
        raise TypeError(f"input_tensor must be float16, bfloat16 or float32, got {dtype}")
    M = _check_factor("left_trans", left_trans, dtype, input_tensor.device)
    N = _check_factor("right_trans", right_trans, dtype, input_tensor.device)
    features = M * N
    if not shape or shape[-1] != features:
        raise ValueError(
            f"input_tensor must have M * N = {M} * {N} = {features} features in its last "
            f"dimension, from left_trans [{M}, {M}] and right_trans [{N}, {N}], "
            f"got shape {tuple(shape)}"
        )
    if not input_tensor.is_contiguous() and row_stride(input_tensor) is None:
        raise ValueError(
            "input_tensor must have contiguous features and one stride between tokens, "
            f"got shape {tuple(shape)} with strides {input_tensor.stride()}: call .contiguous()"
        )
    check_clip_ratio(clip_ratio)
    check_flag("pack_int32", pack_int32)
    if pack_int32 and features % 8 != 0:
        raise ValueError(
            f"pack_int32=True needs features that are a multiple of 8, got {M} * {N} = {features}"
        )
    return M, N


def check_tensor(name: str, tensor: Tensor) -> None:
    """``tensor`` must be a dense torch.Tensor: no sparse, nested or otherwise opaque layout."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got a {kind} one")


def check_flag(name: str, value: bool) -> None:
    """``value`` must be a bool: a tensor has no truth value, and any string would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def _check_factor(name: str, factor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    check_tensor(name, factor)
    if factor.dtype is not dtype:
        raise TypeError(f"{name} must have the dtype of input_tensor, {dtype}, got {factor.dtype}")
    if factor.device != device:
        raise ValueError(
            f"{name} must be on the device of input_tensor, {device}, got {factor.device}"
        )
    shape = factor.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(shape)}")
    if not factor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {factor.stride()}: call .contiguous()"
        )
    return shape[0]


def row_stride(tensor: Tensor) -> int | None:
    """Elements from one token to the next, or None if ``[..., features]`` has no one such stride.

    A dimension of size 1 has no say, as in torch's own notion of contiguity.
    """
    features = tensor.shape[-1]
    if tensor.is_contiguous():
        return features
    *steps, last = tensor.stride()
    if last != 1 and features != 1:
        return None
    row, following = features, None
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(steps), strict=True):
        if size == 1:
            continue
        if following is None:
            row = step
        elif step != following:
            return None
        following = size * step
    return row


def check_clip_ratio(clip_ratio: float) -> None:
    """``clip_ratio`` must be a real number, finite and > 0 as float32."""
    if type(clip_ratio) is not float and (
        isinstance(clip_ratio, bool) or not isinstance(clip_ratio, numbers.Real)
    ):
        raise TypeError(
            f"clip_ratio must be a real number, got {clip_ratio!r} "
            f"of type {type(clip_ratio).__name__}"
        )
    # NaN fails both comparisons.
    if not _SMALLEST_CLIP_RATIO <= clip_ratio <= _LARGEST_CLIP_RATIO:
        raise ValueError(f"clip_ratio must be finite and > 0 in float32, got {clip_ratio!r}")
