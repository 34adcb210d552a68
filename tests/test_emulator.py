"""The kernels' own source, run on the host by the emulator in tests/emulator.

The emulator implements what the PTX ISA says of mbarriers, TMA, wgmma, cp.async and
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
from problems import DTYPES, Exact, Problem, dtype_name, exact_problem, random_problem
from torch import Tensor

from flatquant import accuracy, reference
from flatquant.packing import unpack_int4

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
FLOAT16, BFLOAT16, FLOAT32 = DTYPES
MAX_OUTPUTS = 8
PRECISIONS = ("highest", "high")


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


@pytest.fixture
def program(request: pytest.FixtureRequest, kernel: str) -> Path:
    """That of a test's `kernel`."""
    path: Path = request.getfixturevalue(kernel)
    return path


Ratio = float | tuple[float, float]  # of both sides, or of the largest and the smallest
Output = tuple[Tensor, Tensor]  # codes as stored, and scales


@dataclass(frozen=True)
class Case:
    """One launch. `gap` are the elements between two tokens; `blocks` is the grid."""

    rows: int
    cols: int
    tokens: int
    dtype: torch.dtype = FLOAT16
    packed: bool = True
    clip_ratios: tuple[Ratio, ...] = (1.0,)  # of the outputs; none: Y itself is stored
    gap: int = 0
    blocks: int = 2
    has_left: bool = True
    has_right: bool = True
    on_device: bool = False  # the clip ratios
    out_dtype: torch.dtype = FLOAT32  # of Y
    precision: str = "highest"  # of float32: "highest" or "high"
    aligned: bool = True  # the input, to 16 bytes

    def __str__(self) -> str:
        name = f"{self.rows}x{self.cols}-{self.tokens}-{dtype_name(self.dtype)}"
        name += "-int4" if self.packed else "-int8"
        name += "".join(f"-clip{ratio}" for ratio in self.clip_ratios if ratio != 1.0)
        name += "" if self.precision == "highest" else f"-{self.precision}"
        name += "" if self.has_left else "-no_left"
        name += "" if self.has_right else "-no_right"
        return name + (f"-gap{self.gap}" if self.gap else "")

    @property
    def tolerance(self) -> accuracy.Tolerance:
        """With one factor nothing is rounded to 16 bits on the way."""
        if self.precision == "high":
            return accuracy.TF32
        one_factor = not (self.has_left and self.has_right)
        return accuracy.TOLERANCES[FLOAT32 if one_factor else self.dtype]

    def random_problem(self) -> Problem:
        return random_problem(self.rows, self.cols, self.tokens, self.dtype)

    def float64(self, problem: Problem) -> Tensor:
        """Y of every token."""
        left = problem.left if self.has_left else None
        right = problem.right if self.has_right else None
        return reference.transform(problem.input, left, right, torch.float64)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def run(
    program: Path, folder: Path, case: Case, problem: Problem, seed: int | None = None
) -> bytearray:
    """What the launch stored. The order in which threads run is drawn, or is that of `seed`."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    features = case.rows * case.cols
    stride = features + case.gap
    x = torch.full((case.tokens, stride), float("nan"), dtype=case.dtype)
    x[:, :features] = problem.input
    x = x.flatten()[: x.numel() - case.gap]
    poison = 1 + seed % 255  # what the results' memory holds before
    pairs = [ratio if isinstance(ratio, tuple) else (ratio, ratio) for ratio in case.clip_ratios]
    pairs += [(0.0, 0.0)] * (MAX_OUTPUTS - len(pairs))
    header = struct.pack(
        f"<16q{2 * MAX_OUTPUTS}f",
        *(case.rows, case.cols, case.tokens, stride, DTYPES.index(case.dtype), int(case.packed)),
        *(case.blocks, seed, poison, int(case.has_left), int(case.has_right)),
        *(len(case.clip_ratios), int(case.on_device), DTYPES.index(case.out_dtype)),
        *(PRECISIONS.index(case.precision), 16 if case.aligned else x.element_size()),
        *(ratio for pair in pairs for ratio in pair),
    )
    source, target = folder / "case", folder / "result"
    left = raw(problem.left) if case.has_left else b""
    right = raw(problem.right) if case.has_right else b""
    source.write_bytes(header + raw(x) + left + right)
    done = subprocess.run([program, source, target], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{case}, order {seed}: {done.stderr or done.returncode}"
    return bytearray(target.read_bytes())


def launch(
    program: Path, folder: Path, case: Case, problem: Problem, seed: int | None = None
) -> list[Output]:
    result = torch.frombuffer(run(program, folder, case, problem, seed), dtype=torch.uint8)
    codes_dtype = torch.int32 if case.packed else torch.int8
    outputs = []
    for output in result.view(len(case.clip_ratios), -1):
        codes = output[: -4 * case.tokens].clone().view(codes_dtype)
        scales = output[-4 * case.tokens :].clone().view(torch.float32)
        outputs.append((codes.view(case.tokens, -1), scales))
    return outputs


def transform(
    program: Path, folder: Path, case: Case, problem: Problem, seed: int | None = None
) -> Tensor:
    result = run(program, folder, replace(case, clip_ratios=()), problem, seed)
    return torch.frombuffer(result, dtype=case.out_dtype).view(case.tokens, -1)


def check(case: Case, outputs: list[Output], problem: Problem) -> None:
    """Against float64. The cases are small, so the share of differing codes is held loosely."""
    y = case.float64(problem)
    for (codes, scales), ratio in zip(outputs, case.clip_ratios, strict=True):
        found = accuracy.compare(codes, scales, y, ratio, case.dtype, tolerance=case.tolerance)
        failures = [text for text in found.failures if "codes differ, " not in text]
        assert not failures, f"{case}, clip ratio {ratio}: {found}"
        count = found.tokens * found.features
        allowed = 4 * max(1.0, found.tolerance.mismatch * count)
        assert found.mismatches <= allowed, f"{case}, clip ratio {ratio}: {found}"


def codes_of(output: Output) -> Tensor:
    return unpack_int4(output[0]) if output[0].dtype == torch.int32 else output[0]


def equal(found: list[Output], expected: list[Output]) -> bool:
    """Bit by bit, whatever the storage."""
    return len(found) == len(expected) and all(
        torch.equal(codes_of(ours), codes_of(theirs))
        and torch.equal(ours[1].view(torch.int32), theirs[1].view(torch.int32))
        for ours, theirs in zip(found, expected, strict=True)
    )


def chosen_tokens(outputs: list[Output], chosen: Tensor) -> list[Output]:
    return [(codes[chosen], scales[chosen]) for codes, scales in outputs]


def check_exact(outputs: list[Output], exact: Exact) -> None:
    assert equal(outputs, [(exact.codes, exact.scales)])


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
    "cluster": [
        r"mapa\.u64 %rd\d+, %rd\d+, 1;",
        r"st\.u32\s+\[%rd\d+\], 2;",
        r"barrier\.cluster\.arrive\.aligned;",
        r"barrier\.cluster\.wait\.aligned;",
    ],
    "early_end": [r"setp\.ne\.b32 p, %r\d+, 0; @p exit;", r"st\.global"],
    "mbarrier": [
        r"mbarrier\.init\.shared::cta\.b64 \[\S+\], 5;",
        r"fence\.mbarrier_init\.release\.cluster;",
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[\S+\], 4096;",
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[\S+\], 1, ",
    ],
    "copy": [
        r"cp\.async\.bulk\.tensor\.3d\.shared::cluster\.global\.mbarrier::complete_tx::bytes",
        r"cp\.async\.bulk\.prefetch\.tensor\.3d\.L2\.global \[\S+, \{[^}]*\}\];",
        r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes "
        r"\[\S+\], \[\S+\], 48, \[\S+\];",
        r"fence\.proxy\.async\.shared::cta;",
    ],
    "store": [
        r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[\S+\], \[\S+\], 48;",
        r"cp\.async\.bulk\.commit_group;",
        r"cp\.async\.bulk\.wait_group\.read 0;",
    ],
    # The ones at the end: A and B not negated, and contiguous along M and N (a zero: along K).
    "products": [
        r"wgmma\.fence\.sync\.aligned;",
        r"setp\.ne\.b32 p, 0, 0;\s*wgmma\.mma_async\.sync\.aligned\.m64n24k16\.f32\.f16\.f16 "
        r"\{[^}]*\}, %rd\d+, %rd\d+, p, +1, 1, 1, 1;",
        r"setp\.ne\.b32 p, 1, 0;\s*wgmma\.mma_async\.sync\.aligned\.m64n24k16\.f32\.f16\.f16 "
        r"\{[^}]*\}, %rd\d+, %rd\d+, p, +1, 1, 1, 0;",
        r"setp\.ne\.b32 p, 1, 0;\s*wgmma\.mma_async\.sync\.aligned\.m64n24k16\.f32\.bf16\.bf16 "
        r"\{[^}]*\}, *\{[^}]*\}, %rd\d+, p, +1, 1, 1;",
        r"wgmma\.commit_group\.sync\.aligned;",
        r"wgmma\.wait_group\.sync\.aligned 1;",
        r"wgmma\.wait_group\.sync\.aligned 0;",
    ],
    "dependent_launch": [
        r"griddepcontrol\.wait;",
        r"griddepcontrol\.launch_dependents;",
        r"st\.global",
    ],
    "copies": [
        r"cp\.async\.ca\.shared\.global\S* \[\S+\], \[\S+\], 16, ",
        r"cp\.async\.ca\.shared\.global\S* \[\S+\], \[\S+\], 8, ",
        r"cp\.async\.ca\.shared\.global\S* \[\S+\], \[\S+\], 4, ",
        r"cp\.async\.commit_group;",
        r"cp\.async\.wait_(all|group 0);",
    ],
}


SM80_INSTRUCTIONS = {
    "named_barrier": [r"bar\.sync 3, 96;", r"bar\.arrive 4, 64;"],
    "copy": [
        r"cp\.async\.cg\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
        r"cp\.async\.ca\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 8, %r\d+;",
        r"cp\.async\.ca\.shared\.global(?:\.L2::128B)? \[%r\d+\], \[%rd\d+\], 4, %r\d+;",
        r"@p cp\.async\.cg\.shared\.global\.L2::128B \[%r\d+\], \[%rd\d+\], 16;",
        r"cp\.async\.commit_group;",
        r"cp\.async\.wait_group 3;",
        r"cp\.async\.wait_all;",
    ],
    "products": [
        r"ldmatrix\.sync\.aligned\.x4\.trans\.m8n8\.shared\.b16 ",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
        r"cvt\.rna\.tf32\.f32 ",
        r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32",
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
    "no wait for the kernel before": "before the wait for the previous kernel",
    "no init": "no mbarrier was initialised",
    "no init fence": "no fence",
    "overwritten barrier": "overwritten",
    "overflow": "a store .* into the shared memory",
    "early exit": "in flight|wrong product",
    "too many bytes": "(?s)deadlock.*128 threads .*mbarrier.* 16 bytes to come",
    "two arrivals": "an arrival too many",
    "misaligned copy": "not aligned to 128 bytes",
    "misaligned box": "box begins at 4",
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
    "no wait for the last wgmma": "wrong product|in flight|waited for",
    "no cluster barrier": "wrong number",
    "part of a cluster": "(?s)deadlock.*cluster barrier: 64 of 128",
    "early store": "a block that may not run yet",
    "block ended": "a block that has ended|deadlock",
    "no such block": "block 2 of a cluster of 2",
    "barrier of another block": "a pointer .* into the shared memory",
    "bulk store without fence": "wrong copy",
    "no wait for bulk store": "wrong copy|in flight",
    "misaligned bulk store": "not all multiples of 16",
}


SM80_MISTAKES = {
    "no commit": "wrong result|in flight",
    "no wait": "wrong result|in flight",
    "too many pending": "wrong result|in flight",
    "no barrier": "wrong result",
    "arrival instead of a wait": "wrong result",
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
        tokens = 227 * 1024 // (2 * depth * cols) + 3  # in large classes more than stages
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
        Case(60, 88, 4, clip_ratios=(0.9,)),
        Case(64, 64, 4, BFLOAT16, packed=False, clip_ratios=(0.3,)),
        Case(120, 136, 4, clip_ratios=(0.5,), gap=16, blocks=3),
        Case(64, 64, 4, clip_ratios=(1.5,)),
        Case(50, 64, 4),  # the left factor by 4 bytes
        Case(84, 88, 4, BFLOAT16),  # by 8
        Case(63, 64, 4),  # element by element
        # Transposed products.
        Case(86, 128, 30, blocks=1),
        Case(65, 128, 8, BFLOAT16, packed=False, gap=8),
        Case(76, 128, 30, clip_ratios=(0.5,), blocks=1),
        Case(84, 128, 400, blocks=3),  # the last quarter is first come, first served
        Case(138, 192, 5, packed=False, clip_ratios=(1.5,)),
        Case(132, 192, 4, BFLOAT16, blocks=1),
        Case(208, 256, 7, blocks=1),  # by a cluster
        Case(196, 256, 4, BFLOAT16, packed=False, gap=8),
        Case(142, 256, 5, clip_ratios=(0.5,), blocks=1),
        # Ragged tokens.
        Case(48, 60, 20, blocks=1),
        Case(40, 60, 5, BFLOAT16, packed=False, gap=8),
        Case(64, 84, 30, BFLOAT16, blocks=1),
        Case(64, 76, 5, clip_ratios=(0.5,), gap=24),
        Case(128, 148, 7, blocks=1),
        Case(112, 132, 5, packed=False, clip_ratios=(1.5,)),
        Case(104, 148, 4),
        Case(128, 92, 3, has_left=False),  # regrouped to 64 x 184, which is not ragged
        Case(8, 8, 1000),  # enough that the last quarter is first come, first served
        Case(24, 32, 500, BFLOAT16, packed=False, blocks=3),
        # Stacks.
        Case(32, 64, 27, blocks=1, gap=16),
        Case(16, 32, 120, blocks=1),
        Case(18, 40, 9, BFLOAT16, clip_ratios=(0.5,)),
        Case(16, 128, 9, has_right=False),  # regrouped to 32 x 64
        Case(64, 16, 9, BFLOAT16, has_left=False),  # to 32 x 32
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
        Case(86, 128, 40, blocks=1),  # transposed products
        Case(70, 128, 30),
        Case(142, 192, 6),
        Case(204, 256, 7),
        Case(56, 84, 40, blocks=1),  # ragged tokens
        Case(128, 140, 9),
        Case(200, 248, 7),  # clusters
        Case(30, 40, 90, blocks=1),  # stacks
        Case(12, 16, 130),
    ],
    ids=str,
)
def test_sm90_in_any_order(sm90: Path, tmp_path: Path, case: Case) -> None:
    """Also batch invariance: not a bit depends on the order, the grid, the batch or the storage."""
    problem = case.random_problem()
    expected = launch(sm90, tmp_path, case, problem)
    check(case, expected, problem)
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
        assert equal(found, chosen_tokens(expected, chosen)), part


@pytest.mark.parametrize("clip_ratio", [1.0, 0.5])
@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize(
    "rows, cols",
    [
        *[(64, 64), (50, 72), (128, 112), (140, 176), (90, 128), (140, 192)],
        *[(48, 60), (128, 148), (196, 240)],
    ],
)
def test_sm90_exact_data(
    sm90: Path,
    tmp_path: Path,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    packed: bool,
    clip_ratio: float,
) -> None:
    case = Case(rows, cols, 3, dtype, packed, (clip_ratio,))
    exact = exact_problem(rows, cols, 3, dtype, clip_ratio)
    check_exact(launch(sm90, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
def test_sm90_tiny_scales(sm90: Path, tmp_path: Path, packed: bool) -> None:
    """Scales whose inverse is not a float."""
    case = Case(48, 96, 4, BFLOAT16, packed)
    exact = exact_problem(48, 96, 4, BFLOAT16)
    tiny = 2.0**-112
    exact = exact._replace(
        problem=exact.problem._replace(input=exact.problem.input * tiny), scales=exact.scales * tiny
    )
    check_exact(launch(sm90, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize("rows, cols", [(60, 72), (28, 40), (12, 16)])
def test_sm90_large_intermediate(
    sm90: Path, tmp_path: Path, rows: int, cols: int, dtype: torch.dtype
) -> None:
    """left^T @ X alone would leave float16's range; in stacks, of some tokens."""
    case = Case(rows, cols, 5, dtype)
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


def check_special(case: Case, outputs: list[Output], problem: Problem, special: Tensor) -> None:
    for codes, scales in outputs:
        assert torch.equal(scales[:4].nan_to_num(nan=-1.0), special.nan_to_num(nan=-1.0))
        assert not codes[:4].any()
    check(case, outputs, problem)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, 9, blocks=1),
        Case(50, 96, 9, BFLOAT16, packed=False),  # padded rows
        Case(64, 72, 9, BFLOAT16),  # padded columns
        Case(100, 136, 6, packed=False),
        Case(190, 152, 6),
        Case(86, 128, 9, blocks=1),  # transposed products
        Case(78, 128, 30, BFLOAT16, blocks=1),
        Case(130, 192, 6, BFLOAT16, packed=False),
        Case(208, 232, 6),  # clusters
        Case(198, 256, 6),
        Case(64, 76, 9, blocks=1),  # ragged tokens
        Case(112, 132, 6, BFLOAT16, packed=False),
        Case(32, 64, 9, blocks=1),  # stacks
        Case(24, 40, 6, BFLOAT16, packed=False),
        Case(12, 24, 11),
    ],
    ids=str,
)
def test_sm90_special_tokens(sm90: Path, tmp_path: Path, case: Case) -> None:
    problem, special = spoil(case.random_problem())
    check_special(case, launch(sm90, tmp_path, case, problem), problem, special)


@pytest.mark.parametrize(
    "case",
    [
        Case(32, 64, 41, blocks=1),
        Case(22, 32, 41, BFLOAT16, packed=False, clip_ratios=((0.9, 0.8), (1.0, 1.0)), gap=8),
        Case(32, 48, 41, has_right=False),
        Case(16, 128, 41, BFLOAT16, has_right=False),  # regrouped to 32 x 64
        Case(64, 16, 41, has_left=False),  # to 32 x 32
        Case(16, 16, 59, blocks=1),
        Case(9, 32, 59, BFLOAT16, has_left=False),
    ],
    ids=str,
)
def test_sm90_special_tokens_change_no_bit_of_their_stack(
    sm90: Path, tmp_path: Path, case: Case
) -> None:
    problem = case.random_problem()
    expected = launch(sm90, tmp_path, case, problem)
    # Of stacks none, one, some and all, and the last one, which lacks some.
    special = torch.rand(case.tokens) < 0.4
    special[-1] = special[4:8] = True
    x = problem.input.clone()
    for token in special.nonzero().flatten().tolist():
        if token % 3 == 2:  # finite, but for some factors W or Y is not
            x[token] = 60000.0 if case.dtype is FLOAT16 else 3e38
        else:
            x[token, int(torch.randint(x.shape[1], ()))] = (float("nan"), float("inf"))[token % 3]
    found = launch(sm90, tmp_path, case, problem._replace(input=x))
    for (codes, scales), (expected_codes, expected_scales) in zip(found, expected, strict=True):
        assert torch.equal(codes[~special], expected_codes[~special])
        assert torch.equal(scales[~special], expected_scales[~special])
        assert not (scales[special] == expected_scales[special]).any()
    y = transform(sm90, tmp_path, case, problem)[~special]
    y_beside = transform(sm90, tmp_path, case, problem._replace(input=x))[~special]
    assert torch.equal(y.view(torch.int32), y_beside.view(torch.int32))


FLOAT32_CLASSES = [(32, 32), (64, 64), (64, 128), (96, 128), (128, 128)]
by_precision = pytest.mark.parametrize("precision", PRECISIONS)


def test_float32_classes_are_those_of_the_kernel() -> None:
    text = (ROOT / "csrc" / "sm90" / "config.h").read_text()
    table = re.search(r"ShapeClass classes\[\] = \{(.*?)\};", text, re.S)
    assert table, "csrc/sm90/config.h has no float32 classes"
    found = [(int(depth), int(cols)) for depth, cols in re.findall(r"(\d+), (\d+)", table[1])]
    assert found == FLOAT32_CLASSES


@by_precision
@pytest.mark.parametrize("depth, cols", FLOAT32_CLASSES)
def test_sm90_float32(sm90: Path, tmp_path: Path, depth: int, cols: int, precision: str) -> None:
    stages = 227 * 1024 // (4 * depth * cols)
    full = Case(depth, cols, min(stages + 3, 30), FLOAT32, blocks=1, precision=precision)
    ragged = Case(depth - 3, cols - 8, 5, FLOAT32, packed=False, gap=4, precision=precision)
    for case in (full, ragged):
        problem = case.random_problem()
        check(case, launch(sm90, tmp_path, case, problem), problem)


@by_precision
def test_sm90_float32_in_any_order(sm90: Path, tmp_path: Path, precision: str) -> None:
    case = Case(56, 64, 60, FLOAT32, blocks=1, precision=precision)
    problem = case.random_problem()
    expected = launch(sm90, tmp_path, case, problem)
    check(case, expected, problem)
    for _ in range(4):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(case, tokens=len(chosen), packed=bool(torch.randint(2, ())), gap=4, blocks=2)
        found = launch(sm90, tmp_path, part, problem._replace(input=problem.input[chosen]))
        assert equal(found, chosen_tokens(expected, chosen)), part


@pytest.mark.parametrize("kernel", ["sm90", "sm80"])
@by_precision
@pytest.mark.parametrize("rows, cols", [(24, 24), (64, 64), (50, 72), (100, 128), (128, 112)])
def test_float32_exact_data(
    program: Path, tmp_path: Path, kernel: str, rows: int, cols: int, precision: str
) -> None:
    case = Case(rows, cols, 3, FLOAT32, precision=precision)
    exact = exact_problem(rows, cols, 3, FLOAT32)
    for memory in (0, 4):
        result = launch(program, tmp_path, case, exact.problem, sm80_seed(memory))
        check_exact(result, exact)


@pytest.mark.parametrize("kernel", ["sm90", "sm80"])
@by_precision
@pytest.mark.parametrize("left_exponent, right_exponent", [(0, 0), (60, -60), (-90, -30), (40, 80)])
def test_float32_range(
    program: Path,
    tmp_path: Path,
    kernel: str,
    left_exponent: int,
    right_exponent: int,
    precision: str,
) -> None:
    """Tokens and factors near the ends of float32's range, where float16 ends long before."""
    case = Case(24, 32, 7, FLOAT32, precision=precision)
    exact = exact_problem(24, 32, 7, FLOAT32)
    both = left_exponent + right_exponent
    sizes = torch.tensor([-100.0, -60.0, -20.0, 0.0, 20.0, 60.0, 90.0])
    # Neither W nor Y beyond float32, which is what a token is computed in if it is computed again.
    exponents = sizes.clamp(-110 - min(both, left_exponent), 100 - max(both, left_exponent))
    sizes = torch.exp2(exponents)
    x, left, right = exact.problem
    problem = Problem(x * sizes[:, None], left * 2.0**left_exponent, right * 2.0**right_exponent)
    scales = exact.scales * torch.exp2(exponents + both)
    check_exact(
        launch(program, tmp_path, case, problem), exact._replace(problem=problem, scales=scales)
    )


@pytest.mark.parametrize("kernel", ["sm90", "sm80"])
@by_precision
@pytest.mark.parametrize("exponent", [6, 11, 20, 60])
@pytest.mark.parametrize("has_right", [True, False], ids=["both", "left"])
def test_float32_factors_that_undo_outliers(
    program: Path, tmp_path: Path, kernel: str, has_right: bool, exponent: int, precision: str
) -> None:
    """What float16's smallest number takes from the small must not show in Y."""
    case = Case(48, 64, 5, FLOAT32, precision=precision, has_right=has_right)
    x = torch.randn(case.tokens, 48, 64)
    x[:, 7] *= 2.0**exponent
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for size in (48, 64))
    left[7] *= 2.0**-exponent
    problem = Problem(x.flatten(1), left, right)
    check(case, launch(program, tmp_path, case, problem), problem)
    y, exact = transform(program, tmp_path, case, problem), case.float64(problem)
    largest = exact.abs().amax(1, keepdim=True)
    assert ((y - exact).abs() <= case.tolerance.transform * largest).all()


@by_precision
def test_sm90_float32_special_tokens(sm90: Path, tmp_path: Path, precision: str) -> None:
    case = Case(50, 96, 9, FLOAT32, precision=precision)
    problem, special = spoil(case.random_problem())
    check_special(case, launch(sm90, tmp_path, case, problem), problem, special)


# ------------------------------------------------------------------------------------- sm80


def test_fragments_are_those_of_cute(toolchain: Toolchain, tmp_path: Path) -> None:
    flags = [f"-I{EMULATOR}", "-O1", "-w", "-isystem", toolchain.cutlass_include()]
    program = toolchain.compile("checks/fragments.cpp", tmp_path / "fragments", *flags)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "896 comparisons, 0 wrong" in run.stdout, run.stdout


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
        Case(60, 88, 4, clip_ratios=(0.9,)),
        Case(34, 44, 6, BFLOAT16, clip_ratios=(0.3,)),
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
        # The last tokens of a launch of so many are drawn as groups get to them.
        Case(64, 64, 100, blocks=1),
        Case(16, 48, 170, blocks=1),
        Case(80, 160, 30, blocks=1),
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
    expected = launch(sm80, tmp_path, case, problem, sm80_seed(0))
    check(case, expected, problem)
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
        assert equal(found, chosen_tokens(expected, chosen)), part


@pytest.mark.parametrize(
    "case", [Case(64, 64, 170, blocks=3), Case(80, 160, 60, blocks=3)], ids=str
)
def test_sm80_draws_before_the_first_block(sm80: Path, tmp_path: Path, case: Case) -> None:
    """From a counter that is not set yet: tokens are computed again, a group's first one too."""
    problem = case.random_problem()
    expected = launch(sm80, tmp_path, case, problem, sm80_seed(0))
    for counter in range(0, 5 * case.blocks, 5):
        found = launch(sm80, tmp_path, case, problem, counter)
        assert equal(found, expected), counter


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
    case = Case(rows, cols, 3, dtype, packed, (clip_ratio,))
    exact = exact_problem(rows, cols, 3, dtype, clip_ratio)
    for memory in (0, 2, 4):
        result = launch(sm80, tmp_path, case, exact.problem, sm80_seed(memory))
        check_exact(result, exact)


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
        Case(50, 96, 9, FLOAT32),
        Case(50, 96, 9, FLOAT32, precision="high"),
        Case(24, 20, 9, FLOAT32),
        Case(24, 20, 9, FLOAT32, precision="high"),
    ],
    ids=str,
)
def test_sm80_special_tokens(sm80: Path, tmp_path: Path, case: Case) -> None:
    problem, special = spoil(case.random_problem())
    for memory in (0, 4):
        outputs = launch(sm80, tmp_path, case, problem, sm80_seed(memory))
        check_special(case, outputs, problem, special)


def sm80_float32_cases() -> list[Case]:
    return [
        Case(32, 32, 9),  # every width of a kernel, full and not full
        Case(64, 64, 9),
        Case(50, 92, 5, gap=4),
        Case(64, 128, 5, gap=2),  # tokens aligned to 8 bytes
        Case(112, 128, 3),
        Case(24, 30, 9, gap=1),  # to 4
        Case(13, 17, 20, packed=False),
        Case(1, 8, 40),
        Case(5, 77, 9, packed=False, clip_ratios=((0.7, 0.9), 0.3)),
        Case(64, 64, 3, has_left=False),
        Case(64, 64, 3, has_right=False),
        Case(120, 100, 2, has_left=False),
    ]


@by_precision
@pytest.mark.parametrize("number, case", list(enumerate(sm80_float32_cases())), ids=str)
def test_sm80_float32(sm80: Path, tmp_path: Path, number: int, case: Case, precision: str) -> None:
    case = replace(case, dtype=FLOAT32, precision=precision)
    problem = case.random_problem()
    for memory in (number, number + 3):
        check(case, launch(sm80, tmp_path, case, problem, sm80_seed(memory)), problem)
    y, exact = transform(sm80, tmp_path, case, problem), case.float64(problem)
    largest = exact.abs().amax(1, keepdim=True)
    assert ((y - exact).abs() <= case.tolerance.transform * largest).all()


@by_precision
@pytest.mark.parametrize("case", [Case(64, 64, 24), Case(70, 120, 8)], ids=str)
def test_sm80_float32_in_any_order(sm80: Path, tmp_path: Path, case: Case, precision: str) -> None:
    case = replace(case, dtype=FLOAT32, precision=precision, blocks=1)
    problem = case.random_problem()
    expected = launch(sm80, tmp_path, case, problem, sm80_seed(0))
    for memory in (1, 2, 4):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(case, tokens=len(chosen), gap=int(torch.randint(5, ())))
        part_problem = problem._replace(input=problem.input[chosen])
        found = launch(sm80, tmp_path, part, part_problem, sm80_seed(memory))
        assert equal(found, chosen_tokens(expected, chosen)), part


# ------------------------------------------------------------------------------------- simt

# `blocks` are 48 KiB of shared memory that a block may have: 1 is a Pascal GPU, 5 a Hopper one.


@pytest.mark.parametrize("packed", [True, False], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "rows, cols, tokens, gap, blocks",
    [
        (1, 8, 3, 5, 1),
        (64, 64, 5, 5, 1),  # two tokens a block, and a block that is not full
        (64, 64, 5, 4, 1),  # the same without padding
        (56, 64, 5, 4, 1),  # and with tiles of seven rows
        (112, 128, 2, 4, 5),  # and with stages of 16 rows
        (64, 40, 7, 4, 1),  # three tokens a block, which are no whole warps
        (24, 37, 9, 5, 1),  # eight tokens a block
        (13, 40, 3, 5, 1),
        (72, 45, 3, 5, 1),
        (288, 8, 2, 5, 1),
        (104, 132, 2, 5, 1),  # W does not fit in 48 KiB: chunks of rows
        (112, 131, 2, 5, 1),
        (10, 1004, 2, 5, 1),  # not even eight rows of it: chunks of columns too
        (8, 1005, 2, 5, 1),
    ],
)
def test_simt(
    simt: Path,
    tmp_path: Path,
    rows: int,
    cols: int,
    tokens: int,
    gap: int,
    blocks: int,
    dtype: torch.dtype,
    packed: bool,
) -> None:
    case = Case(rows, cols, tokens, dtype, packed, gap=gap, blocks=blocks)
    problem = case.random_problem()
    check(case, launch(simt, tmp_path, case, problem), problem)
    exact = exact_problem(rows, cols, tokens, dtype, 0.5)
    case = replace(case, clip_ratios=(0.5,))
    check_exact(launch(simt, tmp_path, case, exact.problem), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "rows, cols", [(24, 24), (56, 64), (64, 40), (62, 68), (104, 132), (8, 1005)]
)
def test_simt_special_tokens(
    simt: Path, tmp_path: Path, rows: int, cols: int, dtype: torch.dtype
) -> None:
    case = Case(rows, cols, 6, dtype, blocks=1)
    problem, special = spoil(case.random_problem())
    check_special(case, launch(simt, tmp_path, case, problem), problem, special)


@pytest.mark.parametrize(
    "case",
    [
        Case(24, 24, 30, FLOAT32, blocks=1),
        Case(40, 37, 9, blocks=1),
        Case(104, 132, 4, BFLOAT16, blocks=1),
        Case(104, 128, 4, blocks=1),  # without padding where W fits, in chunks where it does not
        Case(112, 128, 3, blocks=1),  # and with tiles of seven rows
        Case(8, 1005, 4, blocks=1),
    ],
    ids=str,
)
def test_simt_in_any_order(simt: Path, tmp_path: Path, case: Case) -> None:
    """Not a bit depends on the order, the batch, the storage or the GPU's shared memory."""
    problem = case.random_problem()
    expected = launch(simt, tmp_path, case, problem)
    check(case, expected, problem)
    for blocks in (1, 2, 5):
        chosen = torch.randperm(case.tokens)[: int(torch.randint(1, case.tokens + 1, ()))]
        part = replace(
            case,
            tokens=len(chosen),
            packed=bool(torch.randint(2, ())),
            blocks=blocks,
            gap=int(torch.randint(9, ())) if blocks < 5 else 4,  # without padding at least once
        )
        found = launch(simt, tmp_path, part, problem._replace(input=problem.input[chosen]))
        assert equal(found, chosen_tokens(expected, chosen)), part


# ------------------------------------------------------------- outputs and factors, of all kernels

# The sides as they are, either clipped far, so little that no code has to be clamped, so far that
# nearly all are, and beyond what any value reaches.
RATIOS: tuple[Ratio, ...] = (
    *(1.0, (0.3, 1.0), (1.0, 0.3), (0.94, 0.83)),
    *(1e-3, (1e-6, 1.0), (1e-3, 1e-6), (1.5, 1.25)),
)

KERNEL_CASES = [
    ("sm90", Case(64, 64, 5)),
    ("sm90", Case(50, 72, 5, BFLOAT16, packed=False)),
    ("sm90", Case(130, 160, 3)),
    ("sm90", Case(64, 72, 3)),  # half a word
    ("sm90", Case(120, 128, 3)),  # four words side by side
    ("sm90", Case(128, 224, 2)),  # four, two and one
    ("sm90", Case(64, 160, 3, BFLOAT16)),  # four, and two of which half the lanes have none
    ("sm90", Case(168, 176, 2, packed=False)),  # two, two, one and half a word
    ("sm90", Case(32, 64, 5)),  # stacks
    ("sm90", Case(22, 40, 5, BFLOAT16, packed=False)),
    ("sm90", Case(13, 16, 7)),
    ("sm90", Case(72, 88, 5)),  # two tiles of a warpgroup
    ("sm90", Case(128, 144, 3)),
    ("sm90", Case(86, 128, 5)),  # transposed products
    ("sm90", Case(138, 192, 3, BFLOAT16, packed=False)),
    ("sm90", Case(200, 248, 3)),  # clusters
    ("sm90", Case(188, 256, 3, packed=False)),
    ("sm90", Case(48, 60, 5)),  # ragged tokens
    ("sm90", Case(48, 36, 3)),
    ("sm90", Case(56, 84, 5, BFLOAT16)),
    ("sm90", Case(128, 148, 3, packed=False)),
    ("sm90", Case(56, 64, 5, FLOAT32)),
    ("sm90", Case(100, 128, 5, FLOAT32, packed=False)),
    ("sm80", Case(24, 24, 5, packed=False)),
    ("sm80", Case(16, 72, 3)),
    ("sm80", Case(16, 128, 3, BFLOAT16)),
    ("sm80", Case(62, 68, 5, BFLOAT16)),
    ("sm80", Case(13, 17, 5, packed=False)),  # features odd, rows of Y at any address
    ("sm80", Case(72, 112, 3, BFLOAT16, packed=False)),
    ("sm80", Case(200, 194, 1)),  # streamed in two passes
    ("sm80", Case(50, 92, 5, FLOAT32)),
    ("sm80", Case(120, 100, 3, FLOAT32, packed=False)),
    ("simt", Case(64, 64, 3)),  # without padding, but for several outputs
    ("simt", Case(24, 37, 9, FLOAT32)),
    ("simt", Case(62, 68, 3, packed=False)),
    ("simt", Case(104, 132, 2, BFLOAT16, blocks=1)),  # chunks of rows
    ("simt", Case(10, 1004, 2, blocks=1)),  # and of columns
]
by_kernel = pytest.mark.parametrize("kernel, case", KERNEL_CASES, ids=str)
by_factors = pytest.mark.parametrize(
    "has_left, has_right",
    [(True, True), (False, True), (True, False)],
    ids=["both", "right", "left"],
)


def check_rounding(case: Case, outputs: list[Output], y: Tensor) -> None:
    """Against Y where the kernel knows it exactly: only dividing by the scale may be rounded."""
    for output, ratio in zip(outputs, case.clip_ratios, strict=True):
        codes, scales = codes_of(output).double(), output[1]
        exact_codes, exact_scales = reference.quantize(y, ratio)
        assert torch.equal(scales, exact_scales), f"{case}, clip ratio {ratio}"
        boundary = (codes + exact_codes) / 2
        near = (y / exact_scales[:, None].double() - boundary).abs() <= 2.0**-18
        steps = (codes - exact_codes).abs()
        assert ((steps == 0) | (steps == 1) & near).all(), f"{case}, clip ratio {ratio}"


@by_kernel
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_outputs(program: Path, tmp_path: Path, kernel: str, case: Case, on_device: bool) -> None:
    """Many outputs; not a bit of one depends on the others, or on where its ratios are."""
    case = replace(case, clip_ratios=RATIOS, on_device=on_device)
    exact = exact_problem(case.rows, case.cols, case.tokens, case.dtype).problem
    check_rounding(case, launch(program, tmp_path, case, exact), case.float64(exact))

    problem = case.random_problem()
    case = replace(case, clip_ratios=RATIOS[:5])
    outputs = launch(program, tmp_path, case, problem)
    usual = replace(case, clip_ratios=RATIOS[:4])
    check(usual, outputs[:4], problem)
    for i in (0, 1, 4):
        alone = replace(case, clip_ratios=case.clip_ratios[i : i + 1], on_device=False)
        assert equal(launch(program, tmp_path, alone, problem), outputs[i : i + 1]), alone


@by_kernel
@pytest.mark.parametrize(
    "has_left, has_right", [(False, True), (True, False)], ids=["right", "left"]
)
def test_missing_factor(
    program: Path, tmp_path: Path, kernel: str, case: Case, has_left: bool, has_right: bool
) -> None:
    """Nothing is rounded before it is quantised, not to float16's range either."""
    case = replace(case, clip_ratios=RATIOS[:3], has_left=has_left, has_right=has_right)
    problem = case.random_problem()
    for factor in (1.0, 2.0**-12):
        small = Problem(problem.input * 2.0**-4, problem.left * factor, problem.right * factor)
        check(case, launch(program, tmp_path, case, small), small)


@by_kernel
@by_factors
def test_transform(
    program: Path, tmp_path: Path, kernel: str, case: Case, has_left: bool, has_right: bool
) -> None:
    """Y in each dtype; exact where it can be, with NaN and Inf where they belong."""
    case = replace(case, has_left=has_left, has_right=has_right)
    exact = exact_problem(case.rows, case.cols, case.tokens, case.dtype).problem
    assert torch.equal(transform(program, tmp_path, case, exact).double(), case.float64(exact))

    case = replace(case, tokens=5)
    problem, _ = spoil(case.random_problem())
    y = transform(program, tmp_path, case, problem)
    expected = case.float64(problem)
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().amax(1, keepdim=True)
    errors = (y - expected).abs()
    assert (
        (y == expected)
        | (y.isnan() & expected.isnan())
        | (errors <= case.tolerance.transform * largest)
    ).all()
    for dtype in (FLOAT16, BFLOAT16):
        rounded = transform(program, tmp_path, replace(case, out_dtype=dtype), problem)
        assert torch.equal(rounded.nan_to_num(nan=1e4), y.to(dtype).nan_to_num(nan=1e4))


@by_kernel
@by_factors
def test_special_tokens_of_outputs(
    program: Path, tmp_path: Path, kernel: str, case: Case, has_left: bool, has_right: bool
) -> None:
    ratios = (1.0, (0.3, 1.0), (1.0, 1e-3), (0.5, 2.0))
    case = replace(case, tokens=5, has_left=has_left, has_right=has_right, clip_ratios=ratios)
    problem, special = spoil(case.random_problem())
    outputs = launch(program, tmp_path, case, problem)
    for codes, scales in outputs:
        assert torch.equal(scales[:4].nan_to_num(nan=-1.0), special.nan_to_num(nan=-1.0))
        assert not codes[:4].any()
    usual = replace(case, clip_ratios=ratios[:2])
    check(usual, outputs[:2], problem)


@pytest.mark.parametrize(
    "kernel, case",
    [
        ("sm90", Case(48, 96, 5, BFLOAT16)),
        ("sm80", Case(30, 44, 5, BFLOAT16)),
        ("sm80", Case(48, 144, 5, BFLOAT16, packed=False)),
        ("sm80", Case(24, 20, 5, FLOAT32)),
        ("sm80", Case(40, 72, 5, FLOAT32, precision="high")),
        ("simt", Case(24, 37, 5, FLOAT32)),
        ("simt", Case(62, 68, 5, BFLOAT16, packed=False)),
    ],
    ids=str,
)
def test_subnormal_tokens(program: Path, tmp_path: Path, kernel: str, case: Case) -> None:
    """Many of their values are subnormal, and so are some scales; and a token of zeros."""
    case = replace(case, clip_ratios=RATIOS)
    exact = exact_problem(case.rows, case.cols, case.tokens, case.dtype).problem
    x = exact.input * 2.0**-118
    x[0] = 0.0
    assert (x.abs() < 2.0**-126).float().mean() > 0.2
    problem = exact._replace(input=x)
    check_rounding(case, launch(program, tmp_path, case, problem), case.float64(problem))


@pytest.mark.parametrize(
    "kernel, case",
    [
        ("sm90", Case(60, 72, 3)),
        ("sm90", Case(30, 40, 3)),  # of a stack
        ("sm90", Case(130, 160, 3)),
        ("sm90", Case(204, 232, 3)),  # of one block only
        ("sm80", Case(60, 74, 3)),
        ("sm80", Case(200, 194, 2)),
    ],
    ids=str,
)
def test_one_row_too_large(program: Path, tmp_path: Path, kernel: str, case: Case) -> None:
    """Only one row of the intermediate leaves float16's range: the other warps must follow."""
    x, left, right = case.random_problem()
    x = (x / x.abs().amax(1, keepdim=True) * 2.0**13).half()
    row = int(torch.randint(case.rows, ()))
    left[:, row] *= 256
    problem = Problem(x, left, right / 256)
    intermediate = x.view(-1, case.rows, case.cols).double().mT @ left.double()
    assert (intermediate.abs().amax(1) > 65504).any(0).nonzero().flatten().tolist() == [row]
    for _ in range(3):
        check(case, launch(program, tmp_path, case, problem), problem)
