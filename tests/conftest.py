"""What all tests share: fresh random numbers that can be repeated, and a word on the GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, settings
from launches import COUNTS
from problems import NO_GPU

# A failing case is printed whole and can be run again by itself, so it is not shrunk: on a GPU that
# would take minutes. --hypothesis-profile=thorough for the 10,000 cases of a release.
_common = settings(deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
settings.register_profile("quick", _common, max_examples=40 if NO_GPU else 400)
settings.register_profile("thorough", _common, max_examples=10_000)
settings.load_profile("quick")


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{name}: {count:,}")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws the same numbers alone as among the others."""
    torch.manual_seed(request.config.getoption("--seed"))
    yield
