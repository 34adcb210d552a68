"""Inputs for the tests: random ones, and ones whose right answer is known without computing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import flatquant
from flatquant import _library, accuracy, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

#: Why there is no kernel to test on this machine; empty if there is.
NO_GPU = ""
if _library.LOAD_ERROR is not None:
    NO_GPU = f"no kernels to test: {_library.LOAD_ERROR}"
elif not flatquant.CUDA_AVAILABLE:
    NO_GPU = "no kernels to test: the extension is loaded, torch sees no CUDA device"


class Problem(NamedTuple):
    input: Tensor  # [tokens, M * N]
    left: Tensor  # [M, M]
    right: Tensor  # [N, N]


class Exact(NamedTuple):
    problem: Problem
    clip_ratio: float
    codes: Tensor  # int8 [tokens, M * N]
    scales: Tensor  # float32 [tokens]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_problem(M: int, N: int, tokens: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Normal tokens of very different sizes, and normal factors that keep those sizes.

    Factors smaller than 16 are orthogonal: a normal one is often nearly singular, and then Y is
    small where the intermediate is not.
    """

    def factor(size: int) -> Tensor:
        normal = torch.randn(size, size)
        normal = torch.linalg.qr(normal).Q if size < 16 else normal / size**0.5
        return normal.to(dtype).contiguous()

    with torch.device(device):
        sizes = torch.exp2(torch.randint(-10, 8, (tokens, 1)))
        x = (torch.randn(tokens, M * N) * sizes).to(dtype)
        return Problem(x, factor(M), factor(N))


def exact_problem(
    M: int,
    N: int,
    tokens: int,
    dtype: torch.dtype,
    clip_ratio: float = 1.0,
    device: str = "cpu",
) -> Exact:
    """A problem in which every number is exact in every dtype, with its codes and scales.

    The factors are permutations with signs and powers of two. Y / scale is a multiple of 1/8, half
    of them exact ties; scales are powers of two. The input is found from Y, not Y from the input.
    """

    def permutation(size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix with ``matrix[i, order[i]] = values[i]``."""
        order = torch.randperm(size)
        values = torch.exp2(torch.randint(-2, 3, (size,))) * (2.0 * torch.randint(2, (size,)) - 1)
        matrix = torch.zeros(size, size)
        matrix[torch.arange(size), order] = values
        return matrix, order, values

    def exactly(values: Tensor) -> Tensor:
        converted = values.to(dtype)
        assert torch.equal(converted.float(), values), "not exact: the construction is wrong"
        return converted

    with torch.device(device):
        largest = 7 / clip_ratio
        eighths = round(8 * largest)
        ratios = torch.randint(-eighths, eighths + 1, (tokens, M * N)) / 8
        ties = (ratios.floor() + 0.5).clamp(-largest, largest)
        ratios = torch.where(torch.rand(tokens, M * N) < 0.5, ties, ratios)
        sign = 2.0 * torch.randint(2, (tokens, 1)) - 1
        ratios.scatter_(1, torch.randint(M * N, (tokens, 1)), largest * sign)

        scales = torch.exp2(torch.randint(-4, 5, (tokens,)))
        left, rows, row_values = permutation(M)
        right, cols, col_values = permutation(N)
        transformed = (ratios * scales[:, None]).view(tokens, M, N)
        # Y[rows[i], cols[j]] = row_values[i] * X[i, j] * col_values[j]
        x = transformed[:, rows][:, :, cols] / (row_values[:, None] * col_values)
        return Exact(
            Problem(exactly(x.reshape(tokens, -1)), exactly(left), exactly(right)),
            clip_ratio,
            ratios.round().clamp(-8, 7).to(torch.int8),
            scales,
        )


def float64(problem: Problem) -> Tensor:
    """Y of every token in float64."""
    return reference.transform(*problem, compute_dtype=torch.float64)


def eager_mismatches(problem: Problem, clip_ratio: float, exact: Tensor) -> int:
    """How many codes differ from float64 with both products in the input's dtype."""
    M, N = len(problem.left), len(problem.right)
    half = problem.left.T @ problem.input.view(-1, M, N)
    transformed = (half @ problem.right).view_as(problem.input)
    result = reference.quantize(transformed.float(), clip_ratio)
    return accuracy.compare(*result, exact, clip_ratio, problem.input.dtype).mismatches
