"""Audits a wheel: `python scripts/check_wheel.py WHEEL ARCHITECTURES`, such as `"100;103;120"`.

Name, size, what the library links, torch's stable ABI, abi3, manylinux and the architectures of the
machine code. Needs what scripts/wheel_tools.txt lists, on PATH. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 60_000_000
LIBRARY = "flatquant/_C.abi3.so"
NAME = re.compile(r"flatquant_cutlass-[\d.]+\+cu\d+\.\w+-cp310-abi3-(manylinux\w+)\.whl")
# Beyond what every Linux has. The CUDA runtime is linked statically, the driver found at run time.
EXTERNAL_LIBRARIES = {"libtorch.so", "libtorch_cpu.so"}


class WheelError(Exception):
    """The wheel is not what its name and the architectures asked for say."""


def run(*command: str | Path) -> str:
    """The output of a command, which must succeed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise WheelError(f"{command[0]}: {result.stdout}{result.stderr}")
    return result.stdout


def check(wheel: Path, archs: list[str]) -> str:
    """One line about the wheel. Raises WheelError."""
    name = NAME.fullmatch(wheel.name)
    if not name:
        raise WheelError(f"the name is not {NAME.pattern}")
    size = wheel.stat().st_size
    if size >= MAX_BYTES:
        raise WheelError(f"has {size} bytes, {MAX_BYTES} is the limit")

    linux = json.loads(run("auditwheel", "show", "--json", wheel))
    if set(linux["external_libs"]) != EXTERNAL_LIBRARIES:
        raise WheelError(f"links {sorted(linux['external_libs'])}")
    if linux["sym_tag"] != name[1]:
        raise WheelError(f"is tagged {name[1]}, its symbols allow {linux['sym_tag']}")
    run("abi3audit", "--strict", wheel)

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [file for file in archive.namelist() if ".so" in file]
        if libraries != [LIBRARY]:
            raise WheelError(f"holds the libraries {libraries}")
        library = archive.extract(LIBRARY, folder)
        run("torch-abi-audit", "--check", "both", library)
        found = set(re.findall(r"\.sm_(\w+)\.cubin", run("cuobjdump", "-lelf", library)))
    if found != set(archs):
        raise WheelError(f"holds code for {sorted(found)}, not for {archs}")
    return f"{wheel.name}: {size / 1e6:.1f} MB, {name[1]}, sm_{' sm_'.join(archs)}; audits passed"


if __name__ == "__main__":
    path, architectures = sys.argv[1:]
    try:
        print(check(Path(path), architectures.split(";")))
    except WheelError as error:
        sys.exit(f"{path}: {error}")
