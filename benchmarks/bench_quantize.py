"""Times the operator beside its peers, a copy of the same bytes and the floor.

    python benchmarks/bench_quantize.py --model llama-3-8b
    python benchmarks/bench_quantize.py --features 4096 --tokens 1 64 4096 --cuda-graph
    python benchmarks/bench_quantize.py --model all --json new.json --plot plots

floor = max(bytes / copy rate, FLOPs / matmul rate), both rates measured in the same run: a device
copy of 4 GiB, bytes read + written, and an 8192^3 matrix product. GB/s and TFLOP/s count what the
operator must move and compute, whatever an implementation does. Times are medians of single calls
with a cold L2 cache on random data, the spread is their 10th to 90th percentile; with --cuda-graph
the call is replayed from a graph; with --warm a hundred calls follow each other in one, with the L2
cache as they leave it, and kernels that allow it overlap. Memory is what a call allocates at most,
results included.

torch.compile and FlatQuant's own kernel, which tunes itself, take 10 s and more to prepare for each
size: they run only at the sizes of --slow-peers-at. Without a GPU the reference in PyTorch is
timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import measure
import peers
from models import MODELS, sizes
from peers import LABELS

import flatquant
from flatquant.packing import unpack_int4

SCHEMA = 1  # of the JSON file; raised when a field changes its meaning
DEVICE = "cuda" if flatquant.CUDA_AVAILABLE else "cpu"
INPUT_SETS = 3
INPUT_BYTES = 8 << 30  # of all sets together; fewer sets where they are larger
WRONG = 0.05  # share of differing codes from which a peer computes something else

PEERS = [name for name in LABELS if name != "flatquant"]
Write = Callable[[str], None]
SLOW = ("compile", "flatquant-repo", "hadamard")
HEADER = (
    f"  {'':<26}{'us':>10} {'10% .. 90%':>19} {'GB/s':>7} {'TFLOP/s':>8} {'floor/time':>10} "
    f"{'flatquant is':>12} {'peak MB':>9}"
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    doc = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=doc[0],
        epilog="\n\n".join(doc[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", choices=[*MODELS, "all"], default=[], help="input sizes of its layers"
    )
    parser.add_argument(
        "--features", type=int, nargs="+", help="sizes (4096 8192 14336 without --model)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384 if DEVICE == "cuda" else 64]
    )
    parser.add_argument("--dtypes", nargs="+", choices=peers.DTYPES, default=["float16"])
    parser.add_argument("--storage", nargs="+", choices=["int32", "int8"], default=["int32"])
    parser.add_argument("--kernel", default="auto", help="of the operator")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="all by default")
    parser.add_argument(
        "--slow-peers-at",
        type=int,
        nargs="*",
        default=[4096, 8192, 14336, 28672],
        metavar="FEATURES",
        help=f"sizes for {', '.join(SLOW)}; none given: all sizes (default: %(default)s)",
    )
    parser.add_argument("--flatquant-repo", type=Path, metavar="PATH", help="FlatQuant's checkout")
    parser.add_argument("--cuda-graph", action="store_true", help="replay calls from a CUDA graph")
    parser.add_argument(
        "--warm", action="store_true", help="calls back to back in a CUDA graph, L2 cache warm"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls, at most")
    parser.add_argument("--commit", help="recorded in the JSON if this is no git checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw plots into FOLDER")
    options = parser.parse_args(argv)
    if "all" in options.model:
        options.model = list(MODELS)
    if options.features is None:
        options.features = [] if options.model else [4096, 8192, 14336]
    options.features = sorted({*options.features, *sizes(options.model)})
    return options


def run(options: argparse.Namespace, write: Write = print) -> dict[str, Any]:
    """Measures every problem, writes its table as it goes, and gives the report of the JSON file.

    The file is written anew after each problem, so that nothing is lost if the run is cut short.
    """
    rates = measure.measured_rates(options.dtypes) if DEVICE == "cuda" else None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": measure.environment(options.commit),
        "method": {
            "kernel": options.kernel,
            "cuda_graph": options.cuda_graph or options.warm,
            "cold_l2": DEVICE == "cuda" and not options.warm,
            "repeats": options.repeats,
            "statistic": "median, 10th and 90th percentile of "
            + (f"graphs of {measure.WARM_CALLS} calls, a call" if options.warm else "single calls"),
        },
        "rates": rates and {"copy_gb_per_s": rates.copy, "matmul_tflop_per_s": rates.matmul},
        "results": [],
    }
    grid = [
        (features, dtype, storage, tokens)
        for features in options.features
        for dtype in options.dtypes
        for storage in options.storage
        for tokens in options.tokens
    ]
    problems, write = progress(grid, write)
    write(describe(report))
    precision = torch.get_float32_matmul_precision()
    for features, dtype, storage, tokens in problems:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        result = measure_problem(features, dtype, storage, tokens, options, rates)
        report["results"].append(result)
        write(table(result))
        if options.json:
            text = json.dumps(report, indent=1, allow_nan=False)
            options.json.write_text(text + "\n", encoding="utf-8")
    torch.set_float32_matmul_precision(precision)
    for line in not_run(report):
        write(line)
    return report


def measure_problem(
    features: int,
    dtype: str,
    storage: str,
    tokens: int,
    options: argparse.Namespace,
    rates: measure.Rates | None,
) -> dict[str, Any]:
    """One entry of the report's results."""
    rows, cols = flatquant.get_decompose_dim(features)
    result: dict[str, Any] = {
        "features": features,
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "dtype": dtype,
        "storage": storage,
        "implementations": {},
        "not_run": {},
    }
    try:
        problem = random_problem(rows, cols, tokens, dtype, storage)
    except torch.OutOfMemoryError:
        reason = f"out of memory at {tokens} tokens"
        result["not_run"] = dict.fromkeys(["flatquant", *options.peers], reason)
        return result
    result["bytes"], result["flops"] = problem.moved_bytes, problem.flops
    if rates is not None:
        result["floor_us"], result["bound"] = rates.floor(problem.moved_bytes, problem.flops, dtype)
    kernel = options.kernel
    if kernel == "auto":
        kernel = flatquant.available_kernels(rows, cols, peers.DTYPES[dtype], DEVICE)[0]
    result["kernel"] = kernel

    codes = None
    for name, build in builders(options, kernel).items():
        try:
            call = build(problem)
            if name in SLOW and options.slow_peers_at and features not in options.slow_peers_at:
                raise peers.CannotRun("slow to prepare, see --slow-peers-at")
            call(problem.inputs[0])
            output, peak = measure.peak_bytes(call, problem.inputs[0])
            entry: dict[str, Any] = {"peak_bytes": peak}
            if name == "flatquant":
                codes = first_codes(output, features)
                entry["output_bytes"] = sum(part.numel() * part.element_size() for part in output)
            elif name not in ("products", "hadamard", "copy") and codes is not None:
                other = first_codes(output, features)
                entry["mismatch"] = (other != codes).float().mean().item()
            del output  # large problems need its memory
            timing = measure.timed(
                call,
                problem.inputs,
                options.repeats,
                cuda_graph=options.cuda_graph,
                warm=options.warm,
            )
            result["implementations"][name] = {**timing._asdict(), **entry}
        except peers.CannotRun as reason:
            result["not_run"][name] = str(reason)
        except torch.OutOfMemoryError:
            result["not_run"][name] = f"out of memory at {tokens} tokens"
        except Exception as error:
            # A peer that breaks is no reason to lose the others; the operator's own errors are.
            if name == "flatquant":
                raise
            first_line = (str(error).splitlines() or [""])[0]
            result["not_run"][name] = f"{type(error).__name__}: {first_line}"
        call = None
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return result


def builders(options: argparse.Namespace, kernel: str) -> dict[str, peers.Peer]:
    """By the names of LABELS, in their order: the operator and the peers asked for."""
    every: dict[str, peers.Peer] = {
        "flatquant": functools.partial(peers.flatquant_kernel, kernel=kernel),
        "triton": peers.triton_kernel,
        "flatquant-repo": functools.partial(
            peers.flatquant_repo_kernel, repo=options.flatquant_repo
        ),
        "compile": peers.compiled,
        "products": peers.products,
        "eager": peers.eager,
        "hadamard": peers.hadamard,
        "copy": peers.copy,
    }
    return {name: every[name] for name in LABELS if name in ("flatquant", *options.peers)}


def random_problem(rows: int, cols: int, tokens: int, dtype: str, storage: str) -> peers.Problem:
    torch_dtype = peers.DTYPES[dtype]
    size = tokens * rows * cols * torch_dtype.itemsize
    sets = max(1, min(INPUT_SETS, INPUT_BYTES // size))

    def factor(size: int) -> torch.Tensor:
        return (torch.randn(size, size, device=DEVICE) / size**0.5).to(torch_dtype)

    return peers.Problem(
        [torch.randn(tokens, rows * cols, device=DEVICE, dtype=torch_dtype) for _ in range(sets)],
        factor(rows),
        factor(cols),
        dtype,
        storage == "int32",
    )


def first_codes(output: Any, features: int, tokens: int = 256) -> torch.Tensor:
    """int8 codes [tokens, features] of the first tokens, whatever the storage."""
    codes = output[0][:tokens].flatten(1)
    return codes if codes.shape[1] == features else unpack_int4(codes.view(torch.int8))


def describe(report: dict[str, Any]) -> str:
    """What runs where, in two lines."""
    environment, rates = report["environment"], report["rates"]
    if environment["gpu"] is None:
        return (
            f"No GPU with kernels (`python -m flatquant` tells why): torch {environment['torch']} "
            "on the CPU, flatquant is its reference in PyTorch"
        )
    graph = ", calls replayed from CUDA graphs" if report["method"]["cuda_graph"] else ""
    graph += "" if report["method"]["cold_l2"] else ", L2 cache warm"
    matmul = ", ".join(
        f"{dtype} matmul {rate:.0f} TFLOP/s" for dtype, rate in rates["matmul_tflop_per_s"].items()
    )
    return (
        f"{environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}, "
        f"CUDA {environment['cuda']}{graph}\ncopy {rates['copy_gb_per_s']:.0f} GB/s, {matmul}"
    )


def table(result: dict[str, Any]) -> str:
    """The lines of one problem."""
    title = (
        f"\n{result['features']} ({result['rows']}x{result['cols']}), {result['tokens']} tokens, "
        f"{result['dtype']}, {result['storage']}"
    )
    implementations = result["implementations"]
    if not implementations:
        return f"{title}: {result['not_run']['flatquant']}"
    lines = [f"{title}, kernel {result['kernel']}", HEADER]
    ours = implementations.get("flatquant", {}).get("us")
    floor = result.get("floor_us")
    for name, entry in implementations.items():
        us, peak = entry["us"], entry["peak_bytes"]
        spread = f"{entry['p10_us']:.1f} .. {entry['p90_us']:.1f}"
        of_floor = f"{floor / us:.2f}" if floor else "-"
        speed_up = f"{us / ours:.2f}x" if ours and name not in ("flatquant", "copy") else ""
        megabytes = f"{peak * 1e-6:.1f}" if peak is not None else "-"
        lines.append(
            f"  {LABELS[name]:<26}{us:10.1f} {spread:>19} {result['bytes'] / us * 1e-3:7.0f} "
            f"{result['flops'] / us * 1e-6:8.2f} {of_floor:>10} {speed_up:>12} {megabytes:>9}"
        )
        if entry.get("mismatch", 0) > WRONG:
            lines.append(f"  WARNING: {entry['mismatch']:.0%} of its codes differ from flatquant's")
    if floor:
        lines.append(f"  {'floor (' + result['bound'] + ')':<26}{floor:10.1f}")
    return "\n".join(lines)


def not_run(report: dict[str, Any]) -> list[str]:
    """A line for each reason: what could not run, why, and at which sizes if not at all."""
    where: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in report["results"]:
        for name, reason in result["not_run"].items():
            where.setdefault((name, reason), []).append(result)
    lines = ["\nNot run:"] if where else []
    for (name, reason), results in where.items():
        sizes = sorted({result["features"] for result in results})
        everywhere = len(results) == len(report["results"])
        at = "" if everywhere else f" ({', '.join(map(str, sizes))})"
        lines.append(f"  {LABELS[name]}: {reason}{at}")
    return lines


def progress(items: Sequence[Any], write: Write) -> tuple[Iterable[Any], Write]:
    """The items under a bar on a terminal, tqdm's or a plain one, and what writes beside it."""
    if not sys.stderr.isatty():
        return items, write
    try:
        from tqdm import tqdm
    except ImportError:
        clear = "\r\033[K"

        def with_bar() -> Iterator[Any]:
            for done, item in enumerate(items):
                bar = "#" * (30 * done // len(items))
                print(
                    f"{clear}[{bar:<30}] {done}/{len(items)}", end="", file=sys.stderr, flush=True
                )
                yield item
            print(clear, end="", file=sys.stderr, flush=True)

        def write_over_bar(text: str) -> None:
            print(clear, end="", file=sys.stderr, flush=True)
            write(text)

        return with_bar(), write_over_bar
    return tqdm(items, unit="problem", leave=False), tqdm.write


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print('--plot needs matplotlib: pip install -e ".[plots]"')
        return 1
    for model in options.model:
        layers = ", ".join(f"{name} {size}" for name, size in MODELS[model].layers.items())
        print(f"{model}: {layers}")
    report = run(options, write=lambda text: print(text, flush=True))
    if options.plot:
        import plots

        for path in plots.draw([report], options.plot):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
