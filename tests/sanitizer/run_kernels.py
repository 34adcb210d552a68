"""A reduced suite for compute-sanitizer: every kernel, storage and dtype on ragged shapes.

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

from flatquant import accuracy, available_kernels, flatquant_dynamic_quantize, ops
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu tries the suite on the reference")
    device = parser.parse_args().device
    if device == "cuda" and NO_GPU:
        print(NO_GPU)
        return 2
    if device == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("set PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        return 2
    torch.manual_seed(0)
    launches: dict[str, int] = {}
    wrong = 0
    for M, N, tokens in SHAPES:
        tokens = min(tokens, 9) if device == "cpu" else tokens
        for dtype in DTYPES:
            problem = random_problem(M, N, tokens, dtype)
            left, right = (factor.to(device) for factor in problem[1:])
            names = available_kernels(M, N, dtype, device)
            for x in layouts(problem.input):
                exact = float64(Problem(x, *problem[1:]))
                for kernel in names if device == "cpu" else names[:-1]:
                    if x.stride(0) * dtype.itemsize % ops._ALIGNMENT.get(kernel, 1) != 0:
                        continue
                    codes_by_storage = []
                    for pack_int32 in (False, True) if M * N % 8 == 0 else (False,):
                        quantized, scales = (
                            result.cpu()
                            for result in flatquant_dynamic_quantize(
                                to_device(x, device),
                                left,
                                right,
                                0.9,
                                pack_int32,
                                device == "cuda",
                                kernel=kernel,
                            )
                        )
                        codes = unpack_int4(quantized) if pack_int32 else quantized
                        codes_by_storage.append(codes)
                        result = accuracy.compare(codes, scales, exact, 0.9, dtype)
                        if result.max_step > 1 or not torch.equal(codes, codes_by_storage[0]):
                            wrong += 1
                            print(f"WRONG: {kernel} {M}x{N} {dtype_name(dtype)}: {result}")
                        launches[kernel] = launches.get(kernel, 0) + 1
    counts = ", ".join(f"{count} of {kernel}" for kernel, count in launches.items())
    print(f"launches: {counts}; wrong results: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
