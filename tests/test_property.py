"""Random problems of every shape and layout, each by every kernel, against float64.

`pytest tests/test_property.py --hypothesis-profile=thorough` runs 10,000 of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import (
    COUNTS,
    DEVICE,
    by_the_boundary_rule,
    call,
    equal,
    judged_as,
    kernels,
    quantize,
    storages,
)
from problems import DTYPES, Problem, dtype_name, float64
from torch import Tensor

from flatquant import accuracy, ops
from flatquant._checks import row_stride

MAX_TOKENS = 8 if DEVICE == "cpu" else 300


@dataclass(frozen=True)
class Case:
    """One problem, whole: `run(Case(...))` repeats it on the same device."""

    M: int
    N: int
    tokens: int
    dtype: torch.dtype
    clip_ratio: float
    stride: int  # elements from token to token; less than M * N: they overlap
    offset: int  # elements before the first token
    batches: int  # tokens lie in [batches, tokens / batches, features]
    content: str
    seed: int

    def problem(self) -> Problem:
        generator = torch.Generator(DEVICE).manual_seed(self.seed)
        features = self.M * self.N
        span = features + max(0, self.tokens - 1) * self.stride
        values = torch.randn(self.offset + span, generator=generator, device=DEVICE)
        # Stretches of different size, in which single elements stand out.
        stretches = len(values) // features + 1
        sizes = torch.randint(-8, 7, (stretches,), generator=generator, device=DEVICE)
        values *= torch.exp2(sizes).repeat_interleave(features)[: len(values)]
        if self.content == "outliers":
            values[:: max(7, features // 5)] *= 40
        elif self.content == "zeros":
            values[: 2 * len(values) // 3] = 0
        elif self.content in ("nan", "inf", "-inf"):
            where = torch.randint(len(values), (3,), generator=generator, device=DEVICE)
            values[where] = float(self.content)
        shape = (self.batches, self.tokens // self.batches, features)
        strides = (self.tokens // self.batches * self.stride, self.stride, 1)
        x = values.to(self.dtype).as_strided(shape, strides, self.offset)
        left, right = (self._factor(size, generator) for size in (self.M, self.N))
        return Problem(x, left, right)

    def _factor(self, size: int, generator: torch.Generator) -> Tensor:
        """Orthogonal if small, as a small normal matrix is often nearly singular."""
        if size >= 16:
            normal = torch.randn(size, size, generator=generator, device=DEVICE)
            return (normal / size**0.5).to(self.dtype)
        normal = torch.randn(size, size, generator=torch.Generator().manual_seed(self.seed))
        return torch.linalg.qr(normal).Q.to(self.dtype).contiguous().to(DEVICE)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Tensor-core kernels need multiples of 8 in places: half of all numbers are.
    def distance(largest: int) -> int:
        return draw(st.integers(0, largest) | st.integers(0, largest // 8).map(lambda n: 8 * n))

    size = st.integers(1, 300) | st.integers(1, 37).map(lambda n: 8 * n)
    M, N = draw(size), draw(size)
    features = M * N
    batches = draw(st.sampled_from([1, 1, 2, 5]))
    stride = {
        "contiguous": lambda: features,
        "apart": lambda: features + distance(80),
        "far apart": lambda: -(-features // 8) * 8 + 8 * distance(300),
        "overlapping": lambda: distance(features - 1),
    }[draw(st.sampled_from(["contiguous", "contiguous", "apart", "far apart", "overlapping"]))]
    contents = ["normal", "normal", "outliers", "zeros", "nan", "inf", "-inf"]
    return Case(
        M,
        N,
        tokens=draw(st.integers(0, MAX_TOKENS // batches)) * batches,
        dtype=draw(st.sampled_from(DTYPES)),
        clip_ratio=draw(st.sampled_from([1.0, 0.95, 0.5, 2.0]) | st.floats(0.2, 4.0)),
        stride=stride(),
        offset=draw(st.sampled_from([0, 0, 8, 24, 1, 3])),
        batches=batches,
        content=draw(st.sampled_from(contents)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def fits(problem: Problem, kernel: str) -> bool:
    """Whether the tensors lie as the kernel needs them; others it refuses."""
    x = problem.input
    step = row_stride(x)
    assert step is not None
    alignment = ops._ALIGNMENT.get(kernel, 1)
    return x.data_ptr() % alignment == 0 and step * x.element_size() % alignment == 0


def run(case: Case, mismatches: Counter[str], allowed: Counter[str]) -> None:
    problem = case.problem()
    exact = float64(problem)
    first = True  # of the kernels that fit, which is the one that "auto" takes
    for kernel in kernels(case.M, case.N, case.dtype):
        if not fits(problem, kernel):
            with pytest.raises(ValueError, match="needs every token of input_tensor aligned"):
                call(problem, kernel)
            COUNTS[f"property cases refused by {kernel}, misaligned"] += 1
            continue
        dtype = judged_as(case.dtype, kernel)
        codes, scales = quantize(problem, kernel, False, case.clip_ratio)
        result = accuracy.compare(codes, scales, exact, case.clip_ratio, dtype)
        assert by_the_boundary_rule(result, case.clip_ratio), f"{kernel}, {result}"
        for pack_int32 in storages(case.M, case.N)[1:]:
            packed = quantize(problem, kernel, pack_int32, case.clip_ratio)
            assert equal(packed, (codes, scales)), f"{kernel}: int32 is not int8"
        if first:
            assert equal(call(problem, "auto", False, case.clip_ratio), (codes, scales))
        first = False
        name = f"{kernel}, {dtype_name(case.dtype)}"
        mismatches[name] += result.mismatches
        # A finer step has as many more boundaries to err at.
        allowed[name] += result.tolerance.mismatch * exact.numel() / min(1.0, case.clip_ratio)
        # The largest |Y| lies at 7 / clip_ratio steps: at 2 on a boundary, where each may err.
        if 7 / case.clip_ratio % 1 == 0.5:
            allowed[name] += case.tokens
        COUNTS[f"property cases of {name}"] += 1
        COUNTS["codes compared with float64"] += exact.numel()
    assert not first, "no kernel served the case"


def test_random_problems_agree_with_float64() -> None:
    mismatches: Counter[str] = Counter()
    allowed: Counter[str] = Counter()
    number = 0

    @given(cases())
    def check(case: Case) -> None:
        nonlocal number
        number += 1
        run(case, mismatches, allowed)

    check()
    assert number >= settings().max_examples
    COUNTS["property cases"] += number
    # The share is that of many cases: in few, single ones weigh heavily, and a code at a boundary
    # repeats in all tokens that overlap.
    spread = 1 if number >= 10_000 else 4
    for name, count in mismatches.items():
        assert count <= spread * allowed[name] + MAX_TOKENS, f"{name}: {count} codes differ"
