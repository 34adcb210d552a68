"""The public functions: they check their arguments, what they call trusts them."""

import torch
from torch import Tensor

from . import reference
from ._checks import DTYPES, check_flag, check_problem, check_tensor, row_stride
from ._library import EXTENSION_LOADED, LOAD_ERROR
from .packing import unpack_int4

#: The compiled extension is loaded and torch sees a CUDA device.
CUDA_AVAILABLE: bool = EXTENSION_LOADED and torch.cuda.is_available()

# Bytes to which a kernel needs every token of the input and both factors aligned, where it needs
# more than the dtype's own size. "auto" knows this by itself; a forced kernel is checked here.
_ALIGNMENT = {"sm90": 16}

_dynamic_quantize = torch.ops.flatquant.dynamic_quantize.default


def flatquant_dynamic_quantize(
    input_tensor: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    use_cuda: bool = True,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Transform each token by two factors and quantise it to int4 with its own scale.

    For a token seen as X [M, N], row-major::

        Y = left_trans^T @ X @ right_trans
        scale = clip_ratio * max|Y| / 7
        q = clamp(round_half_even(Y / scale), -8, 7)

    which is FlatQuant's online transform and per-token quantisation (Sun et al., 2024,
    arXiv:2410.09426). A token of zeros gets codes 0 and scale 1; one whose Y holds NaN or Inf gets
    codes 0 and scale NaN or +Inf. There is no gradient. torch.autocast casts no argument.

    Args:
        input_tensor: ``[..., features]``, ``features = M * N``, float16, bfloat16 or float32. The
            rows may be strided, as in a slice of a wider tensor; they are read without a copy.
        left_trans: ``[M, M]``, contiguous, dtype and device of the input.
        right_trans: ``[N, N]``, contiguous, dtype and device of the input.
        clip_ratio: share of max|Y| that the largest code stands for; finite, > 0.
        pack_int32: pack eight codes into one int32 word, element 8i+j in bits 4j..4j+3 of word i;
            ``features`` must be a multiple of 8.
        use_cuda: run a CUDA kernel on CUDA tensors; False runs the reference in plain PyTorch on
            the tensors' own device.
        kernel: "auto", or one of :func:`available_kernels` for this problem.

    Returns:
        ``(quantized, scales)``: int8 ``[..., features]`` or int32 ``[..., features / 8]``, and
        float32 ``[...]``.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, stride, device or clip_ratio, features that cannot be packed,
            or a kernel that is unknown or cannot serve this problem.
        NotImplementedError: a tensor requires a gradient while gradients are recorded.
        RuntimeError: ``use_cuda=True`` without the compiled extension, or a CUDA error.
    """
    check_problem(input_tensor, left_trans, right_trans, clip_ratio, pack_int32)
    check_flag("use_cuda", use_cuda)
    if torch.is_grad_enabled() and (
        input_tensor.requires_grad or left_trans.requires_grad or right_trans.requires_grad
    ):
        _refuse_gradients(input_tensor, left_trans, right_trans)
    if type(clip_ratio) is not float:
        clip_ratio = float(clip_ratio)
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a str, got {kernel!r} of type {type(kernel).__name__}")
    if not use_cuda or kernel == "reference":
        if kernel not in ("auto", "reference"):
            raise ValueError(
                f"kernel must be 'auto' or 'reference' with use_cuda=False, got {kernel!r}"
            )
        return reference.dynamic_quantize(
            input_tensor, left_trans, right_trans, clip_ratio, pack_int32
        )
    if input_tensor.device.type != "cuda":
        raise ValueError(
            f"input_tensor must be on a CUDA device with use_cuda=True, got {input_tensor.device}: "
            "move the tensors to CUDA, or pass use_cuda=False to run the reference"
        )
    if not EXTENSION_LOADED:
        raise RuntimeError(
            f"use_cuda=True needs flatquant's compiled extension, which is not loaded: "
            f"{LOAD_ERROR}. Build it with ./scripts/build.sh in a checkout, or pip install a wheel "
            "that holds it; use_cuda=False runs the reference"
        )
    # While torch.compile traces, the operator itself is left to refuse an unfit kernel.
    if kernel != "auto" and not torch.compiler.is_compiling():
        _check_kernel(kernel, input_tensor, left_trans, right_trans)
    result: tuple[Tensor, Tensor] = _dynamic_quantize(
        input_tensor, left_trans, right_trans, clip_ratio, pack_int32, kernel
    )
    return result


def dequantize_int4(
    quantized: Tensor,
    scales: Tensor,
    packed_int32: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``q * scale`` in the transformed basis, computed in float32.

    Args:
        quantized: int8 codes ``[..., features]``, or int32 words ``[..., features / 8]`` if packed.
        scales: float32 ``[...]``.
        packed_int32: whether ``quantized`` is packed.
        dtype: floating-point dtype of the result.

    Returns:
        ``[..., features]``. All NaN for a token whose scale is NaN or Inf.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
    """
    check_tensor("quantized", quantized)
    check_tensor("scales", scales)
    check_flag("packed_int32", packed_int32)
    storage = torch.int32 if packed_int32 else torch.int8
    if quantized.dtype != storage:
        raise TypeError(
            f"quantized must be {storage} with packed_int32={packed_int32}, got {quantized.dtype}"
        )
    if scales.dtype != torch.float32:
        raise TypeError(f"scales must be torch.float32, got {scales.dtype}")
    if scales.device != quantized.device:
        raise ValueError(
            f"scales must be on the device of quantized, {quantized.device}, got {scales.device}"
        )
    if quantized.dim() == 0 or scales.shape != quantized.shape[:-1]:
        raise ValueError(
            "scales must have the shape of quantized without its last dimension, "
            f"got scales {tuple(scales.shape)} for quantized {tuple(quantized.shape)}"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    codes = unpack_int4(quantized) if packed_int32 else quantized
    return (codes.to(torch.float32) * scales.unsqueeze(-1)).to(dtype)


def available_kernels(
    M: int, N: int, dtype: torch.dtype, device: torch.device | str | int | None = None
) -> list[str]:
    """The kernels that can serve factors [M, M] and [N, N] on a device, best first.

    Args:
        M: size of the left factor, >= 1.
        N: size of the right factor, >= 1.
        dtype: float16, bfloat16 or float32.
        device: the current CUDA device by default, the CPU if ``CUDA_AVAILABLE`` is False.

    Returns:
        Names for ``kernel=``; the last is always "reference".

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: M or N < 1, or a device that does not exist.
    """
    for name, size in (("M", M), ("N", N)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r} of type {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float16, bfloat16 or float32, got {dtype!r}")
    if device is None:
        device = "cuda" if CUDA_AVAILABLE else "cpu"
    device = _as_device(device)
    if device.type != "cuda" or not CUDA_AVAILABLE:
        return ["reference"]
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of {torch.cuda.device_count()}, got {device}")
    if max(M, N) >= 2**31:  # more than the operator's integers hold, or any kernel serves
        return ["reference"]
    major, minor = torch.cuda.get_device_capability(device)
    names = torch.ops.flatquant.kernel_names(M, N, dtype, 10 * major + minor)
    return [*(names.split(",") if names else []), "reference"]


def _as_device(device: torch.device | str | int) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(
            f"device must be a torch.device, str or int, got {device!r} "
            f"of type {type(device).__name__}"
        )
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device must name a device of torch, got {device!r}: {error}") from None


def _refuse_gradients(*tensors: Tensor) -> None:
    names = ("input_tensor", "left_trans", "right_trans")
    wrong = [name for name, tensor in zip(names, tensors, strict=True) if tensor.requires_grad]
    raise NotImplementedError(
        f"{' and '.join(wrong)} must not require a gradient, for quantising has none: "
        f"call under torch.no_grad(), or pass {wrong[0]}.detach()"
    )


def _check_kernel(
    kernel: str, input_tensor: Tensor, left_trans: Tensor, right_trans: Tensor
) -> None:
    M, N = left_trans.shape[0], right_trans.shape[0]
    names = available_kernels(M, N, input_tensor.dtype, input_tensor.device)
    if kernel not in names:
        raise ValueError(
            f"kernel must be 'auto' or one of {names} for M={M}, N={N}, {input_tensor.dtype} on "
            f"{torch.cuda.get_device_name(input_tensor.device)}, got {kernel!r}"
        )
    alignment = _ALIGNMENT.get(kernel, 1)
    step = row_stride(input_tensor)
    assert step is not None, "checked by check_problem"
    pitch = step * input_tensor.element_size()
    if input_tensor.data_ptr() % alignment != 0 or pitch % alignment != 0:
        raise ValueError(
            f"kernel={kernel!r} needs every token of input_tensor aligned to {alignment} bytes, "
            f"got an address {input_tensor.data_ptr() % alignment} bytes off and {pitch} bytes "
            "from token to token: call .contiguous() or .clone(), or pass kernel='auto'"
        )
    for name, factor in (("left_trans", left_trans), ("right_trans", right_trans)):
        if factor.data_ptr() % alignment != 0:
            raise ValueError(
                f"kernel={kernel!r} needs {name} aligned to {alignment} bytes, got an address "
                f"{factor.data_ptr() % alignment} bytes off: call .clone(), or pass kernel='auto'"
            )
