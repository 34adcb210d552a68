"""csrc/dispatch.h, the table of kernels, asked without a GPU."""

from pathlib import Path

import pytest
import shapes
from host_programs import ROOT, compile_program, output_of

FLOAT16, BFLOAT16, FLOAT32 = range(3)
HIGHEST, HIGH = range(2)
Question = tuple[int, str, int, int, int]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dispatch") / "dispatch"
    return compile_program(ROOT / "tests" / "dispatch_main.cpp", target)


def ask(program: Path, questions: list[Question], precision: int = HIGHEST) -> list[str]:
    lines = [" ".join(map(str, (*q[:3], precision, *q[3:]))) + "\n" for q in questions]
    return output_of(program, "".join(lines)).splitlines()


@pytest.mark.parametrize(
    "architectures, capability, kernels",
    [
        ("90a", 90, "sm90,sm80,simt"),
        ("80;90a;120", 90, "sm90,sm80,simt"),
        ("80", 90, "-"),
        # PTX runs on Hopper; sm90 is empty in anything but code for 90a, sm80 in what is older.
        ("80+PTX", 90, "sm80,simt"),
        ("75+PTX", 90, "simt"),
        ("75+PTX;80", 90, "simt"),
        ("80;90a+PTX", 90, "sm90,sm80,simt"),
        ("80;90a+PTX", 120, "sm80,simt"),
        ("90a", 100, "-"),
        ("80", 86, "sm80,simt"),
        ("86", 80, "-"),
        ("75;80", 75, "simt"),
        ("100f", 100, "sm80,simt"),
        ("100f", 103, "sm80,simt"),
        ("100a", 103, "-"),
        ("60", 61, "simt"),
        ("60+PTX", 120, "simt"),
    ],
)
def test_a_kernel_serves_where_the_binary_has_its_code(
    program: Path, architectures: str, capability: int, kernels: str
) -> None:
    (answer,) = ask(program, [(capability, architectures, FLOAT16, 64, 64)])
    assert answer == kernels if kernels != "-" else answer.startswith("built for sm_")


@pytest.mark.parametrize(
    "architectures, capability, message",
    [
        ("80;90a", 75, "built for sm_80;sm_90a, this GPU is sm_75"),
        ("90a+PTX", 89, "built for sm_90a+PTX, this GPU is sm_89"),
        ("75", 120, "built for sm_75, this GPU is sm_120"),
    ],
)
def test_a_binary_without_code_for_the_gpu_says_what_it_has_and_what_to_do(
    program: Path, architectures: str, capability: int, message: str
) -> None:
    rebuild = f": rebuild with FLATQUANT_CUDA_ARCHS={capability}"
    assert ask(program, [(capability, architectures, FLOAT32, 24, 24)]) == [message + rebuild]


def float32_fits_sm80(capability: int, M: int, N: int) -> bool:
    """Both factors and a token, each row 16 bytes longer than a multiple of 128, and a little."""
    kibibytes = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}.get(capability, 99)
    depth, rows = -(-M // 16) * 16, -(-M // 32) * 32
    cols = -(-N // 32) * 32
    token = max(depth * (cols + 4), rows * cols if cols > 64 else 0)
    floats = depth * (rows + 4) + cols * (cols + 4) + token
    return N <= 128 and 4 * floats + 512 <= kibibytes * 1024


@pytest.mark.parametrize(
    "capability", [60, 61, 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]
)
def test_the_kernels_of_every_model_size(program: Path, capability: int) -> None:
    """Prints the table (pytest -s): tensor cores from Ampere on, but where float32 loses by it."""
    architectures = "60;61;70;75;80;86;89;90a;100;103;110;120"
    print(f"\ncompute capability {capability / 10}: float16, bfloat16, float32, the same as TF32")
    rows: dict[tuple[int, int], list[str]] = {size: [] for size in shapes.SIZES}
    for dtype, precision in (
        (FLOAT16, HIGHEST),
        (BFLOAT16, HIGHEST),
        (FLOAT32, HIGHEST),
        (FLOAT32, HIGH),
    ):
        questions = [(capability, architectures, dtype, M, N) for M, N in shapes.SIZES]
        for (M, N), answer in zip(shapes.SIZES, ask(program, questions, precision), strict=True):
            rows[M, N].append(answer)
            expected = ["simt"]
            gains = precision == HIGH or capability in (80, 90, 100, 103)
            serves = dtype != FLOAT32 or (gains and float32_fits_sm80(capability, M, N))
            if capability >= 80 and serves:
                expected.insert(0, "sm80")
            on_sm90 = max(M, N) <= 128 if dtype == FLOAT32 else M <= 192 or (M, N) == (208, 256)
            is_fit = N % 8 == 0 or (dtype != FLOAT32 and (M, N) in shapes.RAGGED)
            if capability == 90 and on_sm90 and is_fit:
                expected.insert(0, "sm90")
            assert answer.split(",") == expected, (M, N, dtype)
    for (M, N), answers in rows.items():
        print(f"{M:>4}x{N:<4}" + "".join(f"{answer:<16}" for answer in answers).rstrip())


@pytest.mark.parametrize(
    "M, N, serves",
    [
        # Ragged tokens.
        (32, 60, True),
        (24, 60, False),  # fills less than half of its class
        (44, 60, False),  # rows no multiple of 8: codes of a token may be no multiple of 16 bytes
        (48, 62, False),
        (96, 148, True),
        (130, 148, False),  # no class
        # Clusters.
        (208, 256, True),
        (130, 256, True),
        (200, 168, True),
        (193, 168, False),  # fills less than five eighths of its class
        (144, 208, False),
        (209, 256, False),
        (208, 264, False),
    ],
)
def test_sm90_takes_ragged_tokens_and_clusters_that_fill_enough_of_a_class(
    program: Path, M: int, N: int, serves: bool
) -> None:
    for dtype in (FLOAT16, BFLOAT16, FLOAT32):
        (answer,) = ask(program, [(90, "90a", dtype, M, N)])
        assert ("sm90" in answer.split(",")) == (serves and dtype != FLOAT32)


@pytest.mark.parametrize(
    "M, N, kernels",
    [(1, 1, "sm80,simt"), (256, 256, "sm80,simt"), (257, 8, "simt"), (8, 257, "simt")],
)
def test_sm80_takes_16_bit_sizes_to_256(program: Path, M: int, N: int, kernels: str) -> None:
    assert ask(program, [(86, "86", BFLOAT16, M, N)]) == [kernels]


@pytest.mark.parametrize("M, N, kernels", [(32768, 1, "simt"), (1, 32768, "simt"), (32769, 1, "-")])
def test_simt_ends_where_a_factors_elements_are_too_many_for_int(
    program: Path, M: int, N: int, kernels: str
) -> None:
    assert ask(program, [(60, "60", FLOAT32, M, N)]) == [kernels]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32])
@pytest.mark.parametrize(
    "architectures, capability, kernels",
    [
        ("60", 60, "plain"),
        ("75+PTX", 90, "plain"),
        ("80;90a", 90, "plain"),
        ("80;90a", 120, "built for sm_80;sm_90a, this GPU is sm_120"),
        ("50+PTX", 53, "-"),
    ],
)
def test_only_plain_serves_without_a_transform(
    program: Path, architectures: str, capability: int, kernels: str, dtype: int
) -> None:
    (answer,) = ask(program, [(capability, architectures, dtype, 0, 0)])
    assert answer.partition(":")[0] == kernels
    for M, N in [(0, 64), (64, 0), (-1, -1)]:
        assert ask(program, [(90, "80;90a", dtype, M, N)]) == ["-"]


def test_every_size_has_a_plan_that_fits(tmp_path: Path) -> None:
    program = compile_program(ROOT / "tests" / "plan_main.cpp", tmp_path / "plan")
    assert output_of(program) == (
        f"sm80 {2 * 3 * 256 * 256}, simt {2 * 2 * 264 * 264}, plain {70_100 * 6} plans\n"
    )
