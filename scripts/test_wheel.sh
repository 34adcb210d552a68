#!/usr/bin/env bash
# Tests a wheel on its own under one torch after another. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: ./scripts/test_wheel.sh WHEEL [TORCH...]

For each TORCH, such as torch==2.13.0 (default: the oldest that flatquant takes, and the newest that
pip finds), installs it and WHEEL into a new environment, runs `python -m flatquant` and the test
suite there, and prints the table of docs/install.md. Nothing but that environment's own programs is
on PATH: no nvcc, no compiler; and what is imported is the wheel, not this checkout.

  PYTHON   the Python to test with (default python3)
TEXT
}

[[ ${1:-} == *.whl ]] || { usage; exit 2; }
wheel=$(realpath "$1")
shift
if [[ $# -gt 0 ]]; then torches=("$@"); else torches=("torch==2.10.*" "torch>=2.10"); fi

# The tests, without the package that they would import from here.
rm -rf build/wheel-tests
mkdir -p build/wheel-tests
cp -r .ci benchmarks csrc docs scripts tests third_party ./*.md CITATION.cff pyproject.toml \
  setup.py build/wheel-tests

rows=()
for torch in "${torches[@]}"; do
  environment=$PWD/build/wheel-environment
  "${PYTHON:-python3}" -m venv --clear "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    "$torch" "${wheel}[test]"
  cd build/wheel-tests
  PATH=$environment/bin "$environment/bin/python" -m flatquant
  # Left out: what tests the sources and scripts, and needs compilers.
  PATH=$environment/bin "$environment/bin/python" -m pytest tests --ignore tests/test_build.py \
    --ignore tests/test_dispatch.py --ignore tests/test_emulator.py \
    --ignore tests/test_old_gpus.py --ignore tests/test_sanitizer.py | tee suite.log
  rows+=("$("$environment/bin/python" -c '
import platform, re, torch, flatquant
suite = open("suite.log").read().splitlines()[-1]
loaded = " ".join(f"sm_{arch}" for arch in flatquant.__cuda_archs__) or "not loaded: no CUDA in torch"
print("|", torch.__version__, "|", platform.python_version(), "|", loaded, "|",
      re.sub(r"=+ | in .*", "", suite), "|")')")
  cd ../..
done
printf '\n| torch | Python | extension | suite |\n|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
