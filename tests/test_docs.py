"""The Python blocks of the documentation run, and the two languages show the same code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "README.zh.md"]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str) -> None:
    assert blocks(page, "python")
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)


def test_both_languages_give_the_same_commands() -> None:
    english, chinese = (
        [
            re.sub(r"\s*#.*", "", line)
            for block in blocks(page, "bash")
            for line in block.split("\n")
        ]
        for page in PAGES
    )
    assert english == chinese


def test_the_readme_begins_with_the_two_commands() -> None:
    first = [line.split("#")[0].strip() for line in blocks("README.md", "bash")[0].splitlines()]
    assert first == ["./scripts/build.sh --demo", "./scripts/build.sh --test"]
