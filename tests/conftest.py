"""What all tests share: fresh random numbers that can be repeated, and a word on the GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from problems import NO_GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=random.randrange(2**31),
        help="seed of every test's random numbers (default: a new one each run)",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    gpu = NO_GPU or f"kernels on {torch.cuda.get_device_name()}"
    return [f"flatquant: {gpu}", f"random numbers: --seed {config.getoption('--seed')}"]


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws the same numbers alone as among the others."""
    torch.manual_seed(request.config.getoption("--seed"))
    yield
