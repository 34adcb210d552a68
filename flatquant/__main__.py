"""`python -m flatquant`: what is installed, and a correctness check on real activations."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import (
    CUDA_AVAILABLE,
    __cuda_archs__,
    __version__,
    available_kernels,
    get_decompose_dim,
    sample,
)
from ._library import LOAD_ERROR
from .sample import Result

LLM_FEATURES = (4096, 8192, 14336)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SQNR_NOTE = (
    "SQNR is taken in the original basis: int4 rounds the input as it is; FlatQuant's codes are\n"
    "dequantised and the transform is inverted in float64. Mean over the tokens."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if all results agree with float64, 1 if not, 2 for a wrong argument."""
    parser = _parser()
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    device = torch.device("cuda" if CUDA_AVAILABLE else "cpu")
    if args.features is None:
        title = "Real activations of SmolLM2-135M-Instruct"
        inputs = [item._replace(input=item.input[: args.tokens]) for item in sample.load()]
    else:
        title = "Synthetic activations with outlier channels"
        inputs = [sample.synthetic(args.features, args.tokens or 128)]
    inputs = [item.to(dtype, device) for item in inputs]

    kernels = []
    for item in inputs:
        names = available_kernels(len(item.left_trans), len(item.right_trans), dtype, device)
        if args.kernel not in ("auto", *names):
            parser.error(
                f"--kernel must be auto or one of {', '.join(names)} for {item.input.shape[1]} "
                f"features in {args.dtype} on this machine, got {args.kernel}"
            )
        kernels.append(names[0] if args.kernel == "auto" else args.kernel)

    system = _system(sorted({item.input.shape[1] for item in inputs} | {*LLM_FEATURES}), dtype)
    if not args.json:
        _print_system(system, args.dtype)
    results = [
        result
        for item, kernel in zip(inputs, kernels, strict=True)
        for result in sample.evaluate(item, [kernel])
    ]
    ok = all(result.ok for result in results)
    if args.json:
        print(json.dumps({**system, "results": [_json(r) for r in results], "ok": ok}, indent=2))
    else:
        _print_results(title, results)
        if system["gpu"] and not CUDA_AVAILABLE:
            print("NOTE: the GPU of this machine was not used; these are the reference's results.")
    return 0 if ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flatquant",
        description="Shows the installation, quantises activations to int4 and compares the codes "
        "with float64. Exit status 1 if they are wrong.",
    )
    parser.add_argument(
        "--features",
        type=_positive,
        help="quantise synthetic activations of this size instead of the shipped ones",
    )
    parser.add_argument(
        "--tokens", type=_positive, help="number of tokens (all shipped ones; 128 synthetic ones)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--kernel", default="auto", help="the best one by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _system(features: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Versions, GPU, compiled architectures and the kernels for each of `features`."""
    gpu = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    kernels = []
    for size in features:
        m, n = get_decompose_dim(size)
        kernels.append(
            {"features": size, "M": m, "N": n, "kernels": available_kernels(m, n, dtype)}
        )
    try:  # a wheel's version says what it was built with and for: 0.1.0+cu130.sm90
        distribution = f"flatquant-cutlass {importlib.metadata.version('flatquant-cutlass')}"
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        distribution = None
    return {
        "version": __version__,
        "distribution": distribution,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "extension_error": LOAD_ERROR,
        "compiled_archs": list(__cuda_archs__),
        "kernels": kernels,
    }


def _json(result: Result) -> dict[str, Any]:
    """The fields of a result, with None for NaN and Inf, which JSON does not have."""
    fields = {**vars(result), "ok": result.ok}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }


def _print_system(system: dict[str, Any], dtype: str) -> None:
    gpu = system["gpu"]
    archs = " ".join(f"sm_{arch}" for arch in system["compiled_archs"])
    rows = {
        "installed as": system["distribution"] or "not installed",
        "torch": f"{system['torch']}, CUDA {system['cuda'] or 'none'}",
        "GPU": f"{gpu['name']}, compute capability {gpu['compute_capability']}"
        if gpu
        else "no GPU",
        "compiled for": archs or f"nothing loaded: {system['extension_error']}",
    }
    print(f"flatquant {system['version']}")
    for label, text in rows.items():
        print(f"  {label:<14}{text}")
    print(f"\nKernels for {dtype}, best first")
    for row in system["kernels"]:
        size = f"{row['features']} = {row['M']} x {row['N']}"
        print(f"  {size:<20}{', '.join(row['kernels'])}")


def _print_results(title: str, results: Sequence[Result]) -> None:
    width = max(len(result.name) for result in results)
    print(f"\n{title}, {results[0].tokens} tokens, {results[0].dtype}")
    print(
        f"  {'input':<{width}}  {'M x N':<9}  {'kernel':<9}  storage  {'mismatch':>8}  max step"
        f"  SQNR int4  FlatQuant"
    )
    for r in results:
        print(
            f"  {r.name:<{width}}  {f'{r.M} x {r.N}':<9}  {r.kernel:<9}  {r.storage:<7}"
            f"  {r.mismatch:8.1e}  {r.max_step:8d}  {r.sqnr_plain:6.1f} dB  {r.sqnr:6.1f} dB"
        )
        print("".join(f"{failure}\n" for failure in r.failures), end="")
    print(f"\n{SQNR_NOTE}\n")
    wrong = sum(not result.ok for result in results)
    if wrong:
        print(f"WRONG: {wrong} of {len(results)} results disagree with float64")
    else:
        print(
            f"OK: all codes agree with float64 (at most one step off, in at most "
            f"{results[0].limit:.0e} of the elements)"
        )


if __name__ == "__main__":
    sys.exit(main())
