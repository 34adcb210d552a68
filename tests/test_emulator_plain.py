"""The plain kernel's own source, run on the host by the emulator (see test_emulator.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import DTYPES, Problem, dtype_name
from test_emulator import Case, Output, Ratio, Toolchain, codes_of
from test_emulator import launch as launch_case
from torch import Tensor

from flatquant import reference

FLOAT16, BFLOAT16, FLOAT32 = DTYPES
FEW, MANY = 1, 100_000  # tokens, for which threads hold one octet each, or as many as they can


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toolchain().compile_driver("run_plain", tmp_path_factory.mktemp("plain"))


def plain_case(x: Tensor, packed: bool = True, clip_ratios: tuple[Ratio, ...] = (1.0,)) -> Case:
    """Without factors; the blocks are the tokens that the launch is planned for."""
    return Case(
        *(1, x.shape[1], len(x), x.dtype, packed, clip_ratios),
        blocks=MANY,
        has_left=False,
        has_right=False,
    )


def launch(program: Path, folder: Path, case: Case, x: Tensor) -> list[Output]:
    """Codes as int8 and scales for each of the ratios; the threads run in a random order."""
    problem = Problem(x, x[:0], x[:0])
    case = replace(case, tokens=len(x))
    outputs = launch_case(program, folder, case, problem)
    return [(codes_of(output), output[1]) for output in outputs]


def check(case: Case, outputs: list[Output], x: Tensor) -> None:
    """Scales to the bit; codes too, but where Y / scale is a tie up to its own rounding."""
    for ratio, (codes, scales) in zip(case.clip_ratios, outputs, strict=True):
        # The kernel has the ratios as float32.
        pair = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        high, low = (float(torch.tensor(side)) for side in pair)
        exact_codes, exact_scales = reference.quantize(x.double(), (high, low))
        assert torch.equal(scales.nan_to_num(nan=-1.0), exact_scales.nan_to_num(nan=-1.0)), case
        steps = (codes - exact_codes).double()
        ratios = (x.double() / exact_scales.double()[:, None]).nan_to_num(posinf=0.0, neginf=0.0)
        distances = (ratios - exact_codes - steps / 2).abs()[steps != 0]
        assert steps.abs().max() <= 1 and not (distances > 1e-5).any(), case


def tokens_of(features: int, dtype: torch.dtype, count: int) -> Tensor:
    sizes = torch.exp2(torch.randint(-8, 8, (count, 1)))
    x = ((torch.randn(count, features) + 0.5) * sizes).to(dtype)
    x[-1] = -x[-1].abs()  # nothing above zero
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "features",
    [
        *(1, 7, 8, 9, 24, 100, 256),  # a token a warp
        *(257, 1000, 2048, 2056, 4096, 5120, 8200),
        16384,  # what the registers hold of float32
        *(16385, 28672),
        32768,  # of 16-bit dtypes
        *(32776, 65535, 65536),
    ],
)
def test_plain(plain: Path, tmp_path: Path, features: int, dtype: torch.dtype) -> None:
    """One result whatever the batch, the threads, the storage and how tokens lie in memory."""
    x = tokens_of(features, dtype, 2 if features > 8192 else 7)
    ratios = ((1.0, 1.0), (0.9, 0.6), (1.25, 1.0))
    case = plain_case(x, features % 8 == 0, ratios)
    outputs = launch(plain, tmp_path, case, x)
    check(case, outputs, x)
    others = [
        (replace(case, blocks=FEW, on_device=True), slice(None)),
        (replace(case, packed=False, gap=8), slice(1, None)),
        (replace(case, aligned=False, gap=3), slice(1)),
    ]
    for other, chosen in others:
        found = launch(plain, tmp_path, other, x[chosen])
        for (codes, scales), (other_codes, other_scales) in zip(outputs, found, strict=True):
            assert torch.equal(codes[chosen], other_codes), other
            assert torch.equal(scales[chosen], other_scales), other


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("features", [64, 640])
def test_plain_special_tokens(
    plain: Path, tmp_path: Path, features: int, dtype: torch.dtype, packed: bool
) -> None:
    x = tokens_of(features, dtype, 8)
    x[0] = 0.0
    inf, nan = float("inf"), float("nan")
    for token, values in enumerate([(inf,), (-inf,), (nan,), (inf, nan), (-inf, nan)], 1):
        x[token, torch.randperm(features)[: len(values)]] = torch.tensor(values, dtype=dtype)
    case = plain_case(x, packed, ((1.0, 1.0), (0.5, 0.25)))
    outputs = launch(plain, tmp_path, case, x)
    check(case, outputs, x)
    for codes, scales in outputs:
        expected = torch.tensor([1.0, inf, inf, nan, nan, nan])
        assert torch.equal(scales[:6].nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
        assert not codes[:6].any()


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("exponent", [-110, 110])
def test_plain_scales_without_a_normal_inverse(
    plain: Path, tmp_path: Path, exponent: int, packed: bool
) -> None:
    x = (torch.randn(5, 72) * 2.0**exponent).to(BFLOAT16)
    case = plain_case(x, packed, ((1.0, 1.0), (0.01, 0.5)))
    check(case, launch(plain, tmp_path, case, x), x)


def test_plain_ties_go_to_even(plain: Path, tmp_path: Path) -> None:
    x = torch.tensor([[-8.5, -7.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.0]], dtype=FLOAT16)
    ((codes, scales),) = launch(plain, tmp_path, plain_case(x, clip_ratios=((1.0, 0.125),)), x)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[-8, -8, 0, 0, 2, 2, 6, 7]]
