#!/usr/bin/env bash
# Sets up a Python environment and builds flatquant in it. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: ./scripts/build.sh [--demo [ARGUMENTS] | --test [ARGUMENTS]]

Sets up what is missing (.venv, torch, CUTLASS headers), compiles the CUDA extension and installs
flatquant in place. Run it again after a change: only what changed is compiled.

  (no option)  build only
  --demo       then run `python -m flatquant ARGUMENTS`
  --test       then run `python -m pytest tests ARGUMENTS`
  --help       this text

Environment:
  VIRTUAL_ENV            the environment to use, if one is active; else .venv is made
  PYTHON                 the Python that .venv is made from (default python3, 3.10 or newer)
  TORCH_SPEC             the torch to install (default: torch>=2.10, unless it is there already)
  FLATQUANT_CUDA_ARCHS   what to compile for, such as "80;90a" (default: TORCH_CUDA_ARCH_LIST, else
                         the GPUs of this machine, else all generations that nvcc knows)
  CUDA_HOME              the CUDA toolkit (default: nvcc on PATH, else /usr/local/cuda)
  CUTLASS_PATH           a CUTLASS checkout (default: third_party/cutlass, else the PyPI wheel)
  MAX_JOBS               compilers to run at once (default: one per core)
TEXT
}

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

action=build
case "${1:-}" in
  "") ;;
  --demo | --test) action=${1#--}; shift ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# The environment.
if [[ -z ${VIRTUAL_ENV:-} ]]; then
  VIRTUAL_ENV=$PWD/.venv
  if [[ ! -x .venv/bin/python ]]; then
    base=${PYTHON:-python3}
    is_new_enough "$base" \
      || fail "Python 3.10 or newer is needed, '$base' is not; set PYTHON=python3.12"
    say "making .venv from $("$base" --version)"
    # A torch that is there already (a container's, say) is used, not downloaded again.
    shared=()
    if [[ -z ${TORCH_SPEC:-} ]] && "$base" -c 'import torch' 2>/dev/null; then
      shared=(--system-site-packages)
    fi
    "$base" -m venv "${shared[@]}" .venv \
      || fail "no venv (Debian, Ubuntu: apt install python3-venv)"
  fi
fi
python=$VIRTUAL_ENV/bin/python
is_new_enough "$python" || fail "$python is missing or older than Python 3.10"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null \
  || fail "$python has no pip"
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

say "environment: $VIRTUAL_ENV"
install "pip>=22.3" "setuptools>=77" ninja
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then
  say "installing ${TORCH_SPEC:-torch>=2.10} (large)"
fi
install "${TORCH_SPEC:-torch>=2.10}" numpy

# The extension.
nvcc=$("$python" -c 'import runpy; print(runpy.run_path("setup.py")["find_nvcc"]() or "")')
if [[ -n $nvcc ]]; then
  if [[ -z ${CUTLASS_PATH:-} ]] && ! "$python" third_party/cutlass.py >/dev/null 2>&1; then
    pin=$("$python" third_party/cutlass.py --pin)
    say "installing the CUTLASS headers ($pin)"
    install --no-deps "$pin"
  fi
  if [[ -z ${FLATQUANT_CUDA_ARCHS:-}${TORCH_CUDA_ARCH_LIST:-} ]]; then
    gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
      | grep -E '^[0-9]+\.[0-9]+$' | sort -u | paste -sd ';' || true)
    export FLATQUANT_CUDA_ARCHS=$gpus
  fi
  say "compiling (the first time takes minutes)"
  "$python" setup.py --quiet build_ext --inplace
else
  say "no nvcc found (set CUDA_HOME): reference-only install, without the CUDA kernels"
fi

extras=""
[[ $action == test ]] && extras="[test]"
install --no-build-isolation --editable ".$extras"

case $action in
  demo) say "python -m flatquant $*"; exec "$python" -m flatquant "$@" ;;
  test) say "python -m pytest tests $*"; exec "$python" -m pytest tests "$@" ;;
  build) say "ready: source $VIRTUAL_ENV/bin/activate && python -m flatquant" ;;
esac
