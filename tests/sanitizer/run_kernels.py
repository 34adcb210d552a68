"""A reduced suite for compute-sanitizer: every kernel, operator, storage and dtype, ragged shapes.

scripts/sanitize.sh runs it once under each tool. Data come from the host by copies and go back by
copies, so that no other kernel runs, and every tensor is its own allocation
(PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that its ends are known to the tools: memcheck sees an access
past them, initcheck a byte of the results that no kernel has written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from problems import DTYPES, NO_GPU, Problem, dtype_name, float64, random_problem

from flatquant import (
    accuracy,
    available_kernels,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    kronecker_transform,
    ops,
    reference,
)
from flatquant.packing import unpack_int4

# (M, N, tokens): one for each number of row tiles and each way to store codes, padded on either
# side, tokens that go round the ring of stages, and the shapes that fit no tensor core.
SHAPES = [
    (64, 64, 300),
    (24, 24, 150),
    (16, 16, 5000),
    (8, 40, 7),
    (64, 104, 140),
    (86, 128, 133),
    (128, 144, 3),
    (128, 224, 2),
    (161, 176, 2),
    (192, 192, 1),
    (128, 148, 2),
    (208, 256, 1),
    (13, 17, 9),
    (1, 8, 3),
    (7, 1, 2),
    (1, 1, 1),
]
# Of these one kernel alone: tokens that go round its ring, ragged ones, slices of such as a cluster
# works on, or such in whose place W comes; rows that two warps store together.
SHAPES_OF_ONE = {
    (48, 60, 1700): "sm90",
    (128, 144, 600): "sm90",
    (142, 192, 300): "sm90",
    (208, 256, 150): "sm90",
    (32, 64, 3300): "sm90",
    (128, 148, 300): "sm80",
    (40, 131, 9): "sm80",
}
# Of these the other operators too, with fewer tokens.
SHAPES_OF_ALL = [(64, 64), (24, 24), (86, 128), (128, 148), (208, 256), (13, 17), (1, 8)]
# Where sm90 has TMA store codes of 16-bit inputs, which initcheck does not see.
BULK_STORES = {(86, 128), (142, 192), (48, 60), (128, 148)}
CLIP_RATIOS = [1.0, (0.9, 0.3), (1e-4, 1.0)]

wrong = 0
launches: dict[str, int] = {}


def layouts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tokens one after another; apart; and overlapping by all but eight elements."""
    tokens, features = x.shape
    yield x
    if 1 < tokens < 10:
        apart = torch.cat((x, torch.full((tokens, 24), float("nan"), dtype=x.dtype)), dim=1)
        yield apart[:, :features]
        if features >= 8:
            yield x.as_strided((tokens, features), (8, 1))


def to_device(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy with the strides of x, of exactly the memory that it spans."""
    span = (len(x) - 1) * x.stride(0) + x.shape[1]
    return x.as_strided((span,), (1,)).contiguous().to(device).as_strided(x.shape, x.stride())


def check(name: str, kernel: str, *outputs: bool | accuracy.Comparison) -> None:
    """Counts a launch, and what is wrong with its outputs."""
    global wrong
    launches[kernel] = launches.get(kernel, 0) + 1
    for output in outputs:
        ok = output if isinstance(output, bool) else output.max_step <= 1
        if not ok:
            wrong += 1
            print(f"WRONG: {kernel} {name}: {output}")


def check_quantize(problem: Problem, kernel: str, device: str) -> None:
    x, left, right = problem
    name = f"{len(left)}x{len(right)} {dtype_name(x.dtype)}"
    exact = float64(problem)
    results = []
    for pack_int32 in (False, True) if x.shape[1] % 8 == 0 else (False,):
        quantized, scales = flatquant_dynamic_quantize(
            *(to_device(x, device), left.to(device), right.to(device), 0.9, pack_int32),
            device == "cuda",
            kernel=kernel,
        )
        quantized = quantized.cpu()
        results.append(unpack_int4(quantized) if pack_int32 else quantized)
        result = accuracy.compare(results[-1], scales.cpu(), exact, 0.9, x.dtype)
        check(name, kernel, result, torch.equal(results[0], results[-1]))


def check_special(problem: Problem, kernel: str, device: str) -> None:
    """NaN, Inf and values that overflow on the way, for which tokens are computed again."""
    x, left, right = problem
    x = x.clone()
    for first, value in enumerate((float("nan"), float("inf"), torch.finfo(x.dtype).max), 1):
        x[first::4] = value
    quantized, scales = flatquant_dynamic_quantize(
        *(factor.to(device) for factor in (x, left, right)),
        1.0,
        False,
        device == "cuda",
        kernel=kernel,
    )
    quantized, scales = quantized.cpu(), scales.cpu()
    finite = scales.isfinite()  # of the largest values too, where Y is in float32's range
    exact = float64(problem._replace(input=x))[finite]
    result = accuracy.compare(quantized[finite], scales[finite], exact, 1.0, x.dtype)
    check(
        f"{len(left)}x{len(right)} {dtype_name(x.dtype)}, special tokens",
        kernel,
        result,
        bool(finite[::4].all()) and not (finite[1::4].any() or finite[2::4].any()),
        not quantized[~finite].any(),
    )


def check_all(problem: Problem, kernel: str, device: str) -> None:
    """Several outputs, with ratios here and there; Y; with one factor or, by "plain", without."""
    use_cuda = device == "cuda"
    x, left, right = problem
    ratios = [*CLIP_RATIOS, (torch.tensor(0.7).to(device), 1.0)]
    both, only_left, only_right = (left, right), (left, None), (None, right)
    for factors in [(None, None)] if kernel == "plain" else [both, only_left, only_right]:
        sizes = "x".join("-" if factor is None else str(len(factor)) for factor in factors)
        name = f"{sizes} {dtype_name(x.dtype)}"
        exact = reference.transform(x, *factors, torch.float64)
        arguments = (
            x.to(device),
            *(None if factor is None else factor.to(device) for factor in factors),
        )
        outputs = flatquant_dynamic_quantize_many(
            *arguments, ratios, x.shape[1] % 8 == 0, use_cuda, kernel=kernel
        )
        check(
            name,
            kernel,
            *(
                accuracy.compare(codes.cpu(), scales.cpu(), exact, ratio, x.dtype)
                for (codes, scales), ratio in zip(outputs, [*CLIP_RATIOS, (0.7, 1.0)], strict=True)
            ),
        )
        if kernel == "plain":
            continue
        for dtype in (torch.float32, torch.float16):
            y = kronecker_transform(*arguments, dtype, use_cuda, kernel=kernel).cpu()
            error = (y - exact).abs() / exact.abs().amax(1, keepdim=True).clamp(min=1e-30)
            check(name, kernel, bool((error.nan_to_num() < 0.05).all()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu tries the suite on the reference")
    parser.add_argument(
        "--no-bulk-stores", action="store_true", help="without sm90 where TMA stores"
    )
    parser.add_argument("--kernel", help="this one alone, such as sm80")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and NO_GPU:
        print(NO_GPU)
        return 2
    if device == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("set PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        return 2

    def is_wanted(kernel: str) -> bool:
        return arguments.kernel in (None, kernel)

    torch.manual_seed(0)
    for shape in [*SHAPES, *SHAPES_OF_ONE]:
        M, N, tokens = shape
        tokens = min(tokens, 9) if device == "cpu" else tokens
        for dtype in DTYPES:
            problem = random_problem(M, N, tokens, dtype)
            names = available_kernels(M, N, dtype, device)
            if device == "cuda":
                names = names[:-1]  # but the reference, which launches nothing to look at
            if shape in SHAPES_OF_ONE:
                names = [name for name in names if name in (SHAPES_OF_ONE[shape], "reference")]
            if arguments.no_bulk_stores and (M, N) in BULK_STORES and dtype != torch.float32:
                names = [name for name in names if name != "sm90"]
            for kernel in filter(is_wanted, names):
                for x in layouts(problem.input):
                    if x.stride(0) * dtype.itemsize % ops._ALIGNMENT.get(kernel, 1) == 0:
                        check_quantize(problem._replace(input=x), kernel, device)
            if shape in SHAPES and (M, N) in SHAPES_OF_ALL:
                few = problem._replace(input=problem.input[:40])
                for kernel in filter(is_wanted, names if device == "cpu" else [*names, "plain"]):
                    check_all(few, kernel, device)
            if (M, N) in SHAPES_OF_ALL or (M, N) == (16, 16):
                few = problem._replace(input=problem.input[:15])
                for kernel in filter(is_wanted, names):
                    check_special(few, kernel, device)
    counts = ", ".join(f"{count} of {kernel}" for kernel, count in launches.items())
    print(f"launches: {counts}; wrong results: {wrong}")
    return 1 if wrong or not launches else 0


if __name__ == "__main__":
    sys.exit(main())
