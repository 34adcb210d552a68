"""The kernels' own source, run on the host by the emulator in tests/emulator.

The emulator implements what the PTX ISA says of mbarriers, the copy engine, wgmma, cp.async and
mma, asynchronous and interleaved at random; what breaks a rule ends its process with a message. The
emulator is tested too: with CuTe's layouts, with the PTX of the functions that it replaces, and
with mistakes that it must notice.

It does not model time, caches, bank conflicts, what the compilers make of the source (registers,
spills, the order of ordinary accesses), whether a warp has converged, the tensor cores' rounding
within a sum, rcp.approx, and whose stores a proxy fence covers (one thread's covers all before it).
"""

from __future__ import annotations

import re
import runpy
import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from problems import DTYPES, Exact, Problem, dtype_name, exact_problem, float64, random_problem
from torch import Tensor

from flatquant import accuracy
from flatquant.packing import unpack_int4

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
FLOAT16, BFLOAT16, FLOAT32 = DTYPES


class Toolchain:
    """Compilers and headers; skips the test without them."""

    def __init__(self) -> None:
        setup = runpy.run_path(str(ROOT / "setup.py"))
        self.cutlass = runpy.run_path(str(ROOT / "third_party" / "cutlass.py"))
        self.compiler, self.nvcc = shutil.which("g++"), setup["find_nvcc"]()
        if self.compiler is None:
            pytest.skip("no g++ for the emulator")
        if self.nvcc is None:
            pytest.skip("no CUDA toolkit, whose headers the emulator needs")
        self.headers = setup["Toolkit"](self.nvcc).include

    def compile(self, source: str, target: Path, *flags: str) -> Path:
        """The program (or with nvcc the PTX) of tests/emulator/`source`."""
        command = [self.nvcc if source.endswith(".cu") else self.compiler, "-std=c++17"]
        command += [*flags, f"-I{ROOT / 'csrc'}"]
        for path in self.headers:
            command += ["-isystem", path, "-isystem", f"{path}/cccl"]
        command += [str(EMULATOR / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile:\n{done.stderr[:10000]}"
        return target

    def compile_driver(self, name: str, folder: Path) -> Path:
        """A program that runs in the emulator: its sm90/hopper.cuh is found before the true one."""
        checks = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover", "-fno-strict-aliasing"]
        flags = [f"-I{EMULATOR}", "-O1", "-w", *checks]
        return self.compile(f"{name}.cpp", folder / name, *flags)

    def cutlass_include(self) -> str:
        try:
            return str(self.cutlass["include_dir"]())
        except self.cutlass["CutlassError"] as error:
            pytest.skip(f"no CUTLASS headers: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return Toolchain()


@pytest.fixture(scope="session")
def sm90(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolchain.compile_driver("run_sm90", tmp_path_factory.mktemp("sm90"))


@pytest.fixture(scope="session")
def sm80(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolchain.compile_driver("run_sm80", tmp_path_factory.mktemp("sm80"))


@pytest.fixture(scope="session")
def simt(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolchain.compile_driver("run_simt", tmp_path_factory.mktemp("simt"))


@dataclass(frozen=True)
class Case:
    """One launch. `gap` are the elements between two tokens; `blocks` is the grid."""

    rows: int
    cols: int
    tokens: int
    dtype: torch.dtype = FLOAT16
    packed: bool = True
    clip_ratio: float = 1.0
    gap: int = 0
    blocks: int = 2

    def __str__(self) -> str:
        name = f"{self.rows}x{self.cols}-{self.tokens}-{dtype_name(self.dtype)}"
        name += "-int4" if self.packed else "-int8"
        name += f"-clip{self.clip_ratio}" if self.clip_ratio != 1.0 else ""
        return name + (f"-gap{self.gap}" if self.gap else "")

    def random_problem(self) -> Problem:
        return random_problem(self.rows, self.cols, self.tokens, self.dtype)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def launch(
    program: Path, folder: Path, case: Case, problem: Problem, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as stored and scales. The order in which threads run is drawn, or is that of `seed`."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    features = case.rows * case.cols
    stride = features + case.gap
    x = torch.full((case.tokens, stride), float("nan"), dtype=case.dtype)
    x[:, :features] = problem.input
    x = x.flatten()[: x.numel() - case.gap]
    poison = 1 + seed % 255  # what the results' memory holds before
    header = struct.pack(
        "<9qd",
        *(case.rows, case.cols, case.tokens, stride, DTYPES.index(case.dtype), int(case.packed)),
        *(case.blocks, seed, poison, case.clip_ratio),
    )
    source, target = folder / "case", folder / "result"
    source.write_bytes(header + raw(x) + raw(problem.left) + raw(problem.right))
    run = subprocess.run([program, source, target], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{case}, order {seed}: {run.stderr or run.returncode}"
    result = torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.uint8)
    codes = result[: -4 * case.tokens].view(torch.int32 if case.packed else torch.int8)
    scales = result[-4 * case.tokens :].clone().view(torch.float32)
    return codes.view(case.tokens, -1), scales


def check(case: Case, result: tuple[Tensor, Tensor], problem: Problem) -> None:
    """Against float64. The cases are small, so the share of differing codes is held loosely."""
    found = accuracy.compare(*result, float64(problem), case.clip_ratio, case.dtype)
    tolerance = found.tolerance
    assert found.scale_error <= tolerance.transform, f"{case}: {found}"
    assert found.max_step <= 1, f"{case}: {found}"
    assert found.max_distance <= 14 / case.clip_ratio * tolerance.transform, f"{case}: {found}"
    codes = found.tokens * found.features
    assert found.mismatches <= 4 * max(1.0, tolerance.mismatch * codes), f"{case}: {found}"


def check_exact(case: Case, result: tuple[Tensor, Tensor], exact: Exact) -> None:
    codes, scales = result
    if case.packed:
        codes = unpack_int4(codes)
    assert torch.equal(codes, exact.codes)
    assert torch.equal(scales, exact.scales)


# ------------------------------------------------------------------------- the emulator itself


def test_layouts_are_those_of_cute(toolchain: Toolchain, tmp_path: Path) -> None:
    """Also the emulator's descriptors; the true csrc/sm90/hopper.cuh, by the host compiler."""
    flags = ["-O1", "-w", "-isystem", toolchain.cutlass_include()]
    program = toolchain.compile("checks/layouts.cpp", tmp_path / "layouts", *flags)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert re.search(r"\b[1-9]\d{5,} comparisons, 0 wrong", run.stdout), run.stdout


INSTRUCTIONS = {
    "named_barrier": [r"bar\.sync 11, 96;"],  # CUTLASS keeps 0..7; there are 16
    "mbarrier": [
        r"mbarrier\.init\.shared::cta\.b64 \[\S+\], 5;",
        r"fence\.mbarrier_init\.release\.cluster;",
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[\S+\], 4096;",
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[\S+\], 1, ",
    ],
    "copy": [
        r"cp\.async\.bulk\.tensor\.3d\.shared::cluster\.global\.mbarrier::complete_tx::bytes",
        r"fence\.proxy\.async\.shared::cta;",
    ],
    # The ones at the end: A and B not negated, and contiguous along M and N.
    "products": [
        r"wgmma\.fence\.sync\.aligned;",
        r"setp\.ne\.b32 p, 0, 0;\s*wgmma\.mma_async\.sync\.aligned\.m64n24k16\.f32\.f16\.f16 "
        r"\{[^}]*\}, %rd\d+, %rd\d+, p, +1, 1, 1, 1;",
        r"setp\.ne\.b32 p, 1, 0;\s*wgmma\.mma_async\.sync\.aligned\.m64n24k16\.f32\.bf16\.bf16 "
        r"\{[^}]*\}, *\{[^}]*\}, %rd\d+, p, +1, 1, 1;",
        r"wgmma\.commit_group\.sync\.aligned;",
        r"wgmma\.wait_group\.sync\.aligned 0;",
    ],
    "copies": [
        r"cp\.async\.ca\.shared\.global\S* \[\S+\], \[\S+\], 4, ",
        r"cp\.async\.ca\.shared\.global\S* \[\S+\], \[\S+\], 16, ",
        r"cp\.async\.commit_group;",
        r"cp\.async\.wait_(all|group 0);",
    ],
}


SM80_INSTRUCTIONS = {
    "named_barrier": [r"bar\.sync 3, 96;"],
    "copy": [
        r"cp\.async\.cg\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
        r"cp\.async\.ca\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 8, %r\d+;",
        r"cp\.async\.ca\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 4, %r\d+;",
        r"cp\.async\.commit_group;",
        r"cp\.async\.wait_group 3;",
        r"cp\.async\.wait_all;",
    ],
    "products": [
        r"ldmatrix\.sync\.aligned\.x4\.trans\.m8n8\.shared\.b16 ",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    ],
}


@pytest.mark.parametrize(
    "source, architecture, instructions",
    [
        ("instructions.cu", "sm_90a", INSTRUCTIONS),
        ("instructions_sm80.cu", "sm_80", SM80_INSTRUCTIONS),
    ],
)
def test_functions_are_the_instructions_emulated(
    toolchain: Toolchain,
    tmp_path: Path,
    source: str,
    architecture: str,
    instructions: dict[str, list[str]],
) -> None:
    flags = ["-ptx", f"-arch={architecture}", "--expt-relaxed-constexpr"]
    flags += ["-isystem", toolchain.cutlass_include()]
    text = toolchain.compile(f"checks/{source}", tmp_path / "ptx", *flags).read_text()
    for kernel, patterns in instructions.items():
        body = re.search(rf"\.entry {kernel}\((.*?)(\.entry|\Z)", text, re.S)
        assert body, f"no kernel {kernel} in the PTX"
        code = body[1]
        for register, value in re.findall(r"mov\.[ubs]32\s+(%r\d+), (-?\d+);", code):
            code = re.sub(rf"{register}\b", value, code)
        at = 0
        for pattern in patterns:
            found = re.compile(pattern).search(code, at)
            assert found, f"{kernel}: no {pattern!r} (in this order) in\n{code}"
            at = found.end()


MISTAKES = {
    "no init": "no mbarrier was initialised",
    "no init fence": "no fence",
    "overwritten barrier": "overwritten",
    "overflow": "a store .* into the shared memory",
    "early exit": "in flight|wrong product",
    "too many bytes": "(?s)deadlock.*128 threads .*mbarrier.* 16 bytes to come",
    "two arrivals": "an arrival too many",
    "misaligned copy": "not aligned to 128 bytes",
    "barrier counts": "others wait at it as",
    "partial barrier": "(?s)deadlock.*barrier 8: 96 of 128",
    "no wait": "wrong product|in flight",
    "wrong parity": "deadlock|wrong product",
    "store without fence": "wrong product",
    "no wgmma fence": "without a fence",
    "write after fence": "written after the fence",
    "descriptors disagree": "disagree",
    "write to accumulators": "written while wgmma had it",
    "early use": "wrong product",
    "no commit": "wrong product|in flight|waited for",
    "no wait for wgmma": "in flight|waited for",
}


SM80_MISTAKES = {
    "no commit": "wrong result|in flight",
    "no wait": "wrong result|in flight",
    "too many pending": "wrong result|in flight",
    "no barrier": "wrong result",
    "misaligned copy": "cp.async to .* not aligned to 4 bytes",
    "misaligned row": "ldmatrix of a row .* not aligned to 16 bytes",
}


@pytest.mark.parametrize(
    "name, right, mistakes",
    [
        ("check_emulator", ["none", "store with fence"], MISTAKES),
        ("check_sm80", ["none"], SM80_MISTAKES),
    ],
    ids=["check_emulator", "check_sm80"],
)
def test_emulator_notices_mistakes(
    toolchain: Toolchain, tmp_path: Path, name: str, right: list[str], mistakes: dict[str, str]
) -> None:
    program = toolchain.compile_driver(name, tmp_path)
    for variant in right:
        run = subprocess.run([program, variant], capture_output=True, text=True)
        assert run.returncode == 0, f"{variant}: {run.stderr}"
    for mistake, message in mistakes.items():
        run = subprocess.run([program, mistake], capture_output=True, text=True)
        assert run.returncode == 1 and re.search(message, run.stderr), f"{mistake}: {run.stderr}"


# ------------------------------------------------------------------------------------- sm90


def shape_classes() -> list[tuple[int, int]]:
    """(depth, cols) of every class in csrc/sm90/config.h."""
    text = (ROOT / "csrc" / "sm90" / "config.h").read_text()
    table = re.search(r"ShapeClass shape_classes\[\] = \{(.*?)\};", text, re.S)
    assert table, "csrc/sm90/config.h has no shape_classes"
    return [(int(depth), int(cols)) for depth, cols in re.findall(r"(\d+), (\d+)", table[1])]


def class_cases() -> list[Case]:
    """Each class full and not full, in both dtypes and storages."""
    cases = []
    for i, (depth, cols) in enumerate(shape_classes()):
        tokens = 227 * 1024 // (2 * depth * cols) + 3  # more than stages
        for dtype, packed in [(FLOAT16, i % 2 == 0), (BFLOAT16, i % 2 == 1)]:
            cases.append(Case(depth, cols, min(tokens, 36), dtype, packed, blocks=1))
            cases.append(Case(depth - 1 - i % 15, cols - 8, 7, dtype, not packed))
    return cases


@pytest.mark.parametrize("case", class_cases(), ids=str)
def test_sm90_in_every_class(sm90: Path, tmp_path: Path, case: Case) -> None:
    problem = case.random_problem()
    check(case, launch(sm90, tmp_path, case, problem), problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 8, 3),
        Case(1, 8, 3, packed=False),
        Case(17, 24, 1, blocks=1),  # one token
        Case(130, 160, 12, blocks=1),  # a ring of one or two stages
        Case(64, 80, 6, gap=8),
        Case(56, 64, 6, BFLOAT16, packed=False, gap=3584),
        Case(112, 128, 4, gap=40),
        Case(60, 88, 4, clip_ratio=0.9),
        Case(64, 64, 4, BFLOAT16, packed=False, clip_ratio=0.3),
        Case(120, 136, 4, clip_ratio=0.5, gap=16, blocks=3),
        Case(64, 64, 4, clip_ratio=1.5),
        Case(8, 8, 500),  # enough that the last quarter is first come, first served
        Case(24, 32, 500, BFLOAT16, packed=False, blocks=3),
    ],
    ids=str,
)
def test_sm90(sm90: Path, tmp_path: Path, case: Case) -> None:
    problem = case.random_problem()
    check(case, launch(sm90, tmp_path, case, problem), problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, 100, blocks=1),
        Case(60, 104, 60, blocks=1),
        Case(70, 88, 20),
        Case(128, 144, 9, blocks=1),
        Case(150, 152, 5),
    ],
    ids=str,
)
def test_sm90_in_any_order(sm90: Path, tmp_path: Path, case: Case) -> None:
    """Also batch invariance: not a bit depends on the order, the grid, the batch or the storage."""
    problem = case.random_problem()
    codes, scales = launch(sm90, tmp_path, case, problem)
    check(case, (codes, scales), problem)
    for _ in range(10):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(
            case,
            tokens=len(chosen),
            packed=bool(torch.randint(2, ())),
            blocks=int(torch.randint(1, min(3, len(chosen)) + 1, ())),
            gap=8 * int(torch.randint(3, ())),
        )
        found = launch(sm90, tmp_path, part, problem._replace(input=problem.input[chosen]))
        expected = codes[chosen] if part.packed else unpack_int4(codes[chosen])
        assert torch.equal(found[0], expected) and torch.equal(found[1], scales[chosen]), part


@pytest.mark.parametrize("clip_ratio", [1.0, 0.5])
@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize("rows, cols", [(64, 64), (50, 72), (128, 112), (140, 176)])
def test_sm90_exact_data(
    sm90: Path,
    tmp_path: Path,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    packed: bool,
    clip_ratio: float,
) -> None:
    case = Case(rows, cols, 3, dtype, packed, clip_ratio)
    exact = exact_problem(rows, cols, 3, dtype, clip_ratio)
    check_exact(case, launch(sm90, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
def test_sm90_tiny_scales(sm90: Path, tmp_path: Path, packed: bool) -> None:
    """Scales whose inverse is not a float."""
    case = Case(48, 96, 4, BFLOAT16, packed)
    exact = exact_problem(48, 96, 4, BFLOAT16)
    tiny = 2.0**-112
    exact = exact._replace(
        problem=exact.problem._replace(input=exact.problem.input * tiny), scales=exact.scales * tiny
    )
    check_exact(case, launch(sm90, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
def test_sm90_large_intermediate(sm90: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """left^T @ X alone would leave float16's range."""
    case = Case(60, 72, 5, dtype)
    x, left, right = case.random_problem()
    x = x / x.abs().amax(1, keepdim=True) * 2.0 ** torch.tensor([[15], [12], [6], [0], [-6]])
    problem = Problem(x.to(dtype), left * 64, right)
    check(case, launch(sm90, tmp_path, case, problem), problem)


def spoil(problem: Problem) -> tuple[Problem, Tensor]:
    """Tokens 0..3 become all zero, one NaN, one +Inf, one -Inf; and the scales of these four."""
    x = problem.input.clone()
    x[0] = 0.0
    for token, value in enumerate((float("nan"), float("inf"), -float("inf")), 1):
        x[token, int(torch.randint(x.shape[1], ()))] = value
    # The factors have no zero, so that an Inf of X is one in Y: 0 times Inf would be NaN.
    factors = (torch.where(factor == 0, 0.125, factor) for factor in (problem.left, problem.right))
    return Problem(x, *factors), torch.tensor([1.0, float("nan"), float("inf"), float("inf")])


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, 9, blocks=1),
        Case(50, 96, 9, BFLOAT16, packed=False),  # padded rows
        Case(64, 72, 9, BFLOAT16),  # padded columns
        Case(100, 136, 6, packed=False),
        Case(190, 152, 6),
    ],
    ids=str,
)
def test_sm90_special_tokens(sm90: Path, tmp_path: Path, case: Case) -> None:
    problem, special = spoil(case.random_problem())
    codes, scales = launch(sm90, tmp_path, case, problem)
    assert torch.equal(scales[:4].nan_to_num(nan=-1.0), special.nan_to_num(nan=-1.0))
    assert not codes[:4].any()
    check(case, (codes, scales), problem)


# ------------------------------------------------------------------------------------- sm80


def test_fragments_are_those_of_cute(toolchain: Toolchain, tmp_path: Path) -> None:
    flags = [f"-I{EMULATOR}", "-O1", "-w", "-isystem", toolchain.cutlass_include()]
    program = toolchain.compile("checks/fragments.cpp", tmp_path / "fragments", *flags)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "768 comparisons, 0 wrong" in run.stdout, run.stdout


def sm80_seed(memory: int) -> int:
    """A seed with which run_sm80 takes the `memory`-th of its five sizes of shared memory.

    They run from 227 to 24 KiB. Where one is too small, the next larger one is taken.
    """
    return 5 * int(torch.randint(2**28, ())) + memory % 5


def sm80_cases() -> list[Case]:
    """Every width of a kernel, full and not full, in both dtypes and storages; then odd sizes."""
    cases = []
    for i, cols in enumerate([16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256]):
        rows = (32, 64, 24, 112, 16, 72)[i % 6]
        cases.append(Case(rows, cols, 5, DTYPES[i % 2], packed=i % 4 < 2))
        cases.append(Case(rows - 1 - i % 7, cols - 1 - i % 15, 3, DTYPES[1 - i % 2], packed=False))
    return [
        *cases,
        Case(1, 1, 40, packed=False),
        Case(1, 8, 40),
        Case(8, 1, 40),  # words of eight rows
        Case(16, 13, 20),
        Case(24, 30, 20, BFLOAT16),  # copies of 4 bytes
        Case(24, 36, 20),  # of 8 bytes
        Case(24, 24, 40, gap=4),
        Case(24, 24, 40, gap=1),  # tokens aligned to 2 bytes
        Case(56, 64, 9, gap=2, blocks=1),
        Case(5, 77, 9, packed=False),  # features odd, tokens of codes at any byte
        Case(60, 88, 4, clip_ratio=0.9),
        Case(34, 44, 6, BFLOAT16, clip_ratio=0.3),
        Case(128, 148, 3),
        Case(65, 24, 6),
        Case(250, 12, 3, BFLOAT16),
        Case(256, 100, 2),
        Case(208, 256, 2, blocks=1),
        Case(255, 249, 1, packed=False),
    ]


@pytest.mark.parametrize("number, case", list(enumerate(sm80_cases())), ids=str)
def test_sm80(sm80: Path, tmp_path: Path, number: int, case: Case) -> None:
    problem = case.random_problem()
    for memory in (number, number + 3):
        check(case, launch(sm80, tmp_path, case, problem, sm80_seed(memory)), problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, 40, blocks=1),
        Case(24, 40, 90, blocks=1),
        Case(36, 52, 30, BFLOAT16),
        Case(70, 88, 20),
        Case(144, 136, 7),
    ],
    ids=str,
)
def test_sm80_in_any_order(sm80: Path, tmp_path: Path, case: Case) -> None:
    """Also batch invariance: not a bit depends on the order, the grid, the batch or the storage.

    Nor on the shared memory, that is on which of the two kernels it was.
    """
    problem = case.random_problem()
    codes, scales = launch(sm80, tmp_path, case, problem, sm80_seed(0))
    check(case, (codes, scales), problem)
    for memory in range(10):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(
            case,
            tokens=len(chosen),
            packed=bool(torch.randint(2, ())),
            blocks=int(torch.randint(1, min(3, len(chosen)) + 1, ())),
            gap=int(torch.randint(9, ())),
        )
        part_problem = problem._replace(input=problem.input[chosen])
        found = launch(sm80, tmp_path, part, part_problem, sm80_seed(memory))
        expected = codes[chosen] if part.packed else unpack_int4(codes[chosen])
        assert torch.equal(found[0], expected) and torch.equal(found[1], scales[chosen]), part


@pytest.mark.parametrize("clip_ratio", [1.0, 0.5])
@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize(
    "rows, cols", [(24, 24), (64, 64), (8, 33), (50, 76), (128, 112), (140, 180)]
)
def test_sm80_exact_data(
    sm80: Path,
    tmp_path: Path,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    packed: bool,
    clip_ratio: float,
) -> None:
    case = Case(rows, cols, 3, dtype, packed, clip_ratio)
    exact = exact_problem(rows, cols, 3, dtype, clip_ratio)
    for memory in (0, 2, 4):
        result = launch(sm80, tmp_path, case, exact.problem, sm80_seed(memory))
        check_exact(case, result, exact)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize("rows, cols", [(24, 40), (60, 74), (208, 256)])
def test_sm80_large_intermediate(
    sm80: Path, tmp_path: Path, rows: int, cols: int, dtype: torch.dtype
) -> None:
    """left^T @ X leaves float16's range in some tokens, Y does not."""
    case = Case(rows, cols, 3, dtype)
    x, left, right = case.random_problem()
    x = x / x.abs().amax(1, keepdim=True) * 2.0 ** torch.tensor([[15], [12], [0]])
    problem = Problem(x.to(dtype), left * 64, right / 64)
    intermediate = x.view(3, rows, cols).double().mT @ left.double() * 64
    assert (intermediate.abs().amax((1, 2)) > 65504).tolist() == [True, True, False]
    for memory in (0, 4):
        check(case, launch(sm80, tmp_path, case, problem, sm80_seed(memory)), problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(24, 24, 20, blocks=1),
        Case(64, 64, 9, blocks=1),
        Case(50, 96, 9, BFLOAT16, packed=False),  # padded rows
        Case(64, 70, 9, BFLOAT16),  # padded columns
        Case(100, 130, 6, packed=False),
        Case(190, 152, 6),
        Case(200, 200, 5),  # in two passes
    ],
    ids=str,
)
def test_sm80_special_tokens(sm80: Path, tmp_path: Path, case: Case) -> None:
    problem, special = spoil(case.random_problem())
    for memory in (0, 4):
        codes, scales = launch(sm80, tmp_path, case, problem, sm80_seed(memory))
        assert torch.equal(scales[:4].nan_to_num(nan=-1.0), special.nan_to_num(nan=-1.0))
        assert not codes[:4].any()
        check(case, (codes, scales), problem)


# ------------------------------------------------------------------------------------- simt

# `blocks` are 48 KiB of shared memory that a block may have: 1 is a Pascal GPU, 5 a Hopper one.


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "rows, cols, tokens",
    [
        (1, 8, 3),
        (64, 64, 5),  # two tokens a block, and a block that is not full
        (24, 37, 9),  # eight tokens a block
        (13, 40, 3),
        (72, 45, 3),
        (288, 8, 2),
        (104, 132, 2),  # W does not fit in 48 KiB: chunks of rows
        (112, 131, 2),
        (10, 1004, 2),  # not even eight rows of it: chunks of columns too
        (8, 1005, 2),
    ],
)
def test_simt(
    simt: Path,
    tmp_path: Path,
    rows: int,
    cols: int,
    tokens: int,
    dtype: torch.dtype,
    packed: bool,
) -> None:
    case = Case(rows, cols, tokens, dtype, packed, gap=5, blocks=1)
    problem = case.random_problem()
    check(case, launch(simt, tmp_path, case, problem), problem)
    exact = exact_problem(rows, cols, tokens, dtype, 0.5)
    case = replace(case, clip_ratio=0.5)
    check_exact(case, launch(simt, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows, cols", [(24, 24), (62, 68), (104, 132), (8, 1005)])
def test_simt_special_tokens(
    simt: Path, tmp_path: Path, rows: int, cols: int, dtype: torch.dtype
) -> None:
    case = Case(rows, cols, 6, dtype, blocks=1)
    problem, special = spoil(case.random_problem())
    codes, scales = launch(simt, tmp_path, case, problem)
    assert torch.equal(scales[:4].nan_to_num(nan=-1.0), special.nan_to_num(nan=-1.0))
    assert not codes[:4].any()
    check(case, (codes, scales), problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(24, 24, 30, FLOAT32, blocks=1),
        Case(40, 37, 9, blocks=1),
        Case(104, 132, 4, BFLOAT16, blocks=1),
        Case(8, 1005, 4, blocks=1),
    ],
    ids=str,
)
def test_simt_in_any_order(simt: Path, tmp_path: Path, case: Case) -> None:
    """Not a bit depends on the order, the batch, the storage or the GPU's shared memory."""
    problem = case.random_problem()
    codes, scales = launch(simt, tmp_path, case, problem)
    check(case, (codes, scales), problem)
    for blocks in (1, 2, 5):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(
            case,
            tokens=len(chosen),
            packed=bool(torch.randint(2, ())),
            blocks=blocks,
            gap=int(torch.randint(9, ())),
        )
        found = launch(simt, tmp_path, part, problem._replace(input=problem.input[chosen]))
        expected = codes[chosen] if part.packed else unpack_int4(codes[chosen])
        assert torch.equal(found[0], expected) and torch.equal(found[1], scales[chosen]), part
