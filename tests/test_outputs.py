"""Every byte of the outputs is written, and no byte of the memory around them."""

from __future__ import annotations

import pytest
import torch
from launches import COUNTS, DEVICE, by_dtype, call, equal, quantize, variants
from problems import NO_GPU, Problem, random_problem
from shapes import ODD, SHARDS
from torch import Tensor

from flatquant.accuracy import TOLERANCES

pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

MIB = 2**20
POISONS = (0x5A, 0xA5)


class Memory:
    """`size` bytes at `address` as torch.as_tensor takes them, owned by someone else."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def bytes_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


class Arena:
    """Known memory from which torch takes the outputs of the next call.

    A memory pool of its own hands out allocations of at most 1 MiB from segments of 2 MiB. Two of
    1 MiB fill one; freed, they are what the next outputs are cut from. A pad is kept in front.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.pool):
            halves = [torch.empty(MIB, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
            self.start = min(half.data_ptr() for half in halves)
            assert {half.data_ptr() for half in halves} == {self.start, self.start + MIB}
            del halves
            self.pad = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
        assert self.pad.data_ptr() == self.start
        self.memory = torch.as_tensor(Memory(self.start, 2 * MIB), device=DEVICE)
        assert self.memory.data_ptr() == self.start

    def call(
        self, problem: Problem, kernel: str, pack_int32: bool, poison: int
    ) -> tuple[Tensor, Tensor]:
        """The outputs, copied, after the rest of the arena has been found untouched."""
        self.memory.fill_(poison)
        with torch.cuda.use_mem_pool(self.pool):
            outputs = call(problem, kernel, pack_int32)
        inside = torch.zeros_like(self.memory, dtype=torch.bool)
        for output in outputs:
            start, end = (address - self.start for address in bytes_of(output))
            assert 4096 <= start <= end <= 2 * MIB - 4096, "not cut from the arena"
            inside[start:end] = True
        touched = int(((self.memory != poison) & ~inside).sum())
        assert touched == 0, f"{kernel} wrote {touched} bytes outside of its outputs"
        COUNTS["bytes of outputs checked"] += int(inside.sum())
        COUNTS["bytes around outputs checked"] += int((~inside).sum())
        codes, scales = outputs
        return codes.clone(), scales.clone()


@by_dtype
@pytest.mark.parametrize("tokens", [1, 2, 7, 133, 300])
def test_every_byte_of_the_outputs_is_written_and_none_around_them(
    tokens: int, dtype: torch.dtype
) -> None:
    arena = Arena()
    sizes = [*SHARDS, *ODD, (64, 64), (86, 128), (112, 128), (128, 148), (128, 224), (208, 256)]
    for M, N in sizes:
        count = min(tokens, (MIB - 8192) // (M * N))  # int8 codes of at most 1 MiB
        problem = random_problem(M, N, count, dtype, DEVICE)
        for kernel, pack_int32 in variants(M, N, dtype):
            # A byte that is not written keeps the poison, and the two runs differ in it.
            first, second = (arena.call(problem, kernel, pack_int32, p) for p in POISONS)
            assert equal(first, second), f"{kernel} left bytes of {M} x {N} unwritten"
            assert equal(first, quantize(problem, kernel)), (kernel, pack_int32, M, N)


def test_inputs_stay_as_they_are() -> None:
    for dtype in TOLERANCES:
        for M, N in ((64, 64), (86, 128), (13, 17)):
            problem = random_problem(M, N, 300, dtype, DEVICE)
            before = [tensor.clone() for tensor in problem]
            for kernel, pack_int32 in variants(M, N, dtype):
                quantize(problem, kernel, pack_int32)
                for tensor, values in zip(problem, before, strict=True):
                    assert torch.equal(tensor, values), kernel
