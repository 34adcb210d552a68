"""``torch.ops.flatquant``: the compiled extension if there is one, and what Python adds to it.

The extension is a plain shared library that registers its schemas and CUDA implementations through
torch's stable ABI when it is loaded. Without it, the schema is defined here, so that the operator
exists on every machine. The CPU and fake implementations are always added here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from ._checks import (
    ClipPair,
    Ratio,
    check_clip_ratio,
    check_problem,
    check_ratio,
    check_transform,
)

# Outputs of one call of dynamic_quantize_many: max_outputs in csrc/problem.h.
MAX_OUTPUTS = 8

EXTENSION = Path(__file__).with_name("_C.abi3.so")

# The same strings as in csrc/torch_ops.cpp; a test compares them. kernel_name is `kernel` in the
# public functions: Inductor passes operator arguments on by keyword and has a `kernel` of its own.
SCHEMAS = {
    "dynamic_quantize": (
        "dynamic_quantize(Tensor input, Tensor left_trans, Tensor right_trans, "
        'float clip_ratio=1.0, bool pack_int32=False, str kernel_name="auto", '
        'str float32_precision="highest") -> (Tensor, Tensor)'
    ),
    "dynamic_quantize_many": (
        "dynamic_quantize_many(Tensor input, Tensor? left_trans, Tensor? right_trans, "
        "float[] clip_ratios, Tensor[] device_clip_ratios, bool pack_int32=False, "
        'str kernel_name="auto", str float32_precision="highest") -> Tensor[]'
    ),
    "kronecker_transform": (
        "kronecker_transform(Tensor input, Tensor? left_trans, Tensor? right_trans, "
        'ScalarType out_dtype, str kernel_name="auto", str float32_precision="highest") -> '
        "Tensor"
    ),
    "kernel_names": (
        "kernel_names(int M, int N, ScalarType dtype, int compute_capability, "
        'str float32_precision="highest") -> str'
    ),
    "cuda_archs": "cuda_archs() -> str",
}


def load_extension(path: Path) -> str | None:
    """Load the compiled extension; the reason if it is not loaded, else None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not path.exists():
        return f"{path} does not exist, so the package was installed without compiling it"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        # torch says only which file; the linker's message is the cause.
        return f"{path} does not load: {error.__cause__ or error}"
    return None


def _check_cpu_kernel(kernel_name: str, float32_precision: str) -> None:
    if kernel_name not in ("auto", "reference"):
        raise ValueError(
            f"kernel_name must be 'auto' or 'reference' for CPU tensors, got {kernel_name!r}"
        )
    if float32_precision not in ("highest", "high"):
        raise ValueError(
            f"float32_precision must be 'highest' or 'high', got {float32_precision!r}"
        )


def _empty_output(input: Tensor, pack_int32: bool) -> tuple[Tensor, Tensor]:
    *tokens, features = input.shape
    if pack_int32:
        quantized = input.new_empty((*tokens, features // 8), dtype=torch.int32)
    else:
        quantized = input.new_empty((*tokens, features), dtype=torch.int8)
    return quantized, input.new_empty(tokens, dtype=torch.float32)


def _dynamic_quantize_cpu(
    input: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> tuple[Tensor, Tensor]:
    check_problem(input, left_trans, right_trans, pack_int32)
    check_clip_ratio("clip_ratio", clip_ratio, input.device)
    _check_cpu_kernel(kernel_name, float32_precision)
    return reference.dynamic_quantize(input, left_trans, right_trans, clip_ratio, pack_int32)


def _dynamic_quantize_fake(
    input: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> tuple[Tensor, Tensor]:
    check_problem(input, left_trans, right_trans, pack_int32)
    check_clip_ratio("clip_ratio", clip_ratio, input.device)
    return _empty_output(input, pack_int32)


def _pairs(
    clip_ratios: Sequence[float], device_clip_ratios: Sequence[Tensor], device: torch.device
) -> list[ClipPair]:
    """The pairs, checked; a number of 0 stands for the next tensor."""
    count = len(clip_ratios)
    if count % 2 != 0 or not 2 <= count <= 2 * MAX_OUTPUTS:
        raise ValueError(f"clip_ratios must hold 1 to {MAX_OUTPUTS} pairs, got {count} numbers")
    on_device = sum(ratio == 0.0 for ratio in clip_ratios)
    if len(device_clip_ratios) != on_device:
        raise ValueError(
            f"device_clip_ratios must hold one for each 0 in clip_ratios, {on_device}, "
            f"got {len(device_clip_ratios)}"
        )
    tensors = iter(device_clip_ratios)
    ratios: list[Ratio] = [
        check_ratio("device_clip_ratios", next(tensors), device)
        if ratio == 0.0
        else check_ratio("clip_ratios", ratio, device)
        for ratio in clip_ratios
    ]
    return list(zip(ratios[::2], ratios[1::2], strict=True))


def _dynamic_quantize_many_cpu(
    input: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratios: Sequence[float],
    device_clip_ratios: Sequence[Tensor],
    pack_int32: bool = False,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> list[Tensor]:
    check_problem(input, left_trans, right_trans, pack_int32)
    pairs = _pairs(clip_ratios, device_clip_ratios, input.device)
    _check_cpu_kernel(kernel_name, float32_precision)
    outputs = reference.dynamic_quantize_many(input, left_trans, right_trans, pairs, pack_int32)
    return [tensor for output in outputs for tensor in output]


def _dynamic_quantize_many_fake(
    input: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    clip_ratios: Sequence[float],
    device_clip_ratios: Sequence[Tensor],
    pack_int32: bool = False,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> list[Tensor]:
    check_problem(input, left_trans, right_trans, pack_int32)
    pairs = _pairs(clip_ratios, device_clip_ratios, input.device)
    return [tensor for _ in pairs for tensor in _empty_output(input, pack_int32)]


def _kronecker_transform_cpu(
    input: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    out_dtype: torch.dtype,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> Tensor:
    check_transform(input, left_trans, right_trans, out_dtype)
    _check_cpu_kernel(kernel_name, float32_precision)
    return reference.transform(input, left_trans, right_trans).to(out_dtype)


def _kronecker_transform_fake(
    input: Tensor,
    left_trans: Tensor | None,
    right_trans: Tensor | None,
    out_dtype: torch.dtype,
    kernel_name: str = "auto",
    float32_precision: str = "highest",
) -> Tensor:
    check_transform(input, left_trans, right_trans, out_dtype)
    return input.new_empty(input.shape, dtype=out_dtype)


# The operators on tensors: their CPU and fake implementations.
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "dynamic_quantize": (_dynamic_quantize_cpu, _dynamic_quantize_fake),
    "dynamic_quantize_many": (_dynamic_quantize_many_cpu, _dynamic_quantize_many_fake),
    "kronecker_transform": (_kronecker_transform_cpu, _kronecker_transform_fake),
}

LOAD_ERROR = load_extension(EXTENSION)
EXTENSION_LOADED = LOAD_ERROR is None

# Registrations live as long as this object.
_LIBRARY = torch.library.Library("flatquant", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, (_cpu, _fake) in _IMPLEMENTATIONS.items():
    if not EXTENSION_LOADED:
        _LIBRARY.define(SCHEMAS[_name])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flatquant::{_name}", _fake, lib=_LIBRARY)

CUDA_ARCHS: tuple[str, ...] = (
    tuple(torch.ops.flatquant.cuda_archs().split(";")) if EXTENSION_LOADED else ()
)
