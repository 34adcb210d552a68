"""Times the operator against a plain fused Triton kernel, a copy of the same bytes and the floor.

    python benchmarks/bench_quantize.py --features 4096 8192 14336 --tokens 16384 131072

floor = max(bytes / copy rate, FLOPs / matmul rate), both rates measured in the same run: a 4 GiB
device copy, bytes read + written, and an 8192^3 bf16 matrix product. Times are medians of events
around one call, with the L2 cache overwritten before each and random data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import flatquant

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TRITON_CHOICES = [(warps, blocks) for warps in (4, 8) for blocks in (1, 2, 4)]


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of one call with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda._sleep(200_000)  # the host gets ahead, so that its overhead is not timed
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measured_rates() -> tuple[float, float]:
    """Copy rate in bytes per microsecond and matmul rate in FLOP per microsecond."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / microseconds(lambda: target.copy_(source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / microseconds(lambda: a @ b, 10)


def triton_time(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, repeats: int) -> float:
    """Of the Triton kernel's launch choices, the time of the fastest that runs; NaN without one."""
    try:
        from baselines import triton_fused
    except ImportError:
        return float("nan")
    times = []
    for warps, blocks in TRITON_CHOICES:
        try:
            times.append(
                microseconds(
                    lambda w=warps, b=blocks: triton_fused.quantize(
                        x, left, right, num_warps=w, blocks_per_sm=b
                    ),
                    repeats,
                )
            )
        except Exception as error:  # a choice that needs more shared memory than there is
            print(f"  Triton, {warps} warps: {str(error).splitlines()[0]}", file=sys.stderr)
            break
    return min(times, default=float("nan"))


def measure(
    features: int, tokens: int, dtype: torch.dtype, packed: bool, kernel: str, repeats: int,
    rates: tuple[float, float], with_triton: bool,
) -> dict[str, object]:  # fmt: skip
    rows, cols = flatquant.get_decompose_dim(features)
    x = torch.randn(tokens, features, device="cuda", dtype=dtype)
    left = (torch.randn(rows, rows, device="cuda") / rows**0.5).to(dtype)
    right = (torch.randn(cols, cols, device="cuda") / cols**0.5).to(dtype)

    moved = tokens * (features * (x.element_size() + (0.5 if packed else 1)) + 4)
    flops = 2 * tokens * features * (rows + cols)
    memory, compute = moved / rates[0], flops / rates[1]
    time = microseconds(
        lambda: flatquant.flatquant_dynamic_quantize(
            x, left, right, pack_int32=packed, kernel=kernel
        ),
        repeats,
    )
    same_bytes = torch.empty(int(moved) // 2, dtype=torch.uint8, device="cuda")
    copy_target = torch.empty_like(same_bytes)
    copy_time = microseconds(lambda: copy_target.copy_(same_bytes), repeats)
    fits_triton = with_triton and packed and dtype != torch.float32 and cols % 8 == 0
    return {
        "features": features, "rows": rows, "cols": cols, "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."), "storage": "int32" if packed else "int8",
        "kernel": kernel, "us": time, "floor_us": max(memory, compute),
        "bound": "memory" if memory > compute else "compute", "copy_us": copy_time,
        "limit_us": max(copy_time, compute + 3),
        "triton_us": triton_time(x, left, right, repeats) if fits_triton else float("nan"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 8192, 14336])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16"])
    parser.add_argument("--storage", choices=["int32", "int8"], default="int32")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-triton", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    arguments = parser.parse_args()
    if not flatquant.CUDA_AVAILABLE:
        print("bench_quantize needs a GPU and the compiled extension: ./scripts/build.sh")
        return 1

    rates = measured_rates()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}: "
        f"copy {rates[0] * 1e-6:.2f} TB/s, matmul {rates[1] * 1e-6:.0f} TFLOP/s"
    )
    print(
        f"{'features':>8} {'M x N':>9} {'tokens':>7} {'dtype':>9} {'us':>9} {'floor':>8} "
        f"{'bound':>7} {'floor/us':>8} {'us/limit':>8} {'copy us':>8} "
        f"{'Triton us':>9} {'speed-up':>8}"
    )
    results = []
    for features in arguments.features:
        for tokens in arguments.tokens:
            for dtype in arguments.dtypes:
                r = measure(
                    features, tokens, DTYPES[dtype], arguments.storage == "int32",
                    arguments.kernel, arguments.repeats, rates, not arguments.no_triton,
                )  # fmt: skip
                results.append(r)
                print(
                    f"{features:8} {r['rows']:>4}x{r['cols']:<4} {tokens:7} {dtype:>9} "
                    f"{r['us']:9.1f} {r['floor_us']:8.1f} {r['bound']:>7} "
                    f"{r['floor_us'] / r['us']:8.3f} {r['us'] / r['limit_us']:8.3f} "
                    f"{r['copy_us']:8.1f} {r['triton_us']:9.1f} {r['triton_us'] / r['us']:8.2f}",
                    flush=True,
                )
    if arguments.json:
        report = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "flatquant": flatquant.__version__,
            "copy_tb_per_s": rates[0] * 1e-6, "matmul_tflop_per_s": rates[1] * 1e-6,
            "results": results,
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
