#!/usr/bin/env bash
# Runs the kernels under compute-sanitizer: memcheck, racecheck, initcheck and synccheck at once, each
# over tests/sanitizer/run_kernels.py. Needs a GPU, the built extension and a CUDA toolkit. Logs go to
# build/sanitizer. `--kernel sm80` runs that kernel alone. Exit status 1 if a tool finds anything, or
# misses a planted mistake.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ $# == 0 || ($# == 2 && $1 == --kernel) ]] \
  || { echo "Usage: ./scripts/sanitize.sh [--kernel NAME]" >&2; exit 2; }
cuda=${CUDA_HOME:-/usr/local/cuda}
sanitizer=$(PATH=$PATH:$cuda/bin:$cuda/compute-sanitizer command -v compute-sanitizer) \
  || { echo "sanitize.sh: no compute-sanitizer on PATH or in $cuda" >&2; exit 2; }
nvcc=$(PATH=$PATH:$cuda/bin command -v nvcc) || { echo "sanitize.sh: no nvcc" >&2; exit 2; }
python=$(command -v "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python" || command -v python3)
tools=(memcheck racecheck initcheck synccheck)
logs=$PWD/build/sanitizer
mkdir -p "$logs"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
found=99 # exit status of compute-sanitizer when it finds something

check() { # tool, log, command
  "$sanitizer" --tool "$1" --error-exitcode $found --launch-timeout 120 "${@:3}" >"$2" 2>&1
}

"$nvcc" -o "$logs/planted" tests/sanitizer/planted.cu
declare -A planted running
for tool in "${tools[@]}"; do
  (
    start=$SECONDS
    status=0
    check "$tool" "$logs/$tool.planted.log" "$logs/planted" "$tool" || status=$?
    echo $status >"$logs/$tool.planted"
    status=0
    options=()
    [[ $tool == initcheck ]] && options=(--no-bulk-stores)
    check "$tool" "$logs/$tool.log" "$python" tests/sanitizer/run_kernels.py "$@" "${options[@]}" \
      || status=$?
    echo "$status $((SECONDS - start))" >"$logs/$tool.status"
  ) &
  running[$tool]=$!
done

failed=0
for tool in "${tools[@]}"; do
  wait "${running[$tool]}"
  planted[$tool]=$(<"$logs/$tool.planted")
  read -r status seconds <"$logs/$tool.status"
  [[ ${planted[$tool]} == "$found" ]] && seen="planted mistake found" || seen="PLANTED MISTAKE MISSED"
  verdict=clean
  [[ $status == 0 ]] || verdict="FAILED (status $status, see $logs/$tool.log)"
  [[ $status == 0 && ${planted[$tool]} == "$found" ]] || failed=1
  printf '%-10s %4d s  %s; %s\n' "$tool" "$seconds" "$seen" "$verdict"
  grep -hE '^launches:|SUMMARY' "$logs/$tool.log" | sed 's/^=* *//; s/^/             /' || true
done
exit $failed
