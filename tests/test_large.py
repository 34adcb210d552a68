"""More elements than int32 counts, more tokens than a grid has blocks; every token is looked at."""

from __future__ import annotations

import pytest
import torch
from launches import (
    COUNTS,
    DEVICE,
    by_dtype,
    by_the_boundary_rule,
    call,
    codes_of,
    equal,
    kernels,
    quantize,
    storages,
)
from problems import NO_GPU, Problem, dtype_name, float64, random_problem

from flatquant import accuracy

pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

GIB = 2**30
CHUNK = 2**29  # elements
INT32 = 2**31
TEN_MILLION = 10_000_001


def needs(bytes_: int) -> None:
    """Skips the test, with the figures, where the GPU has not as much free memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < bytes_ + GIB:
        pytest.skip(f"needs {bytes_ / GIB + 1:.0f} GiB of free GPU memory, has {free / GIB:.0f}")


def normal_rows(tokens: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tokens, features, dtype=dtype, device=DEVICE).normal_()


def check_every_token(problem: Problem, kernel: str) -> None:
    """All tokens against the same ones in smaller batches, the ends against float64."""
    M, N, dtype = len(problem.left), len(problem.right), problem.input.dtype
    tokens, features = problem.input.shape
    step = max(1, CHUNK // features)
    for pack_int32 in storages(M, N):
        codes, scales = quantize(problem, kernel, pack_int32)
        assert len(codes) == len(scales) == tokens
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            expected = call(Problem(problem.input[part], *problem[1:]), kernel, pack_int32)
            assert torch.equal(codes[part], expected[0]), (kernel, pack_int32, start)
            assert torch.equal(scales[part], expected[1]), (kernel, pack_int32, start)
        for ends in (slice(0, 64), slice(tokens - 64, tokens)):
            exact = float64(Problem(problem.input[ends], *problem[1:]))
            result = accuracy.compare(codes[ends], scales[ends], exact, 1.0, dtype)
            assert by_the_boundary_rule(result, 1.0), f"{kernel}: {result}"
        COUNTS["tokens of large problems"] += tokens
        COUNTS["elements of large problems"] += tokens * features


@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (86, 128), (112, 128)])
def test_more_elements_than_int32_counts(M: int, N: int, dtype: torch.dtype) -> None:
    features = M * N
    tokens = INT32 // features + 3
    needs(tokens * features * (dtype.itemsize + 2))
    x = normal_rows(tokens, features, dtype)
    problem = Problem(x, *random_problem(M, N, 0, dtype, DEVICE)[1:])
    for kernel in kernels(M, N, dtype):
        check_every_token(problem, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("M, N", [(1, 1), (1, 8), (5, 3), (8, 8), (16, 16)])
def test_ten_million_tokens(M: int, N: int, dtype: torch.dtype) -> None:
    tokens, features = TEN_MILLION, M * N
    needs(tokens * features * (dtype.itemsize + 3) + 3 * 4 * tokens)
    x = normal_rows(tokens, features, dtype)
    problem = Problem(x, *random_problem(M, N, 0, dtype, DEVICE)[1:])
    for kernel in kernels(M, N, dtype):
        check_every_token(problem, kernel)


def test_more_tokens_than_int32_counts() -> None:
    tokens = INT32 + 5
    needs(2 * 4 * tokens + 2 * GIB)
    one = random_problem(1, 8, 1, torch.float16, DEVICE)
    problem = Problem(one.input.expand(tokens, 8), *one[1:])  # one token, repeated without memory
    word, scale = call(one, "simt", True)
    words, scales = call(problem, "auto", True)
    assert words.shape == (tokens, 1) and scales.shape == (tokens,)
    for start in range(0, tokens, CHUNK):
        assert (words[start : start + CHUNK] == word).all(), start
        assert (scales[start : start + CHUNK] == scale).all(), start
    COUNTS["tokens of large problems"] += tokens
    for kernel in ("sm80", "sm90"):
        with pytest.raises(RuntimeError, match=f"'{kernel}' does not serve"):
            call(problem, kernel, True)


@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (13, 17)])
def test_tokens_further_apart_than_int32_counts(M: int, N: int, dtype: torch.dtype) -> None:
    tokens, stride, features = 6, INT32 // 4 + 8, M * N
    needs(tokens * stride * dtype.itemsize)
    x = torch.empty((tokens - 1) * stride + features, dtype=dtype, device=DEVICE)
    x = x.as_strided((tokens, features), (stride, 1))
    near = random_problem(M, N, tokens, dtype, DEVICE)
    x.copy_(near.input)
    for kernel in kernels(M, N, dtype):
        for pack_int32 in storages(M, N):
            expected = quantize(near, kernel)
            got = quantize(Problem(x, *near[1:]), kernel, pack_int32)
            assert equal(got, expected), (kernel, pack_int32)
            assert codes_of(got[0]).shape == (tokens, features)
