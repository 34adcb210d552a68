"""What the operator is compared with.

A peer is a function that takes a problem and gives the call to time, or raises `CannotRun` with the
reason. Those that quantise give `(codes, scales)` in the operator's storage.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import measure
import torch
from torch import Tensor

import flatquant
from flatquant.packing import pack_int4

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,  # at torch's default precision, "highest"
    "tf32": torch.float32,  # after torch.set_float32_matmul_precision("high")
}

# The operator and its peers, in the order of every table and legend.
LABELS = {
    "flatquant": "flatquant",
    "triton": "plain fused Triton",
    "flatquant-repo": "FlatQuant's Triton kernel",
    "compile": "torch.compile",
    "products": "the two matmuls alone",
    "eager": "eager PyTorch",
    "hadamard": "Hadamard + int4",
    "copy": "copy of the same bytes",
}

# (warps, programs per SM) of the plain Triton kernel; the fastest is its time.
TRITON_CHOICES = [(warps, blocks) for warps in (4, 8) for blocks in (1, 2, 4)]


class CannotRun(Exception):
    """Why a peer cannot run here, in words for the table."""


@dataclass(frozen=True)
class Problem:
    inputs: list[Tensor]  # several sets, each [tokens, M * N]
    left: Tensor  # [M, M]
    right: Tensor  # [N, N]
    dtype: str  # of DTYPES
    pack_int32: bool

    @property
    def rows(self) -> int:
        return len(self.left)

    @property
    def cols(self) -> int:
        return len(self.right)

    @property
    def moved_bytes(self) -> int:
        """Input read once, codes and scales written once; the factors are left out."""
        tokens, features = self.inputs[0].shape
        codes = features // 2 if self.pack_int32 else features
        return tokens * (features * self.left.element_size() + codes + 4)

    @property
    def flops(self) -> int:
        return 2 * self.inputs[0].numel() * (self.rows + self.cols)


Peer = Callable[[Problem], measure.Call]


def flatquant_kernel(problem: Problem, kernel: str = "auto") -> measure.Call:
    """The operator itself; on the CPU its reference."""
    left, right, pack = problem.left, problem.right, problem.pack_int32
    on_gpu = left.is_cuda
    names = flatquant.available_kernels(problem.rows, problem.cols, left.dtype, left.device)
    if kernel not in ("auto", *names):
        raise CannotRun(f"kernel {kernel} does not serve these sizes in {problem.dtype} here")
    return lambda x: flatquant.flatquant_dynamic_quantize(
        x, left, right, 1.0, pack, on_gpu, kernel=kernel
    )


def triton_kernel(problem: Problem) -> measure.Call:
    """baselines/triton_fused.py with the fastest of its launch settings."""
    _need_gpu(problem)
    try:
        import triton
        from baselines import triton_fused
    except ImportError:
        raise CannotRun("Triton is not installed") from None
    if DTYPES[problem.dtype] == torch.float32 or not problem.pack_int32 or problem.cols % 8:
        raise CannotRun("is written for 16-bit inputs, int32 storage and N a multiple of 8")
    padded = (triton.next_power_of_2(size) for size in (problem.rows, problem.cols))
    shared = torch.cuda.get_device_properties(problem.left.device).shared_memory_per_block_optin
    if sum(2 * max(16, size) ** 2 for size in padded) > shared:
        raise CannotRun("its padded factors exceed shared memory")
    best: tuple[float, measure.Call] | None = None
    for warps, blocks in TRITON_CHOICES:
        call = functools.partial(
            triton_fused.quantize,
            left=problem.left,
            right=problem.right,
            num_warps=warps,
            blocks_per_sm=blocks,
        )
        try:
            us = measure.timed(call, problem.inputs, repeats=5).us
        except triton.runtime.OutOfResources:
            continue
        if best is None or us < best[0]:
            best = us, call
    if best is None:
        raise CannotRun("no launch setting of it fits this GPU")
    return best[1]


def flatquant_repo_kernel(problem: Problem, repo: Path | None = None) -> measure.Call:
    """The Triton kernel of FlatQuant's deploy code, from a checkout of its repository."""
    _need_gpu(problem)
    if repo is None:
        raise CannotRun("needs --flatquant-repo PATH, a checkout of ruikangliu/FlatQuant")
    if problem.dtype != "float16" or not problem.pack_int32 or problem.cols % 2:
        raise CannotRun("is written for float16, packed codes and even N")
    kron_matmul = _kron_matmul(repo)
    # It multiplies left @ X @ right, and its grid is (.., seq_len, tokens / seq_len).
    left = problem.left.T.contiguous()
    tokens = len(problem.inputs[0])
    seq_len = math.gcd(tokens, 1 << 15)
    # Clipping goes through a sigmoid, which is 1 here.
    return lambda x: kron_matmul(
        left, x.view(tokens, problem.rows, problem.cols), problem.right, seq_len, 100.0, 100.0
    )


@functools.cache
def _kron_matmul(repo: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    path = repo / "deploy" / "kernels" / "kron_matmul.py"
    if not path.is_file():
        raise CannotRun(f"{path} does not exist")
    # Importing the package would need its compiled extension; the file needs two of its names.
    deploy, nn, quantization = (
        ModuleType(name) for name in ("deploy", "deploy.nn", "deploy.nn.quantization")
    )
    deploy.PackedQuantizedTensor = lambda codes, scales: (codes, scales)
    quantization.Quantizer = None
    spec = importlib.util.spec_from_file_location("flatquant_repo_kron_matmul", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    names = {stub.__name__: stub for stub in (deploy, nn, quantization)}
    sys.modules.update(names)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise CannotRun(f"its file needs {error.name}, which is not installed") from None
    finally:
        for name in names:
            del sys.modules[name]
    return module.kron_matmul


def products(problem: Problem) -> measure.Call:
    """The two matrix products alone (cuBLAS on a GPU): no unfused version is faster."""
    return lambda x: _transform(x, problem.left, problem.right)


def eager(problem: Problem) -> measure.Call:
    """Two `torch.matmul`, then PyTorch operations that quantise and pack."""
    return lambda x: _quantize(_transform(x, problem.left, problem.right), problem.pack_int32)


def compiled(problem: Problem) -> measure.Call:
    """`eager` under torch.compile: factor sizes static, the number of tokens dynamic."""
    _need_gpu(problem)
    function = _compile(_transform_and_quantize)
    _mark_tokens_dynamic(problem.inputs)
    return lambda x: function(x, problem.left, problem.right, problem.pack_int32)


def hadamard(problem: Problem) -> measure.Call:
    """A Hadamard transform of the whole token, then compiled quantisation and packing."""
    _need_gpu(problem)
    try:
        import fast_hadamard_transform
    except ImportError:
        raise CannotRun("the package fast-hadamard-transform is not installed") from None
    features = problem.rows * problem.cols
    transform = _hadamard_of(fast_hadamard_transform, features)
    quantize = _compile(_quantize)

    def call(x: Tensor) -> object:
        transformed = transform(x, features**-0.5)
        _mark_tokens_dynamic([transformed])
        return quantize(transformed, problem.pack_int32)

    return call


def _hadamard_of(package: Any, features: int) -> Callable[[Tensor, float], Tensor]:
    """The package's function for this size: 2^k, or 2^k times 12, 20, 28 or 40."""
    for base in (1, 12, 20, 28, 40):
        rest, remainder = divmod(features, base)
        function = getattr(package, f"hadamard_transform{f'_{base}N' if base > 1 else ''}", None)
        if remainder == 0 and rest & (rest - 1) == 0 and function is not None:
            return function
    raise CannotRun("the installed fast-hadamard-transform has no transform of this size")


def copy(problem: Problem) -> measure.Call:
    """A device copy that reads and writes as many bytes together as the operator."""
    source = torch.empty(problem.moved_bytes // 2, dtype=torch.uint8, device=problem.left.device)
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def _need_gpu(problem: Problem) -> None:
    if not problem.left.is_cuda:
        raise CannotRun("needs a GPU")


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # One entry for each size and dtype; dynamic=False keeps all but the marked sizes static.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, fullgraph=True, dynamic=False)


def _mark_tokens_dynamic(inputs: list[Tensor]) -> None:
    for x in inputs:
        torch._dynamo.maybe_mark_dynamic(x, 0)


def _transform(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    tokens = x.view(len(x), len(left), len(right))
    return torch.matmul(torch.matmul(left.T, tokens), right).view(x.shape)


def _quantize(transformed: Tensor, pack_int32: bool) -> tuple[Tensor, Tensor]:
    scales = transformed.abs().amax(-1).float() / 7
    codes = (transformed / scales[:, None]).round_().clamp_(-8, 7).to(torch.int8)
    return (pack_int4(codes) if pack_int32 else codes), scales


def _transform_and_quantize(
    x: Tensor, left: Tensor, right: Tensor, pack_int32: bool
) -> tuple[Tensor, Tensor]:
    return _quantize(_transform(x, left, right), pack_int32)
