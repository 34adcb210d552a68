"""Time, memory and accuracy by one command, as the original operator's README has it.

    python tests/test_performance.py [--test all|accuracy|performance] [--detailed]

A front to tests/test_accuracy.py and benchmarks/bench_quantize.py. Without a GPU it says so and
times the reference on the CPU. The exit status is 1 if the accuracy test fails.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_quantize
import test_accuracy
from problems import DTYPES, NO_GPU, dtype_name, random_problem

from flatquant import flatquant_dynamic_quantize, get_decompose_dim

FEATURES = [4096, 8192, 14336]
TOKENS = 64 if NO_GPU else 16384


def microseconds(problem: tuple[torch.Tensor, ...], pack_int32: bool) -> float:
    """Median time of a call: the reference on the CPU, the best kernel on a GPU."""
    x, left, right = problem

    def call() -> None:
        flatquant_dynamic_quantize(x, left, right, 1.0, pack_int32, use_cuda=not NO_GPU)

    if not NO_GPU:
        return bench_quantize.microseconds(call, 20)
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def performance(detailed: bool) -> None:
    device = "cpu" if NO_GPU else "cuda"
    print(f"Time and memory of {TOKENS} tokens on {device}, median")
    if NO_GPU:
        print(f"({NO_GPU}: the reference)")
    print(
        f"\n{'features':>8} {'MxN':>8} {'dtype':>9} {'storage':>7} {'us':>10} {'GB/s':>7} "
        f"{'codes MB':>8} {'of int8':>7} {'of input':>8}"
    )
    for dtype in DTYPES if detailed else DTYPES[:1]:
        for features in FEATURES:
            rows, cols = get_decompose_dim(features)
            problem = random_problem(rows, cols, TOKENS, dtype, device)
            x_bytes = problem[0].numel() * problem[0].element_size()
            sizes = {}
            for pack_int32 in (False, True):
                codes, scales = flatquant_dynamic_quantize(
                    *problem, 1.0, pack_int32, use_cuda=not NO_GPU
                )
                sizes[pack_int32] = codes.numel() * codes.element_size()
                moved = x_bytes + sizes[pack_int32] + scales.numel() * 4
                us = microseconds(problem, pack_int32)
                print(
                    f"{features:>8} {f'{rows}x{cols}':>8} {dtype_name(dtype):>9} "
                    f"{'int32' if pack_int32 else 'int8':>7} {us:>10.1f} {moved / us * 1e-3:>7.1f} "
                    f"{sizes[pack_int32] / 1e6:>8.2f} {sizes[pack_int32] / sizes[False]:>7.0%} "
                    f"{sizes[pack_int32] / x_bytes:>8.0%}",
                    flush=True,
                )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Accuracy, time and memory of the operator.")
    parser.add_argument("--test", choices=["all", "accuracy", "performance"], default="all")
    parser.add_argument("--detailed", action="store_true", help="time every dtype, not one")
    options = parser.parse_args(arguments)
    status = 0
    if options.test != "performance":
        status = test_accuracy.main()
        print()
    if options.test != "accuracy":
        performance(options.detailed)
    return status


@pytest.mark.parametrize(
    "arguments", [["--test", "performance"], ["--test", "performance", "--detailed"]]
)
def test_the_script_measures_every_size_and_storage(arguments: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, __file__, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.split()[-1:] != []]
    measured = [line for line in lines if line[0].isdigit() and "int" in line[3]]
    assert len(measured) == 2 * len(FEATURES) * (len(DTYPES) if "--detailed" in arguments else 1)
    assert all(float(line[4]) > 0 for line in measured)
    # What packing saves: half of int8 storage, three quarters of a 16-bit input.
    packed = [line for line in measured if line[3] == "int32"]
    assert {line[7] for line in packed} == {"50%"}
    assert {line[8] for line in packed if line[2] != "float32"} == {"25%"}


if __name__ == "__main__":
    sys.exit(main())
