"""Running each kernel of this machine, for the tests; without a GPU the reference stands in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from problems import DTYPES, NO_GPU, Problem, dtype_name
from torch import Tensor

from flatquant import accuracy, available_kernels, flatquant_dynamic_quantize
from flatquant.packing import unpack_int4

DEVICE = "cpu" if NO_GPU else "cuda"

# One of each kind: multiples of 64 and of 8, tokens of which two or four share a tile, sizes that a
# tensor-core tile must pad on either side, a large factor, N no multiple of 8, nothing a multiple
# of anything.
KINDS = [
    (64, 64),
    (32, 64),
    (24, 24),
    (12, 16),
    (86, 128),
    (112, 128),
    (128, 224),
    (64, 104),
    (208, 256),
    (128, 148),
    (13, 17),
]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
by_kind = pytest.mark.parametrize("M, N", KINDS)

#: What the tests have run and compared, by name; printed after the last test.
COUNTS: Counter[str] = Counter()


def kernels(M: int, N: int, dtype: torch.dtype) -> list[str]:
    """The CUDA kernels for a problem, of which there is always one; the reference on the CPU."""
    names = available_kernels(M, N, dtype, DEVICE)
    assert names[-1] == "reference"
    if DEVICE == "cpu":
        return names
    assert len(names) > 1, "no CUDA kernel serves this problem"
    return names[:-1]


def storages(M: int, N: int) -> list[bool]:
    return [False, True] if M * N % 8 == 0 else [False]


def variants(M: int, N: int, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    for kernel in kernels(M, N, dtype):
        for pack_int32 in storages(M, N):
            yield kernel, pack_int32


def quantize(
    problem: Problem, kernel: str, pack_int32: bool = False, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Run a kernel on outputs that hold garbage, so that an element left out shows."""
    tokens = problem.input.shape[:-1]
    poison_outputs(math.prod(tokens), problem.input.shape[-1], pack_int32)
    COUNTS[f"calls of {kernel}"] += 1
    return call(problem, kernel, pack_int32, clip_ratio)


def call(
    problem: Problem, kernel: str, pack_int32: bool = False, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor]:
    use_cuda = problem.input.device.type == "cuda"
    return flatquant_dynamic_quantize(*problem, clip_ratio, pack_int32, use_cuda, kernel=kernel)


def poison_outputs(tokens: int, features: int, pack_int32: bool) -> None:
    """Fill with garbage the memory that the caching allocator hands out next for such outputs."""
    bytes_ = tokens * features // 2 if pack_int32 else tokens * features
    # The scales of large batches have one word more behind them (Problem::counter).
    sizes = (bytes_, 4 * tokens, 4 * (tokens + 1))
    blocks = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in sizes]
    for block in blocks:
        block.fill_(0x5A)


def tolerance_of(dtype: torch.dtype, M: int, N: int) -> accuracy.Tolerance:
    """The bound is for sums of up to 256 products; the error of longer ones walks on at random."""
    bound = accuracy.TOLERANCES[dtype]
    return replace(bound, transform=bound.transform * math.sqrt(max(M, N, 256) / 256))


def by_the_boundary_rule(result: accuracy.Comparison, clip_ratio: float) -> bool:
    """Whether each code and scale is allowed, whatever the number of codes that differ.

    For few elements, or tokens whose rounding errors are alike, that number says nothing.
    """
    tolerance = result.tolerance.transform
    return (
        result.max_step <= 1
        and result.max_distance <= 2 * 7 / clip_ratio * tolerance
        and result.scale_error <= tolerance
    )


def judged_as(dtype: torch.dtype, kernel: str) -> torch.dtype:
    """The dtype whose tolerance holds: the reference computes in float32 and rounds no product."""
    return torch.float32 if kernel == "reference" else dtype


def codes_of(quantized: Tensor) -> Tensor:
    return unpack_int4(quantized) if quantized.dtype == torch.int32 else quantized


def equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Bitwise equal, NaN scales too, whatever the storage of either."""
    same_scales = torch.equal(got[1].view(torch.int32), expected[1].view(torch.int32))
    return same_scales and torch.equal(codes_of(got[0]), codes_of(expected[0]))
