#!/usr/bin/env bash
# Builds the source distribution and, from it, one wheel per set of architectures. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: ./scripts/build_wheels.sh [SET...]

Builds dist/flatquant_cutlass-X.Y.Z.tar.gz and from it, for each SET (default: each of them), a wheel
dist/flatquant_cutlass-X.Y.Z+cuNNN.SET-cp310-abi3-manylinux_*.whl, then audits what was built.

  sm75    Turing (7.5)
  sm80    Ampere and Ada (8.0, 8.6, 8.9)
  sm90    Hopper (9.0)
  sm100   Blackwell (10.0, 10.3, 12.0)
  all     all of these

Run ./scripts/build.sh once before: its environment (VIRTUAL_ENV if set, else .venv) has torch, ninja
and the CUTLASS headers. CUDA_HOME and MAX_JOBS as there. The platform tag is the one that the
symbols of the binary allow: build on an old Linux for a tag that serves old ones.
TEXT
}

declare -A archs=([sm75]="75" [sm80]="80;86;89" [sm90]="90a" [sm100]="100;103;120")
archs[all]="${archs[sm75]};${archs[sm80]};${archs[sm90]};${archs[sm100]}"

sets=(sm75 sm80 sm90 sm100 all)
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") ;;
  *) sets=("$@") ;;
esac
for set in "${sets[@]}"; do
  [[ -n ${archs[$set]:-} ]] || { usage >&2; exit 2; }
done

python=${VIRTUAL_ENV:-$PWD/.venv}/bin/python
cuda=$("$python" -c '
import runpy
setup = runpy.run_path("setup.py")
print(setup["Toolkit"](setup["find_nvcc"]()).version)')

# What audits the wheels lives apart from the environment that builds them.
tools=$PWD/build/wheel-tools
"$python" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check -r scripts/wheel_tools.txt
PATH=$PATH:$tools/bin:$(echo "$tools"/lib/python3*/site-packages/nvidia/cu13/bin)

# Every wheel is built from what the source distribution holds; the objects are shared.
rm -rf build/sdist && mkdir -p build/sdist dist
"$python" -W ignore setup.py --quiet sdist --dist-dir build/sdist
tar -xzf build/sdist/*.tar.gz -C build/sdist
cp build/sdist/*.tar.gz dist/
source=$(echo build/sdist/*/)
ln -s "$PWD/build" "$source/build"

for set in "${sets[@]}"; do
  echo "==> $set: CUDA $cuda, ${archs[$set]}"
  out=$PWD/build/wheels/$set
  rm -rf "$out"
  (cd "$source" && FLATQUANT_CUDA_ARCHS=${archs[$set]} "$python" -W ignore setup.py --quiet \
    egg_info --tag-build="+cu${cuda/./}.$set" \
    build --build-lib="$out/lib" bdist_wheel --bdist-dir="$out/bdist" --dist-dir="$out")
  # Torch's libraries come with torch; nothing else is bundled either (check_wheel.py).
  auditwheel repair --exclude 'libtorch*.so' --wheel-dir "$out/tagged" "$out"/*.whl
  "$tools/bin/python" scripts/check_wheel.py "$out"/tagged/*.whl "${archs[$set]}"
  cp "$out"/tagged/*.whl dist/
done
