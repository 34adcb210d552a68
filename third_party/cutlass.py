"""The one place that knows where the CUTLASS headers are.

Looked up in this order, and never downloaded from here:

1. ``CUTLASS_PATH``: a CUTLASS checkout, or the folder that holds ``cutlass/version.h``;
2. a checkout at ``third_party/cutlass``;
3. the ``nvidia-cutlass`` wheel of the running Python (found, not imported: importing it pulls in
   scipy, networkx and cuda-python).

``python third_party/cutlass.py`` prints the include folder, ``--pin`` the wheel the project is
tested with.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

PIN = "nvidia-cutlass==4.2.0.0"
MIN_VERSION = (4, 2)
CHECKOUT = Path(__file__).resolve().parent / "cutlass"

WHAT_TO_DO = f"""\
Do one of these:
  pip install --no-deps {PIN}
  export CUTLASS_PATH=/path/to/a/cutlass/checkout
  git clone --depth 1 -b v4.2.0 https://github.com/NVIDIA/cutlass third_party/cutlass"""


class CutlassError(RuntimeError):
    """The CUTLASS headers are missing or too old; the text says what to do."""


def include_dir() -> Path:
    """Folder to pass as ``-I``. Raises CutlassError if there is none or it is older than 4.2."""
    looked = []
    for origin, folders in _candidates():
        for folder in folders:
            if (folder / "cutlass" / "version.h").is_file():
                _check_version(folder, origin)
                return folder
        looked.append(f"  {origin}: {', '.join(map(str, folders)) or 'not installed'}")
    raise CutlassError("\n".join(["CUTLASS headers not found. Looked in", *looked, WHAT_TO_DO]))


def version(folder: Path) -> tuple[int, int, int]:
    """(major, minor, patch) of the headers in `folder`, read from ``cutlass/version.h``."""
    text = (folder / "cutlass" / "version.h").read_text()
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", text))
    if len(numbers) != 3:
        raise CutlassError(f"no version in {folder / 'cutlass' / 'version.h'}\n{WHAT_TO_DO}")
    return int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])


def _candidates() -> list[tuple[str, list[Path]]]:
    if path := os.environ.get("CUTLASS_PATH"):  # asked for by name: nothing may stand in for it
        root = Path(path).expanduser().resolve()
        return [("CUTLASS_PATH", [root / "include", root])]
    spec = importlib.util.find_spec("cutlass_library")
    roots = (spec and spec.submodule_search_locations) or []
    wheel = [Path(root) / "source" / "include" for root in roots]
    return [("checkout", [CHECKOUT / "include"]), ("nvidia-cutlass wheel", wheel)]


def _check_version(folder: Path, origin: str) -> None:
    found = version(folder)
    if found[:2] < MIN_VERSION:
        raise CutlassError(
            f"CUTLASS {'.'.join(map(str, found))} in {folder} ({origin}) is too old: "
            f"{'.'.join(map(str, MIN_VERSION))} or newer is needed.\n{WHAT_TO_DO}"
        )


if __name__ == "__main__":
    try:
        print(PIN if sys.argv[1:] == ["--pin"] else include_dir())
    except CutlassError as error:
        sys.exit(str(error))
