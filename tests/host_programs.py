"""C++ programs over the headers of csrc, for the tests that need no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def compile_program(source: Path, target: Path) -> Path:
    """The program of a source that may include csrc's plain headers; skips without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def output_of(program: Path, text: str = "") -> str:
    """What it prints when given `text`."""
    run = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return run.stdout
