"""``torch.ops.flatquant``: the compiled extension if there is one, and what Python adds to it.

The extension is a plain shared library that registers its schemas and CUDA implementations through
torch's stable ABI when it is loaded. Without it, the schema is defined here, so that the operator
exists on every machine. The CPU and fake implementations are always added here.
"""

from pathlib import Path

import torch
from torch import Tensor

from . import reference
from ._checks import check_problem

EXTENSION = Path(__file__).with_name("_C.abi3.so")

# The same strings as in csrc/torch_ops.cpp; a test compares them. kernel_name is `kernel` in the
# public functions: Inductor passes operator arguments on by keyword and has a `kernel` of its own.
SCHEMAS = {
    "dynamic_quantize": (
        "dynamic_quantize(Tensor input, Tensor left_trans, Tensor right_trans, "
        "float clip_ratio=1.0, bool pack_int32=False, "
        'str kernel_name="auto") -> (Tensor, Tensor)'
    ),
    "kernel_names": ("kernel_names(int M, int N, ScalarType dtype, int compute_capability) -> str"),
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


def _dynamic_quantize_cpu(
    input: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    kernel_name: str = "auto",
) -> tuple[Tensor, Tensor]:
    check_problem(input, left_trans, right_trans, clip_ratio, pack_int32)
    if kernel_name not in ("auto", "reference"):
        raise ValueError(
            f"kernel_name must be 'auto' or 'reference' for CPU tensors, got {kernel_name!r}"
        )
    return reference.dynamic_quantize(input, left_trans, right_trans, clip_ratio, pack_int32)


def _dynamic_quantize_fake(
    input: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float = 1.0,
    pack_int32: bool = False,
    kernel_name: str = "auto",
) -> tuple[Tensor, Tensor]:
    check_problem(input, left_trans, right_trans, clip_ratio, pack_int32)
    *tokens, features = input.shape
    if pack_int32:
        quantized = input.new_empty((*tokens, features // 8), dtype=torch.int32)
    else:
        quantized = input.new_empty((*tokens, features), dtype=torch.int8)
    return quantized, input.new_empty(tokens, dtype=torch.float32)


LOAD_ERROR = load_extension(EXTENSION)
EXTENSION_LOADED = LOAD_ERROR is None

# Registrations live as long as this object.
_LIBRARY = torch.library.Library("flatquant", "FRAGMENT")  # type: ignore[no-untyped-call]
if not EXTENSION_LOADED:
    _LIBRARY.define(SCHEMAS["dynamic_quantize"])  # type: ignore[no-untyped-call]
_LIBRARY.impl("dynamic_quantize", _dynamic_quantize_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("flatquant::dynamic_quantize", _dynamic_quantize_fake, lib=_LIBRARY)

CUDA_ARCHS: tuple[str, ...] = (
    tuple(torch.ops.flatquant.cuda_archs().split(";")) if EXTENSION_LOADED else ()
)
