"""The sizes of the two Kronecker factors."""

import math
import operator


def get_decompose_dim(n: int) -> tuple[int, int]:
    """Split ``n`` features into factor sizes ``(M, N)`` with ``M * N == n`` and ``M <= N``.

    FlatQuant (``get_decompose_dim``) takes the smallest ``a`` for which ``a * a - n`` is a square
    ``b * b`` and returns ``(a - b, a + b)``. Those two have the same parity, and a smaller ``a``
    is a smaller sum, so this is the most balanced factor pair of one parity. ``n = 2 mod 4`` has
    no such pair (upstream never returns); here it gives the most balanced pair of any parity.

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n < 1``.
    """
    try:
        if isinstance(n, bool):
            raise TypeError
        n = operator.index(n)
    except (TypeError, RuntimeError):  # of a tensor without data, torch raises the latter
        raise TypeError(f"n must be an integer, got {n!r} of type {type(n).__name__}") from None
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    any_parity = n % 4 == 2
    for m in range(math.isqrt(n), 0, -1):
        if n % m == 0 and (any_parity or (m + n // m) % 2 == 0):
            return m, n // m
    raise AssertionError("unreachable: 1 * n is a pair of one parity for odd n, 2 * (n / 2) else")
