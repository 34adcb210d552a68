"""What scripts/sanitize.sh needs, as far as it runs without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from problems import NO_GPU

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "sanitizer" / "run_kernels.py"


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SUITE, *arguments], capture_output=True, text=True)


def test_the_reduced_suite_runs_on_the_reference() -> None:
    run = suite("--device", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"launches: (\d+) of reference; wrong results: 0", run.stdout)
    assert found and int(found[1]) > 100, run.stdout


def test_a_reduced_suite_of_no_kernel_fails() -> None:
    run = suite("--device", "cpu", "--kernel", "no such kernel")
    assert run.returncode == 1 and "launches: ;" in run.stdout


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_the_reduced_suite_does_not_pass_without_a_gpu() -> None:
    run = suite()
    assert run.returncode == 2 and NO_GPU in run.stdout


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is there")
def test_the_script_says_what_it_lacks() -> None:
    environment = {**os.environ, "CUDA_HOME": "/nonexistent"}
    command = [ROOT / "scripts" / "sanitize.sh"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "no compute-sanitizer" in run.stderr
