"""Accuracy against float64: `python tests/test_accuracy.py` prints a table, pytest runs the same.

Every kernel of this machine, and the reference, for every dtype and both storages. The exit status
is 1 if a result lies outside the tolerances of flatquant.accuracy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from problems import DTYPES, NO_GPU, dtype_name, float64, random_problem

from flatquant import accuracy, available_kernels, dequantize_int4, flatquant_dynamic_quantize
from flatquant.decompose import get_decompose_dim

FEATURES = [576, 4096, 5120, 8192, 11008, 14336]
DEVICE = "cpu" if NO_GPU else "cuda"
TOKENS = 32 if NO_GPU else 1024
CLIP_RATIO = 0.95


class Row:
    """One line of the table: one kernel on one problem in one storage."""

    def __init__(self, features: int, dtype: torch.dtype, kernel: str, pack_int32: bool) -> None:
        self.kernel, self.storage = kernel, "int32" if pack_int32 else "int8"
        self.dtype, self.sizes = dtype, get_decompose_dim(features)
        problem = random_problem(*self.sizes, TOKENS, dtype, DEVICE)
        exact = float64(problem)
        result = flatquant_dynamic_quantize(*problem, CLIP_RATIO, pack_int32, kernel=kernel)
        # The reference computes in float32 and rounds nothing to the input's dtype.
        judged_as = torch.float32 if kernel == "reference" else dtype
        self.result = accuracy.compare(*result, exact, CLIP_RATIO, judged_as)
        dequantized = dequantize_int4(*result, packed_int32=pack_int32)
        self.error = ((dequantized - exact).abs() / result[1][:, None]).max().item()
        # Half a step, and what the tolerance allows Y (7 / clip_ratio steps at most) and the scale.
        self.ok = self.result.ok and (
            self.error <= 0.5 + 8 * self.result.tolerance.transform / CLIP_RATIO
        )

    def __str__(self) -> str:
        M, N = self.sizes
        result = self.result
        return (
            f"{M * N:>8} {f'{M}x{N}':>8} {dtype_name(self.dtype):>9} {self.storage:>7} "
            f"{self.kernel:>10} {result.mismatch:>9.1e} {result.tolerance.mismatch:>6.0e} "
            f"{result.max_step:>5} {result.scale_error:>11.1e} {self.error:>6.3f} "
            f"{'ok' if self.ok else 'FAILED':>7}"
        )


HEADER = (
    f"{'features':>8} {'MxN':>8} {'dtype':>9} {'storage':>7} {'kernel':>10} {'mismatch':>9} "
    f"{'limit':>6} {'steps':>5} {'scale error':>11} {'error':>6} {'result':>7}"
)


def rows(features: int, dtype: torch.dtype) -> Iterator[Row]:
    for kernel in available_kernels(*get_decompose_dim(features), dtype, DEVICE):
        for pack_int32 in (False, True):
            yield Row(features, dtype, kernel, pack_int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("features", FEATURES)
def test_every_kernel_of_this_machine_agrees_with_float64(
    features: int, dtype: torch.dtype
) -> None:
    for row in rows(features, dtype):
        assert row.ok, f"{row}\n{row.result}"


def main() -> int:
    where = f"CUDA kernels on {torch.cuda.get_device_name()}" if not NO_GPU else "the reference"
    print(f"Codes and scales of {where} against float64: {TOKENS} tokens, clip {CLIP_RATIO}")
    if NO_GPU:
        print(f"({NO_GPU})")
    print("mismatch: share of codes that differ from float64's; steps: by how much, at most;")
    print("error: largest distance of a dequantized value from Y, in units of its scale\n")
    print(HEADER)
    failures = 0
    for dtype in DTYPES:
        for features in FEATURES:
            for row in rows(features, dtype):
                print(row)
                if not row.ok:
                    failures += 1
                    print(row.result)
    print(f"\n{failures} FAILED" if failures else "\nall within the tolerances")
    return 1 if failures else 0


def test_the_script_runs_from_any_folder_and_prints_the_table(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert HEADER in run.stdout
    assert run.stdout.count(" ok\n") >= len(FEATURES) * len(DTYPES) * 2
    assert NO_GPU in run.stdout


def test_the_scripts_status_tells_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FEATURES", FEATURES[:1])
    assert main() == 0

    right = flatquant_dynamic_quantize

    def wrong(*arguments: Any, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, scales = right(*arguments, kernel=kernel)
        return quantized, scales * 1.5

    monkeypatch.setattr(sys.modules[__name__], "flatquant_dynamic_quantize", wrong)
    assert main() == 1
    assert "FAILED" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(main())
