"""The reference: against the definition, by hand, and its float32 form against its float64 form."""

from __future__ import annotations

import math

import pytest
import torch
from launches import by_the_boundary_rule
from problems import DTYPES, dtype_name, exact_problem, float64, random_problem
from shapes import ODD, SIZES

from flatquant import accuracy, reference
from flatquant.packing import unpack_int4

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("M, N", [(1, 1), (1, 8), (3, 5), (8, 4), (24, 32)])
def test_the_transform_is_multiplication_by_the_kronecker_product(M: int, N: int) -> None:
    x = torch.randn(2, 3, M * N, dtype=torch.float64)
    left = torch.randn(M, M, dtype=torch.float64)
    right = torch.randn(N, N, dtype=torch.float64)
    transformed = reference.transform(x, left, right, torch.float64)
    torch.testing.assert_close(transformed, x @ torch.kron(left, right), rtol=1e-12, atol=1e-12)


def test_the_left_factor_is_transposed_and_the_right_is_not() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # X = [[1, 2], [3, 4]]
    shear, one = torch.tensor([[1.0, 10.0], [0.0, 1.0]]), torch.eye(2)
    assert reference.transform(x, shear, one).tolist() == [[1, 2, 13, 24]]
    assert reference.transform(x, one, shear).tolist() == [[1, 12, 3, 34]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize(
    "values, clip_ratio, codes, scale",
    [
        pytest.param([7, 6.6, 6.4, 0.4], 1.0, [7, 7, 6, 0], 1.0, id="nearest"),
        pytest.param([7, 0.5, 1.5, 2.5, 6.5], 1.0, [7, 0, 2, 2, 6], 1.0, id="ties to even"),
        pytest.param([-7, -0.5, -1.5, -2.5], 1.0, [-7, 0, -2, -2], 1.0, id="negative ties to even"),
        pytest.param([14, 7.5, 7.4, 6.5], 0.5, [7, 7, 7, 6], 1.0, id="clamped above"),
        pytest.param([-14, -7.5, -8.5, -6.5], 0.5, [-8, -8, -8, -6], 1.0, id="clamped below"),
        pytest.param([7, 3, 1], 2.0, [4, 2, 0], 2.0, id="clip ratio above 1"),
        pytest.param([0, 0, -0.0], 1.0, [0, 0, 0], 1.0, id="zeros"),
        pytest.param([NAN, 1, 2], 1.0, [0, 0, 0], NAN, id="NaN"),
        pytest.param([INF, 1, 2], 1.0, [0, 0, 0], INF, id="Inf"),
        pytest.param([-INF, 1, 2], 1.0, [0, 0, 0], INF, id="-Inf"),
        pytest.param([INF, NAN, -INF], 1.0, [0, 0, 0], NAN, id="NaN before Inf"),
        pytest.param([3e38, 0], 7.0, [0, 0], INF, id="scale overflows"),
        pytest.param([1.0, 0.5], 2.0**-149, [0, 0], 1.0, id="scale underflows"),
        pytest.param([2.0**-149], 1.0, [0], 1.0, id="scale of a subnormal token underflows"),
        pytest.param([10 * 2.0**-149, -(2.0**-148)], 1.0, [7, -2], 2.0**-149, id="subnormal scale"),
    ],
)
def test_codes_and_scale_of_a_token(
    values: list[float], clip_ratio: float, codes: list[int], scale: float, dtype: torch.dtype
) -> None:
    got_codes, got_scales = reference.quantize(torch.tensor([values], dtype=dtype), clip_ratio)
    assert (got_codes.dtype, got_scales.dtype) == (torch.int8, torch.float32)
    assert got_codes.tolist() == [codes]
    assert got_scales.tolist() == [scale] or (math.isnan(scale) and got_scales.isnan().all())


def test_the_scale_is_rounded_as_in_float32() -> None:
    absmax, clip_ratio = torch.rand(10_000) + 0.5, 0.9
    _, scales = reference.quantize(absmax[:, None].double(), clip_ratio)
    expected = absmax.numpy() * torch.tensor(clip_ratio).numpy() / torch.tensor(7.0).numpy()
    assert torch.equal(scales, torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("M, N", [*SIZES, *ODD])
def test_float32_agrees_with_float64(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, max(3, 2**15 // (M * N)), dtype)
    for clip_ratio in (1.0, 0.85):
        result = accuracy.compare(
            *reference.dynamic_quantize(*problem, clip_ratio),
            float64(problem),
            clip_ratio,
            torch.float32,  # nothing is rounded to the input's dtype
        )
        # So few elements that the share of the codes that differ would fail by chance.
        assert by_the_boundary_rule(result, clip_ratio), result


@pytest.mark.parametrize("clip_ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("M, N", [(1, 1), (3, 5), (24, 32), (86, 128), (193, 64)])
def test_exact_data_gives_exact_codes(
    M: int, N: int, dtype: torch.dtype, clip_ratio: float
) -> None:
    problem, _, codes, scales = exact_problem(M, N, 20, dtype, clip_ratio)
    got_codes, got_scales = reference.dynamic_quantize(*problem, clip_ratio)
    assert torch.equal(got_scales, scales)
    assert torch.equal(got_codes, codes)


def test_packed_codes_are_the_codes() -> None:
    problem = random_problem(24, 32, 9, torch.float16)
    codes, scales = reference.dynamic_quantize(*problem)
    words, packed_scales = reference.dynamic_quantize(*problem, pack_int32=True)
    assert torch.equal(unpack_int4(words), codes)
    assert torch.equal(packed_scales, scales)
