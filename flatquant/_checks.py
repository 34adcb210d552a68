"""Argument checks of the public functions and of the operator's CPU and fake implementations.

Every message names the argument, what it must be and what it was.
"""

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: A number, or one float32 on the input's device.
Ratio = float | Tensor
#: For values above 0 and for values below.
ClipPair = tuple[Ratio, Ratio]
#: One ratio for both sides, or a pair.
ClipRatio = Ratio | ClipPair

# clip_ratio is used as float32: outside these bounds it would become 0 or Inf there.
_SMALLEST_CLIP_RATIO = 2.0**-149
_LARGEST_CLIP_RATIO = torch.finfo(torch.float32).max


def check_problem(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    pack_int32: bool,
) -> tuple[int, int]:
    """Check what every function takes; the factor sizes ``(M, N)`` if it is right.

    The size of a missing factor follows from the other; ``(0, 0)`` if both are missing.
    """
    check_tensor("input_tensor", input_tensor)
    dtype, shape = input_tensor.dtype, input_tensor.shape
    if dtype not in DTYPES:
        raise TypeError(f"input_tensor must be float16, bfloat16 or float32, got {dtype}")
    device = input_tensor.device
    M = 0 if left_trans is None else _check_factor("left_trans", left_trans, dtype, device)
    N = 0 if right_trans is None else _check_factor("right_trans", right_trans, dtype, device)
    features = shape[-1] if shape else 0
    if M and N:
        if features != M * N:
            raise ValueError(
                f"input_tensor must have M * N = {M} * {N} = {M * N} features in its last "
                f"dimension, from left_trans [{M}, {M}] and right_trans [{N}, {N}], "
                f"got shape {tuple(shape)}"
            )
    elif size := M or N:
        if features == 0 or features % size != 0:
            name = "left_trans" if M else "right_trans"
            raise ValueError(
                f"input_tensor must have a multiple of {size} features in its last dimension, "
                f"at least {size}, from {name} [{size}, {size}], got shape {tuple(shape)}"
            )
        M, N = M or features // size, N or features // size
    elif features == 0:
        raise ValueError(
            "input_tensor must have at least one feature in its last dimension, "
            f"got shape {tuple(shape)}"
        )
    if not input_tensor.is_contiguous() and row_stride(input_tensor) is None:
        raise ValueError(
            "input_tensor must have contiguous features and one stride between tokens, "
            f"got shape {tuple(shape)} with strides {input_tensor.stride()}: call .contiguous()"
        )
    check_flag("pack_int32", pack_int32)
    if pack_int32 and features % 8 != 0:
        raise ValueError(f"pack_int32=True needs features that are a multiple of 8, got {features}")
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


def check_int(name: str, value: int) -> None:
    """``value`` must be an int, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def check_float(name: str, tensor: Tensor) -> None:
    """``tensor`` must be a dense tensor of a floating-point dtype."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")


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


def check_transform(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[int, int]:
    """:func:`check_problem` for a transform alone, which needs a factor."""
    sizes = check_problem(input_tensor, left_trans, right_trans, pack_int32=False)
    if left_trans is None and right_trans is None:
        raise ValueError("left_trans and right_trans must not both be None, got None and None")
    check_out_dtype(out_dtype)
    return sizes


def check_out_dtype(out_dtype: torch.dtype) -> None:
    """``out_dtype`` must be one that the kernels store."""
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in DTYPES:
        raise TypeError(f"out_dtype must be torch.float16, bfloat16 or float32, got {out_dtype!r}")


def as_pair(clip_ratio: ClipRatio) -> ClipPair:
    return clip_ratio if isinstance(clip_ratio, tuple) else (clip_ratio, clip_ratio)


def check_clip_ratio(name: str, clip_ratio: ClipRatio, device: torch.device) -> ClipPair:
    """``clip_ratio`` must be a ratio or a tuple of two; the pair, its numbers as floats."""
    if not isinstance(clip_ratio, tuple):
        ratio = check_ratio(name, clip_ratio, device)
        return ratio, ratio
    if len(clip_ratio) != 2:
        raise ValueError(
            f"{name} must be one ratio or the pair (max side, min side), got {len(clip_ratio)}"
        )
    max_ratio, min_ratio = clip_ratio
    return check_ratio(name, max_ratio, device), check_ratio(name, min_ratio, device)


def check_ratio(name: str, ratio: Ratio, device: torch.device) -> Ratio:
    """A number must be real, finite and > 0 as float32; a tensor one float32 on ``device``."""
    if type(ratio) is not float:  # the usual case is the cheap one
        if isinstance(ratio, Tensor):
            check_tensor(name, ratio)
            if ratio.dtype is not torch.float32 or ratio.numel() != 1:
                wrong = ValueError if ratio.dtype is torch.float32 else TypeError
                raise wrong(
                    f"{name} must hold one torch.float32 where it is a tensor, "
                    f"got {ratio.dtype} of shape {tuple(ratio.shape)}"
                )
            if ratio.device != device:
                raise ValueError(
                    f"{name} must be on the device of input_tensor, {device}, got {ratio.device}"
                )
            return ratio
        if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
            raise TypeError(
                f"{name} must be a real number, a float32 tensor or a tuple of two such, "
                f"got {ratio!r} of type {type(ratio).__name__}"
            )
    # NaN fails both comparisons.
    if not _SMALLEST_CLIP_RATIO <= ratio <= _LARGEST_CLIP_RATIO:
        raise ValueError(f"{name} must be finite and > 0 in float32, got {ratio!r}")
    return ratio if type(ratio) is float else float(ratio)
