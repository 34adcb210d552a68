"""simt and plain for GPUs not at hand: they compile for them, and simt's PTX gives the same bits.

CUDA 13 compiles for 7.5 and later; NVRTC of CUDA 12 (in the test extra) for 6.0, 6.1 and 7.0 too.
The last test runs PTX for compute_60, which the driver translates for any newer GPU. On a machine
with a GPU and without NVRTC it takes the PTX from the file that FLATQUANT_SIMT_PTX names, written
by tests/simt_nvrtc.py elsewhere.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from host_programs import compile_program, output_of
from problems import DTYPES, NO_GPU, Problem, dtype_name, random_problem
from simt_nvrtc import NvrtcMissing, compile_simt, source_digest
from torch import Tensor

from flatquant import flatquant_dynamic_quantize

MANGLED = dict(zip(DTYPES, ("6__half", "13__nv_bfloat16", "f"), strict=True))
SHARED_LIMIT = 48 * 1024  # bytes a block may have on a GPU of compute capability 6
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


def compiled(architecture: str) -> bytes:
    try:
        return compile_simt(architecture)
    except NvrtcMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("architecture", ["sm_60", "sm_61", "sm_70"])
def test_kernels_compile_for_pascal_and_volta(architecture: str) -> None:
    code = compiled(architecture)
    assert code.startswith(b"\x7fELF")
    flags = int.from_bytes(code[48:52], "little")  # e_flags of a cubin end in the SM's number
    assert flags & 0xFF == int(architecture.removeprefix("sm_"))
    for name in MANGLED.values():
        for plan in ("Li8ELb0", "Li8ELb1", "Li7ELb1"):
            assert f".text._ZN9flatquant4simt6kernelI{name}{plan}EEEv".encode() in code
        assert f".text._ZN9flatquant5plain6kernelI{name}EEv".encode() in code


class CudaOutput(ctypes.Structure):
    """Output of csrc/problem.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        *((name, ctypes.c_float) for name in ("max_ratio", "min_ratio")),
        *((name, ctypes.c_void_p) for name in ("device_max_ratio", "device_min_ratio")),
    ]


class CudaProblem(ctypes.Structure):
    """Problem of csrc/problem.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "left", "right")),
        *((name, ctypes.c_int64) for name in ("tokens", "input_stride")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "left_repeats", "right_repeats")),
        *((name, ctypes.c_int) for name in ("dtype", "precision", "storage", "output_count")),
        ("outputs", CudaOutput * 8),
        ("transformed", ctypes.c_void_p),
        ("transformed_dtype", ctypes.c_int),
        ("counter", ctypes.c_void_p),
    ]


def test_the_structures_are_laid_out_as_in_the_header(tmp_path: Path) -> None:
    structures = {"Output": CudaOutput, "Problem": CudaProblem}
    lines = ["#include <cstddef>", "#include <cstdio>", '#include "problem.h"', "int main() {"]
    expected = []
    for name, structure in structures.items():
        lines.append(f'std::printf("%zu\\n", sizeof(flatquant::{name}));')
        expected.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            lines.append(f'std::printf("%zu\\n", offsetof(flatquant::{name}, {field}));')
            expected.append(getattr(structure, field).offset)
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join([*lines, "}"]))
    program = compile_program(source, tmp_path / "layout")
    assert list(map(int, output_of(program).split())) == expected


class Module:
    """The simt kernel from PTX, launched through the driver."""

    def __init__(self, ptx: bytes) -> None:
        torch.zeros(1, device="cuda")  # makes the context that everything else runs in
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.handle = ctypes.c_void_p()
        self.check(self.driver.cuModuleLoadData(ctypes.byref(self.handle), ptx + b"\0"))

    def check(self, result: int) -> None:
        text = ctypes.c_char_p()
        if result:
            self.driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {text.value!r}")

    def launch(self, name: str, blocks: int, threads: int, shared: int, *arguments: object) -> None:
        function = ctypes.c_void_p()
        self.check(
            self.driver.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode())
        )
        attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.check(self.driver.cuFuncSetAttribute(function, attribute, shared))
        pointers = [ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments]
        parameters = (ctypes.c_void_p * len(pointers))(*pointers)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(
            self.driver.cuLaunchKernel(
                function, blocks, 1, 1, threads, 1, 1, shared, stream, parameters, None
            )
        )

    def quantize(self, problem: Problem, clip_ratio: float, packed: bool) -> tuple[Tensor, Tensor]:
        x, left, right = problem
        tokens, features = x.shape
        rows, cols = len(left), len(right)

        storage, columns = (torch.int32, features // 8) if packed else (torch.int8, features)
        codes = torch.full((tokens, columns), 0x5A, dtype=storage, device="cuda")
        scales = torch.full((tokens,), -1.0, device="cuda")
        outputs = (CudaOutput * 8)(
            CudaOutput(codes.data_ptr(), scales.data_ptr(), clip_ratio, clip_ratio)
        )
        argument = CudaProblem(
            *(tensor.data_ptr() for tensor in (x, left, right)),
            tokens=tokens,
            input_stride=x.stride(0),
            rows=rows,
            cols=cols,
            left_repeats=1,
            right_repeats=1,
            dtype=DTYPES.index(x.dtype),
            storage=int(packed),
            output_count=1,
            outputs=outputs,
        )
        plan = torch.zeros(64, dtype=torch.int32, device="cuda")
        numbers = torch.zeros(6, dtype=torch.int32, device="cuda")
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (plan, numbers)]
        self.launch("make_plan", 1, 1, 0, argument, ctypes.c_int(SHARED_LIMIT), *pointers)
        per_block, threads, shared, plan_bytes, height, is_whole = numbers.tolist()
        assert shared <= SHARED_LIMIT and plan_bytes <= plan.nbytes
        self.launch(
            f"_ZN9flatquant4simt6kernelI{MANGLED[x.dtype]}Li{height}ELb{is_whole}EEEv"
            "NS_7ProblemENS0_4PlanE",
            -(-tokens // per_block),
            threads,
            shared,
            argument,
            (ctypes.c_int32 * len(plan))(*plan.tolist()),
        )
        torch.cuda.synchronize()
        return codes, scales


@pytest.fixture(scope="module")
def pascal() -> Iterator[Module]:
    path = os.environ.get("FLATQUANT_SIMT_PTX")
    ptx = Path(path).read_bytes() if path else compiled("compute_60")
    assert not path or source_digest().encode() in ptx, f"{path} is of another source"
    module = Module(ptx)
    yield module
    module.check(module.driver.cuModuleUnload(module.handle))


# Several tokens a block; sizes without padding, with tiles of seven rows too; large ones, which
# 48 KiB of shared memory cut into chunks and the memory that the built-in kernel asks for does not;
# odd sizes; W too large to be kept at all.
SIZES = [
    (24, 24),
    (64, 64),
    (64, 40),
    (56, 64),
    (128, 64),
    (86, 128),
    (112, 128),
    (128, 148),
    (128, 224),
    (208, 256),
    (1, 1),
    (13, 17),
    (33, 31),
    (64, 74),
    (112, 131),
    (300, 1),
    (8, 1005),
]


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("M, N", SIZES)
def test_ptx_for_pascal_gives_the_bits_of_the_built_in_kernel(
    pascal: Module, M: int, N: int, dtype: torch.dtype
) -> None:
    problem = random_problem(M, N, 301, dtype, "cuda")
    x = problem.input.clone()
    x[7, M * N // 2], x[8, 0], x[9] = float("nan"), float("inf"), 0.0
    problem = problem._replace(input=x)
    for packed in (False, True) if M * N % 8 == 0 else (False,):
        for clip_ratio in (1.0, 0.75):
            codes, scales = pascal.quantize(problem, clip_ratio, packed)
            expected = flatquant_dynamic_quantize(*problem, clip_ratio, packed, kernel="simt")
            assert torch.equal(codes, expected[0]), (packed, clip_ratio)
            assert torch.equal(scales.view(torch.int32), expected[1].view(torch.int32))
