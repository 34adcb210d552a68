"""A token's codes and scale are bitwise the same in any batch, place, storage and run."""

from __future__ import annotations

import pytest
import torch
from launches import (
    COUNTS,
    DEVICE,
    by_dtype,
    by_kind,
    call,
    codes_of,
    equal,
    kernels,
    quantize,
    storages,
)
from problems import NO_GPU, Problem, random_problem
from torch import Tensor

from flatquant import kronecker_transform

pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

TOKENS = 4096
RUNS = 30

Output = tuple[Tensor, Tensor]


def outputs(problem: Problem, kernel: str) -> dict[bool, Output]:
    """What the kernel gives for each storage; the storages are compared here."""
    M, N = len(problem.left), len(problem.right)
    results = {packed: quantize(problem, kernel, packed) for packed in storages(M, N)}
    assert all(equal(result, results[False]) for result in results.values()), "int32 is not int8"
    return results


def differ(got: Output, expected: Output) -> Tensor:
    """Whether any bit differs, on the device: a sum of these costs one synchronisation."""
    COUNTS["batches compared bitwise"] += 1
    return (got[0] != expected[0]).any() | (
        got[1].view(torch.int32) != expected[1].view(torch.int32)
    ).any()


@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (13, 17)])
def test_every_batch_size_up_to_4096_gives_the_same_tokens(
    M: int, N: int, dtype: torch.dtype
) -> None:
    problem = random_problem(M, N, TOKENS, dtype, DEVICE)
    for kernel in kernels(M, N, dtype):
        for packed, (codes, scales) in outputs(problem, kernel).items():
            wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for count in range(1, TOKENS + 1):
                batch = Problem(problem.input[:count], *problem[1:])
                wrong += differ(call(batch, kernel, packed), (codes[:count], scales[:count]))
            assert wrong == 0, f"{kernel}, packed {packed}: {int(wrong)} batch sizes differ"


@by_dtype
@by_kind
def test_every_split_of_a_batch_gives_the_same_tokens(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, TOKENS, dtype, DEVICE)
    # 1 to 32 parts at random cuts, and cuts around what one wave of blocks holds.
    splits = [sorted(torch.randint(1, TOKENS, (2**i,)).tolist()) for i in range(6)]
    splits += [[1, 3, 6, 137, 268, 400, 533, 1597], list(range(132, TOKENS, 132))]
    for kernel in kernels(M, N, dtype):
        for packed, (codes, scales) in outputs(problem, kernel).items():
            wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for cuts in splits:
                for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
                    # A copy at another address: the place in memory must not matter either.
                    batch = Problem(problem.input[start:end].clone(), *problem[1:])
                    wrong += differ(
                        call(batch, kernel, packed), (codes[start:end], scales[start:end])
                    )
            assert wrong == 0, f"{kernel}, packed {packed}: {int(wrong)} parts differ"


@by_dtype
@by_kind
def test_a_tokens_place_and_neighbours_do_not_matter(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, TOKENS, dtype, DEVICE)
    order = torch.randperm(TOKENS, device=DEVICE)
    mixed = Problem(problem.input[order], *problem[1:])
    for kernel in kernels(M, N, dtype):
        results = outputs(problem, kernel)
        for packed, (codes, scales) in results.items():
            got = quantize(mixed, kernel, packed)
            assert not differ(got, (codes[order], scales[order])), (kernel, packed)


@by_dtype
@by_kind
def test_nan_and_inf_of_other_tokens_do_not_matter(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, TOKENS + 1, dtype, DEVICE)
    spoiled = torch.rand(TOKENS + 1, device=DEVICE) < 0.3
    spoiled[-1] = True
    inputs = problem.input.clone()
    tokens = spoiled.nonzero().flatten()
    places = torch.randint(M * N, tokens.shape, device=DEVICE)
    values = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    inputs[tokens, places] = values[places % 3].to(dtype)
    inputs[tokens[::4]] = torch.finfo(dtype).max  # finite, but W or Y is not
    for kernel in kernels(M, N, dtype):
        for packed, (codes, scales) in outputs(problem, kernel).items():
            got = quantize(Problem(inputs, *problem[1:]), kernel, packed)
            expected = codes[~spoiled], scales[~spoiled]
            assert not differ((got[0][~spoiled], got[1][~spoiled]), expected), (kernel, packed)


@by_dtype
@by_kind
def test_not_a_bit_of_y_depends_on_the_size_of_other_tokens(
    M: int, N: int, dtype: torch.dtype
) -> None:
    """Where several share a tile, zeros of the left factor meet the others' values."""
    problem = random_problem(M, N, 1, dtype, DEVICE)
    small, large = (2.0**-9, 2.0**11) if dtype == torch.float16 else (2.0**-60, 2.0**60)
    normal = torch.randn(1001, M * N, device=DEVICE)
    inputs = (normal * small).to(dtype)
    huge = (normal[1::2] * large).to(dtype)
    for kernel in kernels(M, N, dtype):
        y = []
        for others in (huge, 0.0, float("nan")):
            inputs[1::2] = others
            factors = problem.left, problem.right
            y.append(kronecker_transform(inputs, *factors, torch.float32, kernel=kernel)[::2])
        assert y[0].isfinite().all() and y[0].any(1).all(), kernel
        for other in y[1:]:
            COUNTS["batches compared bitwise"] += 1
            assert torch.equal(other.view(torch.int32), y[0].view(torch.int32)), kernel


@by_dtype
@by_kind
def test_many_runs_agree(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, 400, dtype, DEVICE)
    for kernel in kernels(M, N, dtype):
        results = outputs(problem, kernel)
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(RUNS):
            for packed, expected in results.items():
                wrong += differ(call(problem, kernel, packed), expected)
        assert wrong == 0, f"{kernel}: {int(wrong)} runs differ"
        COUNTS["codes compared bitwise"] += RUNS * codes_of(results[False][0]).numel()
