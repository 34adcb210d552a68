"""csrc/dispatch.h, the table of kernels, asked without a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import shapes

ROOT = Path(__file__).resolve().parent.parent
FLOAT16, BFLOAT16, FLOAT32 = range(3)
Question = tuple[int, str, int, int, int]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("dispatch") / "dispatch"
    source = ROOT / "tests" / "dispatch_main.cpp"
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def ask(program: Path, questions: list[Question]) -> list[str]:
    text = "".join(" ".join(map(str, question)) + "\n" for question in questions)
    run = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    "architectures, capability, kernels",
    [
        ("90a", 90, "sm90,simt"),
        ("80;90a;120", 90, "sm90,simt"),
        ("80", 90, "-"),
        # simt's PTX runs on Hopper; sm90 is empty in anything but code for 90a.
        ("80+PTX", 90, "simt"),
        ("80;90a+PTX", 90, "sm90,simt"),
        ("80;90a+PTX", 120, "simt"),
        ("90a", 100, "-"),
        ("80", 86, "simt"),
        ("86", 80, "-"),
        ("75;80", 75, "simt"),
        ("100f", 100, "simt"),
        ("100f", 103, "simt"),
        ("100a", 103, "-"),
        ("60", 61, "simt"),
        ("60+PTX", 120, "simt"),
    ],
)
def test_a_kernel_serves_where_the_binary_has_its_code(
    program: Path, architectures: str, capability: int, kernels: str
) -> None:
    assert ask(program, [(capability, architectures, FLOAT16, 64, 64)]) == [kernels]


def test_every_model_size_has_a_kernel_and_a_tensor_core_one_where_rows_are_16_bytes(
    program: Path,
) -> None:
    for dtype in (FLOAT16, BFLOAT16, FLOAT32):
        answers = ask(program, [(90, "90a", dtype, M, N) for M, N in shapes.SIZES])
        for (M, N), answer in zip(shapes.SIZES, answers, strict=True):
            on_tensor_cores = dtype != FLOAT32 and N % 8 == 0 and M <= 192
            assert answer == ("sm90,simt" if on_tensor_cores else "simt"), (M, N, dtype)


@pytest.mark.parametrize("M, N, kernels", [(8192, 1, "simt"), (1, 32768, "simt"), (8193, 1, "-")])
def test_simt_ends_where_shared_memory_does(program: Path, M: int, N: int, kernels: str) -> None:
    assert ask(program, [(60, "60", FLOAT32, M, N)]) == [kernels]
