"""Time, memory and accuracy by one command, as the original operator's README has it.

    python tests/test_performance.py [--test all|accuracy|performance] [--detailed]

A front to tests/test_accuracy.py and benchmarks/bench_quantize.py. Without a GPU it says so and
times the reference on the CPU. The exit status is 1 if the accuracy test fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_quantize
import test_accuracy
from peers import DTYPES
from problems import NO_GPU

FEATURES = [4096, 8192, 14336]
TOKENS = 16 if NO_GPU else 16384


def performance(detailed: bool) -> None:
    """A line for each size, dtype and storage: time, and memory of the results."""
    print(f"Time and memory of {TOKENS} tokens, medians")
    if NO_GPU:
        print(f"({NO_GPU}: the reference on the CPU)")
    arguments = ["--features", *FEATURES, "--tokens", TOKENS, "--storage", "int8", "int32"]
    arguments += ["--dtypes", *(DTYPES if detailed else ["float16"])]
    arguments += ["--peers", "--repeats", 5] if NO_GPU else ["--peers", "eager"]
    report = bench_quantize.run(bench_quantize.parse(map(str, arguments)), write=lambda text: None)
    print(bench_quantize.describe(report))
    print(
        f"\n{'features':>8} {'MxN':>8} {'dtype':>9} {'storage':>7} {'us':>10} {'GB/s':>7} "
        f"{'eager us':>10} {'result MB':>9} {'of int8':>7} {'of input':>8} {'peak MB':>8}"
    )
    int8_bytes = 0
    for r in report["results"]:
        ours, eager = r["implementations"]["flatquant"], r["implementations"].get("eager")
        input_bytes = r["tokens"] * r["features"] * DTYPES[r["dtype"]].itemsize
        if r["storage"] == "int8":
            int8_bytes = ours["output_bytes"]
        size = f"{r['rows']}x{r['cols']}"
        eager_us = f"{eager['us']:.1f}" if eager else "-"
        peak = f"{ours['peak_bytes'] * 1e-6:.2f}" if ours["peak_bytes"] is not None else "-"
        print(
            f"{r['features']:>8} {size:>8} {r['dtype']:>9} {r['storage']:>7} "
            f"{ours['us']:>10.1f} {r['bytes'] / ours['us'] * 1e-3:>7.1f} {eager_us:>10} "
            f"{ours['output_bytes'] * 1e-6:>9.2f} {ours['output_bytes'] / int8_bytes:>7.0%} "
            f"{ours['output_bytes'] / input_bytes:>8.0%} {peak:>8}"
        )
    print("\nresult: codes and scales; peak: the most that a call allocates, its result included")


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
    assert NO_GPU in run.stdout
    lines = [line.split() for line in run.stdout.splitlines() if line.split()[-1:] != []]
    measured = [line for line in lines if line[0].isdigit() and "int" in line[3]]
    assert len(measured) == 2 * len(FEATURES) * (len(DTYPES) if "--detailed" in arguments else 1)
    assert all(float(line[4]) > 0 for line in measured)
    # What packing saves: half of int8 storage, three quarters of a 16-bit input.
    packed = [line for line in measured if line[3] == "int32"]
    assert {line[8] for line in packed} == {"50%"}
    assert {line[9] for line in packed if "16" in line[2]} == {"25%"}
    if not NO_GPU:  # it is compared with PyTorch, and allocates its results and nothing else
        assert all(float(line[6]) > 0 for line in measured)
        assert all(float(line[10]) == pytest.approx(float(line[7]), rel=1e-3) for line in measured)


if __name__ == "__main__":
    sys.exit(main())
