"""get_decompose_dim against FlatQuant's own loop, and the table of sizes against both."""

from __future__ import annotations

import math

import numpy
import pytest
from shapes import SIZES

from flatquant import get_decompose_dim


def smallest_a(n: int) -> tuple[int, int]:
    """The definition: the smallest a for which a * a - n is a square. Endless for n = 2 mod 4."""
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b


def test_it_is_flatquants_definition_wherever_that_ends() -> None:
    for n in range(1, 3000):
        if n % 4 != 2:
            assert get_decompose_dim(n) == smallest_a(n), n


def test_it_is_the_most_balanced_pair_where_flatquants_definition_does_not_end() -> None:
    for n in range(2, 3000, 4):
        pairs = [(m, n // m) for m in range(1, n + 1) if n % m == 0 and m * m <= n]
        assert get_decompose_dim(n) == max(pairs), n


def test_the_sizes_that_the_tests_use_are_what_it_gives() -> None:
    assert len(SIZES) == len(set(SIZES)) == 45 + 44
    for M, N in SIZES:
        assert get_decompose_dim(M * N) == smallest_a(M * N) == (M, N)


@pytest.mark.parametrize("n, pair", [(1, (1, 1)), (2, (1, 2)), (999_999_937, (1, 999_999_937))])
def test_ends_of_the_range_do_not_take_long(n: int, pair: tuple[int, int]) -> None:
    assert get_decompose_dim(n) == pair


def test_any_integer_type_will_do() -> None:
    assert get_decompose_dim(numpy.int64(4096)) == (64, 64)


@pytest.mark.parametrize(
    "n, error, message",
    [
        (0, ValueError, "n must be at least 1, got 0"),
        (-4, ValueError, "n must be at least 1, got -4"),
        (4096.0, TypeError, "n must be an integer, got 4096.0 of type float"),
        ("64", TypeError, "n must be an integer, got '64' of type str"),
        (True, TypeError, "n must be an integer, got True of type bool"),
    ],
)
def test_errors(n: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_decompose_dim(n)  # type: ignore[arg-type]
