"""How everything is timed: the only timing code of the benchmarks and of tests/test_performance.py.

On a GPU a time is that between two events around one call. Before each call the L2 cache is
overwritten, a sleep kernel lets the host run ahead (its own time is not measured), and the next of
several sets of random inputs is taken. Timed warm, calls follow each other in a CUDA graph, so that
the L2 cache holds what they need, and kernels that allow it overlap; the time is a call's share. On
the CPU it is wall-clock time of one call.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flatquant

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
SLEEP_CYCLES = 200_000  # some 100 us; doubled where the host needs longer to launch a call
MOST_SLEEP_CYCLES = 100_000_000
FEWEST_REPEATS = 7  # of a call that takes so long that the time allowed is up
WARM_CALLS = 100  # of a graph

Call = Callable[[Tensor], object]


class Timing(NamedTuple):
    """Microseconds of one call: the median, and the 10th and 90th percentile."""

    us: float
    p10_us: float
    p90_us: float
    repeats: int


class Rates(NamedTuple):
    """What the device was measured to reach, in the same run as everything else."""

    copy: float  # GB/s, bytes read + written
    matmul: dict[str, float]  # TFLOP/s, by a dtype of `measured_rates`

    def floor(self, moved: float, flops: float, dtype: str) -> tuple[float, str]:
        """Microseconds below which no kernel can be, and what sets them."""
        memory = moved / (self.copy * 1e3)
        compute = flops / (self.matmul[dtype] * 1e6)
        return max(memory, compute), "memory" if memory > compute else "compute"


def timed(
    call: Call,
    inputs: Sequence[Tensor],
    repeats: int = 30,
    seconds: float = 0.3,
    cuda_graph: bool = False,
    warm: bool = False,
) -> Timing:
    """Times `call` on each of `inputs` in turn.

    Args:
        call: what is timed; its result is dropped.
        inputs: of one shape; where the first one lies is where the call runs.
        repeats: how often, at most.
        seconds: stop after this time, but not before ``FEWEST_REPEATS``.
        cuda_graph: time the replay of a graph that holds the call.
        warm: time calls that follow each other in a graph, without overwriting the L2 cache.
    """
    on_gpu = inputs[0].is_cuda
    graph_calls = WARM_CALLS if warm and on_gpu else 1
    for x in inputs:
        call(x)
    calls = [functools.partial(call, x) for x in inputs]
    if (cuda_graph or warm) and on_gpu:
        calls = [_graph_replay(call, graph_calls) for call in calls]
    if on_gpu:
        calls[0]()
        torch.cuda.synchronize()
    times: list[float] = []
    cycles = SLEEP_CYCLES
    begin = time.perf_counter()
    while len(times) < repeats:
        if len(times) >= FEWEST_REPEATS and time.perf_counter() - begin > seconds:
            break
        one = calls[len(times) % len(calls)]
        if not on_gpu:
            start = time.perf_counter()
            one()
            times.append((time.perf_counter() - start) * 1e6)
            continue
        us, host_was_late = _event_time(one, cycles, flushes=not warm)
        if host_was_late and cycles < MOST_SLEEP_CYCLES:
            cycles *= 2
        else:
            times.append(us / graph_calls)
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return Timing(statistics.median(times), tenths[0], tenths[-1], len(times))


def _event_time(call: Callable[[], object], cycles: int, flushes: bool) -> tuple[float, bool]:
    """Time of one call in microseconds, and whether the GPU had to wait for the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flushes:
        _flush_buffer().zero_()
    torch.cuda._sleep(cycles)
    start.record()
    call()
    end.record()
    host_was_late = start.query()
    end.synchronize()
    return start.elapsed_time(end) * 1e3, host_was_late


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _graph_replay(call: Callable[[], object], calls: int) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def peak_bytes(call: Call, x: Tensor) -> tuple[object, int | None]:
    """The call's result, and the most device memory it held at once, its result included.

    None on the CPU, where torch does not count it. Call it once before: libraries allocate their
    workspace in their first call.
    """
    if not x.is_cuda:
        return call(x), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(x)
    return result, torch.cuda.max_memory_allocated() - before


def measured_rates(dtypes: Sequence[str]) -> Rates:
    """Rate of copying 4 GiB and of an 8192^3 matmul on the GPU, for the dtypes given.

    All are held to the rate of bfloat16, for float16 products are as precise as those of TF32
    ("tf32"); "float32" to a third of it: its accuracy takes three of them.
    """
    size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * size / timed(target.copy_, [source], 10).us / 1e3
    del source, target

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / timed(left.matmul, [right], 10).us / 1e6
    del left, right
    torch.cuda.empty_cache()
    return Rates(copy, {dtype: matmul / 3 if dtype == "float32" else matmul for dtype in dtypes})


def environment(commit: str | None = None) -> dict[str, str | None]:
    """What the numbers depend on. `commit` replaces what git says of the checkout."""
    root = Path(__file__).resolve().parents[1]
    on_gpu = flatquant.CUDA_AVAILABLE
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    described = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
        "flatquant": flatquant.__version__,
        "commit": commit or _output(*described, "--exclude", "*"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _output(*command: str) -> str | None:
    """First line that a program prints; None if there is no such program or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(result.stdout.splitlines()), None)
