"""Values at the ends of the dtypes, degenerate tokens and clip ratios far from 1."""

from __future__ import annotations

import math

import pytest
import torch
from launches import (
    COUNTS,
    DEVICE,
    KINDS,
    by_dtype,
    by_kind,
    by_the_boundary_rule,
    codes_of,
    equal,
    judged_as,
    kernels,
    quantize,
    variants,
)
from problems import Problem, exact_problem, float64, random_problem
from torch import Tensor

from flatquant import accuracy

SMALL_KINDS = [(64, 64), (24, 24), (13, 17), (128, 148)]
TOKENS = 8 if DEVICE == "cpu" else 257


def check_interval(
    output: tuple[Tensor, Tensor], exact: Tensor, error: Tensor, clip_ratio: float
) -> None:
    """Codes and scales must be those of some Y within `error` [tokens, 1] of the exact one.

    This is the boundary rule where an error may be more than one step: codes are compared with the
    lowest and the highest that the errors of Y and of the scale allow.
    """
    codes, scales = codes_of(output[0]).double(), output[1].double()
    largest = exact.abs().amax(-1, keepdim=True)
    step = clip_ratio * largest / 7
    smallest = 2.0**-149  # the scale's own last bit, where it is subnormal
    assert ((scales[:, None] - step).abs() <= clip_ratio * error / 7 + 1e-6 * step + smallest).all()
    margin = 2.1 * error + 1e-6 * largest  # the scale's error moves Y / scale as much again
    lowest, highest = (
        ((exact + sign * margin) / step).round().clamp(-8, 7) for sign in (-1.0, 1.0)
    )
    wrong = (codes < lowest) | (codes > highest)
    assert not wrong.any(), f"{int(wrong.sum())} codes of {wrong.numel()}"
    COUNTS["codes of extreme values checked"] += wrong.numel()


def exponents(dtype: torch.dtype) -> list[int]:
    """Powers of two by which exact_problem may be multiplied and stay exact, the ends included."""
    if dtype == torch.float16:
        return [-13, -9, 5]  # subnormal inputs, subnormal intermediates; values up to 57344
    subnormal = -135 if dtype == torch.float32 else -122
    return [subnormal, -119, -64, 64, 110]  # subnormal scales; scales past 2^100


@by_dtype
@by_kind
def test_powers_of_two_move_scales_and_leave_codes(M: int, N: int, dtype: torch.dtype) -> None:
    """Nothing is flushed to zero, overflows or loses a bit where every number is exact."""
    problem, _, codes, scales = exact_problem(M, N, TOKENS, dtype, device=DEVICE)
    for exponent in exponents(dtype):
        x = problem.input.double() * 2.0**exponent
        assert torch.equal(x.to(dtype).double(), x), "not exact: the construction is wrong"
        moved = Problem(x.to(dtype), *problem[1:])
        expected = (scales.double() * 2.0**exponent).float()
        for kernel, pack_int32 in variants(M, N, dtype):
            got_codes, got_scales = quantize(moved, kernel, pack_int32)
            assert torch.equal(got_scales, expected), (kernel, exponent)
            assert torch.equal(codes_of(got_codes), codes), (kernel, exponent)
            COUNTS["codes of extreme values checked"] += codes.numel()


@pytest.mark.parametrize("gain", ["left", "right"])
@by_kind
def test_float16_at_its_largest_with_a_finite_y(M: int, N: int, gain: str) -> None:
    """Inputs to 65504 and an intermediate far past it, in whichever order the products are made."""
    x = 65504 * (2 * torch.rand(TOKENS, M * N, device=DEVICE) - 1)
    x[:, ::5] = torch.copysign(torch.tensor(65504.0, device=DEVICE), x[:, ::5])
    factors = random_problem(M, N, 0, torch.float32, DEVICE)[1:]
    powers = (16.0, 2.0**-10) if gain == "left" else (2.0**-10, 16.0)
    left, right = ((f * power).half() for f, power in zip(factors, powers, strict=True))
    problem = Problem(x.half(), left, right)
    exact = float64(problem)
    assert problem.input.abs().max() == 65504
    eye = [torch.eye(size, device=DEVICE) for size in (M, N)]
    first = (problem.input, left, eye[1]) if gain == "left" else (problem.input, eye[0], right)
    assert exact.abs().max() < 65504 < float64(Problem(*first)).abs().max()
    for kernel, pack_int32 in variants(M, N, torch.float16):
        output = quantize(problem, kernel, pack_int32)
        result = accuracy.compare(*output, exact, 1.0, judged_as(torch.float16, kernel))
        assert by_the_boundary_rule(result, 1.0), f"{kernel}: {result}"
        COUNTS["codes of extreme values checked"] += exact.numel()


@by_kind
def test_float16_inputs_that_are_subnormal(M: int, N: int) -> None:
    x = torch.randint(-600, 601, (TOKENS, M * N), device=DEVICE) * 2.0**-24
    factors = random_problem(M, N, 0, torch.float16, DEVICE)[1:]
    problem = Problem(x.half(), *factors)
    assert torch.equal(problem.input.float(), x)
    exact = float64(problem)
    # Rounded to float16, a subnormal intermediate is off by half of 2^-24: not in proportion to it.
    # An element of Y sums N such errors with random signs (or M, if the right product is first).
    spread = max(factors[0].float().norm(dim=0).max(), factors[1].float().norm(dim=0).max())
    absolute = 6 * 2.0**-25 * spread
    for kernel, pack_int32 in variants(M, N, torch.float16):
        tolerance = accuracy.TOLERANCES[judged_as(torch.float16, kernel)].transform
        error = tolerance * exact.abs().amax(-1, keepdim=True) + absolute
        check_interval(quantize(problem, kernel, pack_int32), exact, error, 1.0)


@pytest.mark.parametrize("clip_ratio", [1e-6, 1e-3, 0.03, 10.0, 100.0])
@by_dtype
@pytest.mark.parametrize("M, N", SMALL_KINDS)
def test_clip_ratios_far_from_one(M: int, N: int, dtype: torch.dtype, clip_ratio: float) -> None:
    problem = random_problem(M, N, TOKENS, dtype, DEVICE)
    exact = float64(problem)
    for kernel, pack_int32 in variants(M, N, dtype):
        tolerance = accuracy.TOLERANCES[judged_as(dtype, kernel)].transform
        output = quantize(problem, kernel, pack_int32, clip_ratio)
        check_interval(output, exact, tolerance * exact.abs().amax(-1, keepdim=True), clip_ratio)


@by_dtype
@by_kind
def test_tokens_of_one_value_and_of_one_element(M: int, N: int, dtype: torch.dtype) -> None:
    features = M * N
    factors = random_problem(M, N, 0, dtype, DEVICE)[1:]
    values = torch.randn(TOKENS, 1, device=DEVICE)
    one_hot = torch.zeros(TOKENS, features, device=DEVICE)
    where = torch.randint(features, (TOKENS, 1), device=DEVICE)
    where[0], where[-1] = 0, features - 1
    one_hot.scatter_(1, where, values)
    for x in (values.expand(TOKENS, features), one_hot):
        problem = Problem(x.to(dtype).contiguous(), *factors)
        exact = float64(problem)
        for kernel, pack_int32 in variants(M, N, dtype):
            output = quantize(problem, kernel, pack_int32)
            result = accuracy.compare(*output, exact, 1.0, judged_as(dtype, kernel))
            assert by_the_boundary_rule(result, 1.0), f"{kernel}: {result}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@by_dtype
@by_kind
def test_zeros_in_the_factors_make_nan_of_inf_in_its_token_only(
    M: int, N: int, dtype: torch.dtype, value: float
) -> None:
    """Padding by zeros must not do what zeros of the factors rightly do."""
    clean = exact_problem(M, N, 30, dtype, device=DEVICE).problem  # factors are permutations
    dirty = clean.input.clone()
    tokens = [0, 13, 29]
    for token, feature in zip(tokens, (0, M * N // 2, M * N - 1), strict=True):
        dirty[token, feature] = value
    others = [token for token in range(30) if token not in tokens]
    for kernel, pack_int32 in variants(M, N, dtype):
        codes, scales = quantize(Problem(dirty, *clean[1:]), kernel, pack_int32)
        clean_codes, clean_scales = quantize(clean, kernel, pack_int32)
        assert scales[tokens].isnan().all(), kernel
        assert (codes[tokens] == 0).all(), kernel
        assert equal((codes[others], scales[others]), (clean_codes[others], clean_scales[others]))


@pytest.mark.parametrize("M, N", [(M, N) for M, N in KINDS if M * N % 8 == 0])
@pytest.mark.parametrize("factor", ["left", "right"])
def test_inf_in_a_factor_is_inf_and_not_nan(factor: str, M: int, N: int) -> None:
    """All else is positive, so that Y is Inf of one sign; padding must not make NaN of it."""
    problem = Problem(*(t.abs() + 0.5 for t in random_problem(M, N, 5, torch.float16, DEVICE)))
    getattr(problem, factor)[0, -1] = math.inf
    for kernel in kernels(M, N, torch.float16):
        codes, scales = quantize(problem, kernel)
        assert (scales == math.inf).all() and (codes == 0).all(), kernel


@pytest.mark.parametrize("M, N", [(M, N) for M, N in KINDS if M * N % 8 == 0])
def test_inf_beside_an_intermediate_that_overflows_is_inf_and_not_nan(M: int, N: int) -> None:
    """Y is Inf of one sign, or finite: an Inf of the other sign made on the way would give NaN."""
    x = torch.full((3, M * N), 60000.0, device=DEVICE)
    x[:, ::2] = -60000.0
    x[1, 5] = math.inf
    left = torch.rand(M, M, device=DEVICE) + 4  # all positive: Inf stays Inf
    right = (torch.rand(N, N, device=DEVICE) + 0.5) * 2.0**-12
    problem = Problem(x.half(), left.half(), right.half())
    exact = float64(problem)
    assert exact[1].isinf().all() and exact[[0, 2]].isfinite().all()
    for kernel in kernels(M, N, torch.float16):
        codes, scales = quantize(problem, kernel)
        assert scales[1].item() == math.inf and (codes[1] == 0).all(), kernel
