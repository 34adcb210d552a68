"""Times the operator beyond one plain quantisation: clipping, several outputs, one factor, none.

    python benchmarks/bench_outputs.py
    python benchmarks/bench_outputs.py --features 14336 --tokens 131072 --dtype bfloat16

Prints a table for the notes and the docs: floor / time, each with the floor of its own bytes and
FLOPs, timed as bench_quantize.py does (see there). Codes are packed into int32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import measure
from bench_quantize import DEVICE, describe, random_problem
from peers import DTYPES

from flatquant import (
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    get_decompose_dim,
    kronecker_transform,
)

ON_GPU = DEVICE == "cuda"


class Case(NamedTuple):
    """One row of the table."""

    name: str
    call: Callable[[Tensor], object]
    written: float  # bytes for each feature
    products: int  # multiply-adds for each feature


def cases(left: Tensor, right: Tensor) -> list[Case]:
    """All cases for tokens of these two factors."""
    M, N = left.shape[0], right.shape[0]
    pairs = [(0.98, 0.95), (0.96, 0.99), (1.0, 0.97)]  # as learned: no code has to be clamped
    clamping = [(0.9, 0.8), (0.85, 0.8), (0.8, 0.9)]  # some codes are clamped
    heads = M * N // math.gcd(M * N, 128)  # as o_proj has them
    over_heads = torch.randn(heads, heads, device=left.device, dtype=left.dtype) / heads**0.5
    ratios = [tuple(torch.tensor(x, device=left.device) for x in pair) for pair in pairs]

    def one(clip_ratio: float, *factors: Tensor | None) -> Callable[[Tensor], object]:
        return lambda x: flatquant_dynamic_quantize(x, *factors, clip_ratio, True, ON_GPU)

    def many(clip_ratios: Sequence[object]) -> Callable[[Tensor], object]:
        return lambda x: flatquant_dynamic_quantize_many(x, left, right, clip_ratios, True, ON_GPU)

    def transform(dtype: torch.dtype) -> Callable[[Tensor], object]:
        return lambda x: kronecker_transform(x, left, right, dtype, ON_GPU)

    def copy(x: Tensor) -> Tensor:
        """As many bytes as three outputs read and write."""
        half = x.view(torch.uint8).view(-1)
        return half[: int(x.numel() * (x.element_size() + 1.5) / 2)].clone()

    return [
        Case("one output", one(1.0, left, right), 0.5, M + N),
        Case("clip ratio 0.9", one(0.9, left, right), 0.5, M + N),
        Case("pair of ratios", many(pairs[:1]), 0.5, M + N),
        Case("two outputs", many(pairs[:2]), 1.0, M + N),
        Case("three outputs", many(pairs), 1.5, M + N),
        Case("a copy of their bytes", copy, 1.5, 0),
        Case("three outputs that clamp", many(clamping), 1.5, M + N),
        Case("three, ratios on the device", many(ratios), 1.5, M + N),
        Case("left factor only", one(1.0, left, None), 0.5, M),
        Case("left factor over the heads", one(1.0, over_heads, None), 0.5, heads),
        Case("right factor only", one(1.0, None, right), 0.5, N),
        Case("no factor", one(1.0, None, None), 0.5, 0),
        Case("Y in float16", transform(torch.float16), 2.0, M + N),
        Case("Y in float32", transform(torch.float32), 4.0, M + N),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384] if ON_GPU else [16])
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls, at most")
    options = parser.parse_args(argv)
    rates = measure.measured_rates([options.dtype]) if ON_GPU else None
    environment = measure.environment()
    print(
        describe(
            {
                "environment": environment,
                "method": {"cuda_graph": False, "cold_l2": True},
                "rates": rates
                and {"copy_gb_per_s": rates.copy, "matmul_tflop_per_s": rates.matmul},
            }
        )
    )
    print(f"{environment['date']}, {options.dtype}: us (floor / time)\n")
    columns = [(features, tokens) for features in options.features for tokens in options.tokens]
    rows: dict[str, list[str]] = {}
    for features, tokens in columns:
        problem = random_problem(*get_decompose_dim(features), tokens, options.dtype, "int32")
        read = problem.inputs[0].element_size()
        for case in cases(problem.left, problem.right):
            us = measure.timed(case.call, problem.inputs, options.repeats).us
            cell = f"{us:.1f}"
            if rates is not None:
                floor, _ = rates.floor(
                    tokens * features * (read + case.written),
                    2 * tokens * features * case.products,
                    options.dtype,
                )
                cell += f" ({floor / us:.2f})"
            rows.setdefault(case.name, []).append(cell)
    titles = [f"{features}, {tokens} tokens" for features, tokens in columns]
    print("| |", " | ".join(titles), "|")
    print("|---|" + "---|" * len(titles))
    for name, cells in rows.items():
        print(f"| {name} |", " | ".join(cells), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
