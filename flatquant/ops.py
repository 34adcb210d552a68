"""The public functions: they check their arguments, what they call trusts them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import (
    DTYPES,
    ClipPair,
    check_clip_ratio,
    check_flag,
    check_int,
    check_out_dtype,
    check_problem,
    check_tensor,
    check_transform,
    row_stride,
)
from ._checks import ClipRatio as ClipRatio
from ._library import EXTENSION_LOADED, LOAD_ERROR, MAX_OUTPUTS
from .packing import unpack_int4

#: The compiled extension is loaded and torch sees a CUDA device.
CUDA_AVAILABLE: bool = EXTENSION_LOADED and torch.cuda.is_available()

# Bytes to which a kernel needs every token of the input and both factors aligned, where it needs
# more than the dtype's own size. "auto" knows this by itself; a forced kernel is checked here.
_ALIGNMENT = {"sm90": 16}

_dynamic_quantize = torch.ops.flatquant.dynamic_quantize.default
_dynamic_quantize_many = torch.ops.flatquant.dynamic_quantize_many.default
_kronecker_transform = torch.ops.flatquant.kronecker_transform.default


def flatquant_dynamic_quantize(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: ClipRatio = 1.0,
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
    codes 0 and scale NaN or +Inf. There is no gradient. torch.autocast casts no argument. float32
    products follow ``torch.get_float32_matmul_precision()`` as it is at the call.

    FlatQuant's learned clipping has a ratio for either side, as in ``clip_ratio=(0.9, 0.8)``::

        scale = max(max_ratio * max(Y, 0), min_ratio * max(-Y, 0)) / 7

    Args:
        input_tensor: ``[..., features]``, ``features = M * N``, float16, bfloat16 or float32. The
            rows may be strided, as in a slice of a wider tensor; they are read without a copy.
        left_trans: ``[M, M]``, contiguous, dtype and device of the input; None: ``Y = X @
            right_trans``.
        right_trans: ``[N, N]``, contiguous, dtype and device of the input; None: ``Y =
            left_trans^T @ X``. Without either factor Y is X, of any number of features.
        clip_ratio: share of max|Y| that the largest code stands for, or a tuple of the shares of
            the largest value and of the smallest. Each is a number, finite and > 0; or one
            float32 in a tensor on the input's device, which the kernel reads: the call waits for
            nothing, and a CUDA graph follows it. Its value is not checked: if it is not finite
            and > 0, the token's codes and scale are unspecified.
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
    M, N = check_problem(input_tensor, left_trans, right_trans, pack_int32)
    pair = check_clip_ratio("clip_ratio", clip_ratio, input_tensor.device)
    named = None if type(clip_ratio) is float else {"clip_ratio": clip_ratio}
    _refuse_gradients(input_tensor, left_trans, right_trans, named)
    if _runs_reference(use_cuda, kernel, input_tensor, left_trans, right_trans, M, N):
        return reference.dynamic_quantize(input_tensor, left_trans, right_trans, pair, pack_int32)
    if left_trans is None or right_trans is None or isinstance(clip_ratio, (tuple, Tensor)):
        return _run_many(input_tensor, left_trans, right_trans, [pair], pack_int32, kernel)[0]
    result: tuple[Tensor, Tensor] = _dynamic_quantize(
        input_tensor,
        left_trans,
        right_trans,
        pair[0],
        pack_int32,
        kernel,
        _float32_precision(input_tensor.dtype),
    )
    return result


def flatquant_dynamic_quantize_many(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratios: Sequence[ClipRatio],
    pack_int32: bool = False,
    use_cuda: bool = True,
    *,
    kernel: str = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """Quantise one transform of each token with several clip ratios: one read of the input.

    The inputs of a model's q, k and v projections, and of its gate and up, share their transform
    and differ in what FlatQuant has learned to clip.

    Args:
        clip_ratios: as ``clip_ratio`` of :func:`flatquant_dynamic_quantize`, one or more:
            ``(0.9, 0.8)`` is two outputs, not one of a pair. One kernel serves up to 8 different
            ones, more take further calls of it.
        input_tensor, left_trans, right_trans, pack_int32, use_cuda, kernel: as there.

    Returns:
        ``(quantized, scales)`` as there for each clip ratio. Equal ones, which are equal numbers or
        the same tensors, share one result: the same two tensors are then at both places.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as there; ValueError for no clip
            ratio.
    """
    M, N = check_problem(input_tensor, left_trans, right_trans, pack_int32)
    if not isinstance(clip_ratios, (list, tuple)):
        raise TypeError(
            f"clip_ratios must be a list or tuple, got {clip_ratios!r} "
            f"of type {type(clip_ratios).__name__}"
        )
    if len(clip_ratios) == 0:
        raise ValueError("clip_ratios must hold at least one clip ratio, got none")
    named = {f"clip_ratios[{i}]": clip_ratio for i, clip_ratio in enumerate(clip_ratios)}
    pairs: list[ClipPair] = []  # the different ones
    places = []
    for name, clip_ratio in named.items():
        pair = check_clip_ratio(name, clip_ratio, input_tensor.device)
        place = 0
        while place < len(pairs) and not _are_same(pair, pairs[place]):
            place += 1
        if place == len(pairs):
            pairs.append(pair)
        places.append(place)
    _refuse_gradients(input_tensor, left_trans, right_trans, named)
    if _runs_reference(use_cuda, kernel, input_tensor, left_trans, right_trans, M, N):
        outputs = reference.dynamic_quantize_many(
            input_tensor, left_trans, right_trans, pairs, pack_int32
        )
    else:
        outputs = _run_many(input_tensor, left_trans, right_trans, pairs, pack_int32, kernel)
    return [outputs[place] for place in places]


def kronecker_transform(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    out_dtype: torch.dtype | None = None,
    use_cuda: bool = True,
    *,
    kernel: str = "auto",
) -> Tensor:
    """The transform alone: ``Y = left_trans^T @ X @ right_trans`` of each token, rounded once.

    By the kernels that quantise, with their sums in float32. For 16-bit inputs the intermediate
    between the two products is rounded as in quantising, so Y is what is quantised there. With one
    factor there is no intermediate.

    Args:
        input_tensor, use_cuda, kernel: as in :func:`flatquant_dynamic_quantize`.
        left_trans, right_trans: as there, but one of them must be given.
        out_dtype: float16, bfloat16 or float32; the input's dtype by default. Values past the
            largest float16 become Inf.

    Returns:
        Y, ``[..., features]``, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in
            :func:`flatquant_dynamic_quantize`.
    """
    if out_dtype is None and isinstance(input_tensor, Tensor):
        out_dtype = input_tensor.dtype
    M, N = check_transform(input_tensor, left_trans, right_trans, out_dtype)
    _refuse_gradients(input_tensor, left_trans, right_trans)
    if _runs_reference(use_cuda, kernel, input_tensor, left_trans, right_trans, M, N):
        return reference.transform(input_tensor, left_trans, right_trans).to(out_dtype)
    precision = _float32_precision(input_tensor.dtype)
    result: Tensor = _kronecker_transform(
        input_tensor, left_trans, right_trans, out_dtype, kernel, precision
    )
    return result


def fake_quantize(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratio: ClipRatio = 1.0,
    *,
    invert: bool = False,
    out_dtype: torch.dtype | None = None,
    use_cuda: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """Transform, quantise and dequantise: what int4 leaves of the input, for evaluation.

    Args:
        input_tensor, left_trans, right_trans, clip_ratio, use_cuda, kernel: as in
            :func:`flatquant_dynamic_quantize`.
        invert: undo the transform afterwards, so that the result is near the input, not near Y.
            PyTorch inverts the factors in float64 and applies them in float32; on CUDA that waits
            for the device.
        out_dtype: float16, bfloat16 or float32; the input's dtype by default.

    Returns:
        ``[..., features]``. All NaN for a token whose scale is NaN or Inf.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as there; ValueError for a factor
            that has no inverse if one is asked for.
    """
    check_flag("invert", invert)
    if out_dtype is not None:
        check_out_dtype(out_dtype)
    quantized, scales = flatquant_dynamic_quantize(
        input_tensor, left_trans, right_trans, clip_ratio, use_cuda=use_cuda, kernel=kernel
    )
    values = dequantize_int4(quantized, scales)
    if invert:
        # X = left^-T @ Y @ right^-1
        values = reference.transform(
            values, _inverse("left_trans", left_trans), _inverse("right_trans", right_trans)
        )
    return values.to(input_tensor.dtype if out_dtype is None else out_dtype)


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
        M: size of the left factor, >= 1; if it is missing, features / N.
        N: size of the right factor, >= 1; if it is missing, features / M. M = N = 0 asks for the
            kernels without either factor.
        dtype: float16, bfloat16 or float32, for which the answer may depend on
            ``torch.get_float32_matmul_precision()``.
        device: the current CUDA device by default, the CPU if ``CUDA_AVAILABLE`` is False.

    Returns:
        Names for ``kernel=``; the last is always "reference".

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: M or N < 1 but not both 0, or a device that does not exist.
    """
    for name, size in (("M", M), ("N", N)):
        check_int(name, size)
        if size < 1 and not (M == 0 and N == 0):
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float16, bfloat16 or float32, got {dtype!r}")
    if device is None:
        device = "cuda" if CUDA_AVAILABLE else "cpu"
    device = _as_device(device)
    if device.type != "cuda" or not CUDA_AVAILABLE:
        return ["reference"]
    if not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device must be one of {torch.cuda.device_count()}, got {device}")
    if max(M, N) >= 2**31:  # more than the operator's integers hold, or any kernel serves
        return ["reference"]
    major, minor = torch.cuda.get_device_capability(device)
    names = torch.ops.flatquant.kernel_names(
        M, N, dtype, 10 * major + minor, _float32_precision(dtype)
    )
    return [*(names.split(",") if names else []), "reference"]


def _as_device(device: torch.device | str | int) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(
            f"device must be a torch.device, str or int, got {device!r} "
            f"of type {type(device).__name__}"
        )
    try:
        named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if isinstance(device, int) and named.index != device:  # torch keeps eight bits
            raise ValueError("there is no such index")
        return named
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device must name a device of torch, got {device!r}: {error}") from None


def _are_same(a: ClipPair, b: ClipPair) -> bool:
    # Tensors by identity: comparing values would wait for the device.
    return all(
        x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def _inverse(name: str, factor: Tensor | None) -> Tensor | None:
    try:
        return None if factor is None else torch.linalg.inv(factor.double())
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"{name} must have an inverse with invert=True: {error}") from None


def _refuse_gradients(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratios: Mapping[str, ClipRatio] | None = None,
) -> None:
    if not torch.is_grad_enabled() or not (
        clip_ratios
        or input_tensor.requires_grad
        or (left_trans is not None and left_trans.requires_grad)
        or (right_trans is not None and right_trans.requires_grad)
    ):
        return  # the usual call, cheaply
    arguments: dict[str, object] = {
        "input_tensor": input_tensor,
        "left_trans": left_trans,
        "right_trans": right_trans,
    }
    for name, clip_ratio in (clip_ratios or {}).items():
        if isinstance(clip_ratio, tuple):
            arguments[f"{name}[0]"], arguments[f"{name}[1]"] = clip_ratio
        else:
            arguments[name] = clip_ratio
    wrong = [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.requires_grad
    ]
    if wrong:
        raise NotImplementedError(
            f"{' and '.join(wrong)} must not require a gradient, for there is none: "
            f"call under torch.no_grad(), or pass {wrong[0]}.detach()"
        )


def _allows_tf32() -> bool:
    # What torch.set_float32_matmul_precision and its successors all set.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes most
# of a second. torch.compile guards every graph by this setting; a test changes it.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _float32_precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "highest"
    return "high" if _allows_tf32() else "highest"


def _runs_reference(
    use_cuda: bool,
    kernel: str,
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    M: int,
    N: int,
) -> bool:
    """Whether the reference is asked for; if not, an operator can run, or this raises."""
    check_flag("use_cuda", use_cuda)
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a str, got {kernel!r} of type {type(kernel).__name__}")
    if not use_cuda or kernel == "reference":
        if kernel not in ("auto", "reference"):
            raise ValueError(
                f"kernel must be 'auto' or 'reference' with use_cuda=False, got {kernel!r}"
            )
        return True
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
        _check_kernel(kernel, input_tensor, left_trans, right_trans, M, N)
    return False


def _run_many(
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    pairs: Sequence[ClipPair],
    pack_int32: bool,
    kernel: str,
) -> list[tuple[Tensor, Tensor]]:
    """The operator, as often as its largest number of outputs needs."""
    precision = _float32_precision(input_tensor.dtype)
    outputs: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(pairs), MAX_OUTPUTS):
        ratios = [ratio for pair in pairs[start : start + MAX_OUTPUTS] for ratio in pair]
        # Of a ratio on the device, 0 keeps the place.
        numbers = [0.0 if isinstance(ratio, Tensor) else ratio for ratio in ratios]
        on_device = [ratio for ratio in ratios if isinstance(ratio, Tensor)]
        flat = _dynamic_quantize_many(
            input_tensor, left_trans, right_trans, numbers, on_device, pack_int32, kernel, precision
        )
        outputs += zip(flat[::2], flat[1::2], strict=True)
    return outputs


def _check_kernel(
    kernel: str,
    input_tensor: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    M: int,
    N: int,
) -> None:
    names = available_kernels(M, N, input_tensor.dtype, input_tensor.device)
    if kernel not in names:
        dtype = input_tensor.dtype
        precision = f" at precision {_float32_precision(dtype)}" if dtype == torch.float32 else ""
        raise ValueError(
            f"kernel must be 'auto' or one of {names} for M={M}, N={N}, {dtype}{precision} on "
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
        if factor is not None and factor.data_ptr() % alignment != 0:
            raise ValueError(
                f"kernel={kernel!r} needs {name} aligned to {alignment} bytes, got an address "
                f"{factor.data_ptr() % alignment} bytes off: call .clone(), or pass kernel='auto'"
            )
