"""The documentation: its code runs, its messages and links exist, both languages agree."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from problems import NO_GPU

import flatquant

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", *DOCS]

#: What a Python block may ask for in its first line, `# needs ...`, and why it is not there.
MISSING = {
    "": "",
    "a GPU": NO_GPU,
    "a C++ compiler": "" if shutil.which("g++") else "no g++, which torch.compile needs on the CPU",
}

#: Commands that are not run here, and why. Those of CI are looked up in .ci/run.
CI = "run by CI"
NOT_RUN_HERE = {
    "./scripts/build.sh --demo": CI,
    "./scripts/build.sh --test": CI,
    "./scripts/build_wheels.sh": CI,
    "ruff check .": CI,
    "ruff format --check .": CI,
    "mypy": CI,
    "cffconvert --validate": CI,
    "./scripts/build.sh": "compiles",
    'FLATQUANT_CUDA_ARCHS="80;90a" ./scripts/build.sh': "compiles",
    "python setup.py build_ext --inplace": "compiles; tests/test_build.py runs it elsewhere",
    "./scripts/test_wheel.sh dist/flatquant_cutlass-*.sm90-*.whl": "downloads; CI tests one torch",
    "bash .ci/run": "would run itself",
    "python -m pytest tests": "would run itself",
    "python -m pytest tests --seed 1": "would run itself",
    "python -m pytest tests/test_kernels.py": "would run itself",
    "python -m pytest tests/test_property.py --hypothesis-profile=thorough": "takes minutes",
    "./scripts/sanitize.sh": "needs a GPU",
    "compute-sanitizer --tool memcheck python -m pytest tests/test_kernels.py -x": "needs a GPU",
    "python tests/test_accuracy.py": "tests/test_accuracy.py runs it",
    "python tests/test_performance.py --detailed": "tests/test_performance.py runs it",
    "python benchmarks/bench_quantize.py": "needs a GPU",
    "python benchmarks/bench_outputs.py": "needs a GPU",
    "python benchmarks/smollm2_activations.py": "needs a model",
    "python benchmarks/smollm2_quality.py": "needs a model",
    "pip install --no-deps nvidia-cutlass==4.2.0.0": "downloads; scripts/build.sh runs it",
    "pip install --no-build-isolation flatquant_cutlass-X.Y.Z.tar.gz": "compiles",
    'pip install -e ".[dev]"': "downloads",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def blocks_in(page: str, language: str) -> list[str]:
    return [text for name, text in blocks(page) if name == language]


def need(block: str) -> str:
    match = re.match(r"# needs (.*)\n", block)
    return match[1] if match else ""


def promised_output(block: str) -> list[str]:
    """The comments beside prints, and those in lines of their own right after them."""
    lines, promised = block.splitlines(), []
    for i, line in enumerate(lines):
        if not re.match(r"\s*print\(", line):
            continue
        if beside := re.search(r"\)  # (.*)$", line):
            promised.append(beside[1])
        for following in lines[i + 1 :]:
            if not following.startswith("# "):
                break
            promised.append(following[2:])
    return promised


PYTHON = sorted({(page, need(block)) for page in PAGES for block in blocks_in(page, "python")})


@pytest.mark.parametrize("page, needs", PYTHON)
def test_python_blocks_run_and_print_what_they_say(page: str, needs: str) -> None:
    if MISSING[needs]:
        pytest.skip(MISSING[needs])
    namespace: dict[str, object] = {}
    for block in blocks_in(page, "python"):
        if need(block) != needs:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(block, page, "exec"), namespace)
        assert output.getvalue().splitlines() == promised_output(block), block


COMMANDS = {
    line.split("  #")[0].strip(): page
    for page in PAGES
    for block in blocks_in(page, "bash")
    for line in block.splitlines()
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str) -> None:
    reason = NOT_RUN_HERE.get(command)
    if reason == CI:
        assert command in re.sub(r'"|\$tools/bin/', "", (ROOT / ".ci" / "run").read_text())
        return
    if reason:
        pytest.skip(reason)
    program, *arguments = shlex.split(command)
    assert program == "python", f"{command} in {COMMANDS[command]}: run it, or say why not"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_command_is_excused_that_is_not_there() -> None:
    assert set(NOT_RUN_HERE) <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page: str) -> None:
    # Without one: formulas and messages. `text`: drawings.
    assert {language for language, _ in blocks(page)} <= {"python", "bash", "text", ""}


def source_text() -> str:
    """All messages of the project, with string literals joined that the source breaks up."""
    package = Path(flatquant.__file__).parent
    files = [*package.glob("*.py"), *ROOT.glob("csrc/**/*.*"), *ROOT.glob("scripts/*.sh")]
    files += [ROOT / "setup.py", ROOT / "third_party" / "cutlass.py"]
    text = "\n".join(path.read_text() for path in files if path.suffix in SOURCES)
    return re.sub(r'"\s*\n\s*f?"', "", text).replace('", "', "").replace("\\n", "\n")


SOURCES = {".py", ".sh", ".cpp", ".h", ".cuh"}
MESSAGES = dict.fromkeys(
    message
    for page, heading in [
        ("README.md", "## Troubleshooting"),
        ("README.zh.md", "## 排错"),
        ("docs/troubleshooting.md", "# Troubleshooting"),
    ]
    for message in re.findall(
        r"^\| `([^`]+)` \|",
        (ROOT / page).read_text(encoding="utf-8").split(heading)[1],
        re.MULTILINE,
    )
)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_in_the_source(message: str) -> None:
    source = source_text()
    for part in filter(None, map(str.strip, message.split("…"))):
        assert part in source, f"{part!r} of {message!r}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


def test_both_languages_give_the_same_commands() -> None:
    english, chinese = (
        [
            re.sub(r"\s*#.*", "", line)
            for block in blocks_in(page, "bash")
            for line in block.split("\n")
        ]
        for page in ("README.md", "README.zh.md")
    )
    assert english == chinese


def test_the_readme_begins_with_the_two_commands() -> None:
    first = [line.split("#")[0].strip() for line in blocks_in("README.md", "bash")[0].splitlines()]
    assert first == ["./scripts/build.sh --demo", "./scripts/build.sh --test"]
