"""Streams, threads, CUDA graphs and devices: what a serving engine does around a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from launches import (
    COUNTS,
    DEVICE,
    call,
    equal,
    kernels,
    quantize,
    variants,
)
from problems import DTYPES, NO_GPU, Problem, random_problem
from torch import Tensor

from flatquant import available_kernels, flatquant_dynamic_quantize, kronecker_transform

pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

THREADS, CALLS = 8, 1250


@pytest.mark.parametrize("M, N", [(64, 64), (128, 148)])
def test_work_runs_on_the_current_stream(M: int, N: int) -> None:
    problem = random_problem(M, N, 300, torch.float16, DEVICE)
    for kernel in kernels(M, N, torch.float16):
        expected = quantize(problem, kernel)
        late = Problem(torch.zeros_like(problem.input), *problem[1:])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # The input is written late: whoever does not wait for this stream reads zeros.
            torch.cuda._sleep(50_000_000)
            late.input.copy_(problem.input)
            got = call(late, kernel)
        stream.synchronize()
        assert equal(got, expected), kernel


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = random_problem(64, 64, 20, torch.float16, "cuda:0")
    moved = Problem(*(tensor.to("cuda:1") for tensor in problem))
    torch.cuda.set_device(0)
    for kernel in kernels(64, 64, torch.float16):
        if kernel in available_kernels(64, 64, torch.float16, "cuda:1"):
            codes, scales = flatquant_dynamic_quantize(*moved, kernel=kernel)
            assert codes.device == scales.device == moved.input.device
            assert torch.cuda.current_device() == 0
            assert equal((codes.to("cuda:0"), scales.to("cuda:0")), quantize(problem, kernel))


@pytest.mark.parametrize("M, N", [(64, 64), (128, 148)])
def test_a_call_returns_while_its_stream_is_still_busy(M: int, N: int) -> None:
    problem = random_problem(M, N, 300, torch.float16, DEVICE)
    stream = torch.cuda.Stream()
    for kernel, pack_int32 in variants(M, N, torch.float16):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            expected = call(problem, kernel, pack_int32)  # memory and set-up are there
            del expected
            stream.synchronize()
            torch.cuda._sleep(1_000_000_000)  # half a second
            start = time.perf_counter()
            got = call(problem, kernel, pack_int32)
            elapsed = time.perf_counter() - start
            busy = not stream.query()
        stream.synchronize()
        assert busy, f"{kernel} waited for its stream ({elapsed:.3f} s)"
        assert equal(got, quantize(problem, kernel)), kernel


def next_factor(y: Tensor, factor: Tensor) -> Tensor:
    """The factor times some elements of Y, as many tokens."""
    size = len(factor)
    source = y[:1].flatten().repeat(size)[: size * size].view(size, size)
    return kronecker_transform(source / (source.abs().max() * size**0.5), None, factor)


@pytest.mark.parametrize("in_graph", [False, True], ids=["calls", "graph"])
@pytest.mark.parametrize("tokens", [1, 140, 3000])
@pytest.mark.parametrize(
    "M, N, dtype",
    [
        *((M, N, torch.float16) for M, N in [(64, 64), (32, 48), (128, 148), (208, 256)]),
        (96, 128, torch.bfloat16),
        (64, 64, torch.float32),
    ],
    ids=str,
)
def test_a_call_waits_for_what_the_one_before_it_writes(
    M: int, N: int, dtype: torch.dtype, tokens: int, in_graph: bool
) -> None:
    """sm90 starts beside an sm90 before it (programmatic dependent launch)."""
    problem = random_problem(M, N, tokens, dtype, DEVICE)

    def chain(wait: Callable[[], None]) -> list[Tensor]:
        y, left, right = problem
        ratio: float | Tensor = 1.0
        results: list[Tensor] = []
        for step in range(4):
            y = kronecker_transform(y, left, right)
            wait()
            results += flatquant_dynamic_quantize(y, left, right, ratio)
            wait()
            ratio = results[-1][:1]  # any one float32 that the kernel before writes
            if step % 2 == 0:
                left = next_factor(y, left)
            else:
                right = next_factor(y, right)
            wait()
        return [*results, y, left, right]

    expected = chain(torch.cuda.synchronize)
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(lambda: None)
        for _ in range(3):
            for tensor in captured:
                tensor.zero_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    else:
        for _ in range(3):
            torch.cuda._sleep(20_000_000)  # so that the calls queue up behind it
            results = chain(lambda: None)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_several_streams_and_all_kernels_in_one_cuda_graph() -> None:
    """Captured with a fork and a join, replayed with new tokens and new factors."""
    works = [
        (kernel, pack_int32, random_problem(M, N, tokens, dtype, DEVICE))
        # 112 x 128 has tokens enough for blocks to share them out (see TokenSource).
        for (M, N), tokens in (
            *(((64, 64), 1), ((128, 148), 33), ((24, 24), 700), ((13, 17), 5)),
            ((112, 128), 4096),
        )
        for dtype in DTYPES
        for kernel, pack_int32 in variants(M, N, dtype)
    ]
    for kernel, pack_int32, problem in works:
        call(problem, kernel, pack_int32, 0.9)  # what is set up once is set up
    streams = [torch.cuda.Stream() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    captured = []
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(main)
        for i, (kernel, pack_int32, problem) in enumerate(works):
            with torch.cuda.stream(streams[i % 3]):
                captured.append(call(problem, kernel, pack_int32, 0.9))
        for stream in streams:
            main.wait_stream(stream)
    for _ in range(5):
        for _, _, problem in works:
            M, N = len(problem.left), len(problem.right)
            fresh = random_problem(M, N, len(problem.input), problem.input.dtype, DEVICE)
            for tensor, values in zip(problem, fresh, strict=True):
                tensor.copy_(values)
        graph.replay()
        for (kernel, pack_int32, problem), output in zip(works, captured, strict=True):
            expected = quantize(problem, kernel, pack_int32, 0.9)
            assert equal(output, expected), (kernel, pack_int32)
            COUNTS["calls replayed in CUDA graphs"] += 1


def test_ten_thousand_calls_of_eight_threads_on_eight_streams() -> None:
    """Each thread has its stream; all share factors and inputs, and begin at different problems."""
    works = [
        (kernel, pack_int32, random_problem(M, N, tokens, dtype, DEVICE))
        for M, N in ((64, 64), (112, 128), (24, 24), (128, 148), (13, 17))
        for tokens, dtype in ((1, DTYPES[0]), (37, DTYPES[1]), (200, DTYPES[0]), (16, DTYPES[2]))
        for kernel, pack_int32 in variants(M, N, dtype)
    ]
    # Tokens enough for blocks to share them out.
    shared_out = random_problem(112, 128, 2500, DTYPES[0], DEVICE)
    works += [("auto", True, shared_out), ("auto", False, shared_out)]
    expected = [call(problem, kernel, packed) for kernel, packed, problem in works]
    torch.cuda.synchronize()
    wrong: list[Tensor] = []
    errors: list[BaseException] = []
    together = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                count = torch.zeros((), dtype=torch.int64, device=DEVICE)
                together.wait(60)
                for i in range(CALLS):
                    chosen = (thread * len(works) // THREADS + i) % len(works)
                    kernel, packed, problem = works[chosen]
                    codes, scales = call(problem, kernel, packed)
                    count += (codes != expected[chosen][0]).any()
                    count += (scales != expected[chosen][1]).any()
                torch.cuda.current_stream().synchronize()
                wrong.append(count)
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert not errors and not any(worker.is_alive() for worker in workers), errors
    assert [int(count) for count in wrong] == [0] * THREADS
    COUNTS["calls from threads, equal to the serial ones"] += THREADS * CALLS
