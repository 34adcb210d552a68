"""Activations to quantise, shipped and synthetic, and what quantising one of them gives.

Shared by the demo (`python -m flatquant`) and benchmarks/smollm2_activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .accuracy import compare
from .decompose import get_decompose_dim
from .ops import dequantize_int4, flatquant_dynamic_quantize

SHIPPED = Path(__file__).parent / "data" / "smollm2_135m.npz"
_FIELDS = ("input", "left_trans", "right_trans")


class LinearInput(NamedTuple):
    """What a linear layer receives, and the transform under which it is quantised."""

    name: str
    input: Tensor  # [tokens, M * N]
    left_trans: Tensor  # [M, M]
    right_trans: Tensor  # [N, N]

    def to(self, dtype: torch.dtype, device: torch.device) -> LinearInput:
        """The same with all three tensors cast to `dtype` and moved to `device`."""
        return LinearInput(self.name, *(tensor.to(device, dtype) for tensor in self[1:]))


def load(path: Path = SHIPPED) -> list[LinearInput]:
    """Reads the `<name>.input`, `.left_trans` and `.right_trans` arrays (float16) of an .npz file.

    Raises OSError, ValueError or KeyError if `path` is missing, is no .npz, or lacks an array.
    """
    with np.load(path, allow_pickle=False) as arrays:
        names = [key.removesuffix(".input") for key in arrays.files if key.endswith(".input")]
        return [
            LinearInput(name, *(torch.from_numpy(arrays[f"{name}.{field}"]) for field in _FIELDS))
            for name in names
        ]


def save(path: Path, inputs: Sequence[LinearInput]) -> None:
    """Writes what `load` reads, as compressed float16."""
    arrays = {
        f"{item.name}.{field}": getattr(item, field).to(torch.float16).numpy()
        for item in inputs
        for field in _FIELDS
    }
    np.savez_compressed(path, **arrays)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64: the QR of a Gaussian one, signs fixed."""
    gaussian = torch.randn(
        size, size, dtype=torch.float64, device=generator.device, generator=generator
    )
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = q * r.diagonal().sign()
    return rotation.contiguous()  # LAPACK's results are column-major


def synthetic(features: int, tokens: int, seed: int = 0) -> LinearInput:
    """Gaussian activations with a few channels 20 to 60 times larger, and orthogonal factors.

    One channel in 256 (at least one) is an outlier channel, as in the inputs of LLM linear layers.
    All tensors are float64. Raises ValueError if features < 1.
    """
    m, n = get_decompose_dim(features)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, dtype=torch.float64, generator=generator)
    outliers = torch.randperm(features, generator=generator)[: math.ceil(features / 256)]
    x[:, outliers] *= 20 + 40 * torch.rand(len(outliers), dtype=torch.float64, generator=generator)
    return LinearInput(
        f"synthetic {features}",
        x,
        random_orthogonal(m, generator),
        random_orthogonal(n, generator),
    )


@dataclass(frozen=True)
class Result:
    """One input, quantised by one kernel into one storage.

    Attributes:
        storage: "int8" or "int32", the dtype that holds the codes.
        mismatch: share of the codes that differ from the float64 codes.
        limit: the largest `mismatch` allowed.
        max_step: largest difference of a code.
        scale_error: largest relative error of a scale.
        sqnr_plain: SQNR of int4 rounding without the transform, see `plain_sqnr`.
        sqnr: SQNR of the result, brought back to the original basis, see `sqnr`.
        failures: what is wrong; empty if the result agrees with float64.
    """

    name: str
    tokens: int
    features: int
    M: int
    N: int
    dtype: str
    kernel: str
    storage: str
    mismatch: float
    limit: float
    max_step: int
    scale_error: float
    sqnr_plain: float
    sqnr: float
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def evaluate(item: LinearInput, kernels: Iterable[str]) -> list[Result]:
    """Quantises one input by each kernel into each storage that fits, and compares with float64.

    Runs on the device of the tensors of `item` and in their dtype. Raises what
    `flatquant_dynamic_quantize` raises for a kernel that is unknown or cannot serve the input.
    """
    x, left, right = item.input, item.left_trans, item.right_trans
    m, n = len(left), len(right)
    exact = reference.transform(x, left, right, torch.float64)
    plain = plain_sqnr(x)
    results = []
    for kernel in kernels:
        for pack_int32 in (False, True) if m * n % 8 == 0 else (False,):
            quantized, scales = flatquant_dynamic_quantize(
                x,
                left,
                right,
                pack_int32=pack_int32,
                use_cuda=kernel != "reference",
                kernel=kernel,
            )
            comparison = compare(quantized, scales, exact, 1.0, x.dtype)
            decoded = dequantize_int4(quantized, scales, pack_int32, torch.float64)
            results.append(
                Result(
                    name=item.name,
                    tokens=comparison.tokens,
                    features=comparison.features,
                    M=m,
                    N=n,
                    dtype=str(x.dtype).removeprefix("torch."),
                    kernel=kernel,
                    storage="int32" if pack_int32 else "int8",
                    mismatch=comparison.mismatch,
                    limit=comparison.tolerance.mismatch,
                    max_step=comparison.max_step,
                    scale_error=comparison.scale_error,
                    sqnr_plain=plain,
                    sqnr=sqnr(x, inverse_transform(decoded, left, right)),
                    failures=comparison.failures,
                )
            )
    return results


def inverse_transform(y: Tensor, left_trans: Tensor | None, right_trans: Tensor | None) -> Tensor:
    """`left_trans^-T @ Y @ right_trans^-1` for each token of y [tokens, M * N], in float64."""
    left, right = (
        None if factor is None else torch.linalg.inv(factor.double())
        for factor in (left_trans, right_trans)
    )
    return reference.transform(y, left, right, torch.float64)


def plain_sqnr(x: Tensor) -> float:
    """SQNR of int4 rounding of x [tokens, features] as it is, one scale per token, in float64."""
    codes, scales = reference.quantize(x.double())
    return sqnr(x, codes.double() * scales.double().unsqueeze(-1))


def sqnr(x: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB, the mean over the tokens [tokens, features].

    The mean is over each token's own ratio, so a token of huge norm does not decide it alone. An
    exact token counts as 160 dB, about what float64 resolves.
    """
    signal = x.double().square().sum(-1)
    noise = (x.double() - approximation.double()).square().sum(-1)
    return float((10 * torch.log10(signal / torch.maximum(noise, 1e-16 * signal))).mean())
