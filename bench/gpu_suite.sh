#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with nvcc and a torch that sees the device; no network. `build` puts
# the package into PYTHON: run in a virtual environment where the system's Python refuses pip (PEP 668).
#
#   bench/gpu_suite.sh [build] [calibrate] [test] [bench] [sanitize] [summary]      default: all, in this order
#
# OUT                where results go (bench/results): rows, one log a section (*.txt, which git ignores), two figures
# S3T_BENCH_BUDGET   seconds for all sections together (570); a section leaves what later ones need, summary always runs
# S3T_BENCH_DEVICE   cuda; cpu is a dry run: the same sections on two tiny cases
# S3T_BENCH_COMMIT   commit of the tree, where it came without .git
# PYTHON             python3
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-bench/results}
BUDGET=${S3T_BENCH_BUDGET:-570}
DEVICE=${S3T_BENCH_DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$OUT"
failed=()
later=0 # seconds kept for the sections still to come
declare -A needs=([sanitize]=80 [summary]=20)
[ "$DEVICE" = cpu ] && needs[sanitize]=0

left() { # seconds that the section at hand may take, at most $1
  local rest=$((BUDGET - SECONDS - later))
  echo $((rest < $1 ? rest : $1))
}

section() { # name, seconds, command...: log to a file, show its end
  local name=$1 seconds=$2
  shift 2
  if ((seconds < 5)); then
    echo "== $name: no time left"
    failed+=("$name")
    return 1
  fi
  echo "== $name (at most $seconds s, $SECONDS s gone)"
  timeout -s "${STOP:-TERM}" -k 15 "$seconds" "$@" >>"$OUT/$name.txt" 2>&1
  local status=$?
  tail -n "${TAIL:-12}" "$OUT/$name.txt" | cut -c1-220
  if ((status)); then
    echo "== $name: status $status$( ((status == 124)) && echo ' (out of time)')"
    failed+=("$name")
  fi
  return $status
}

time_cases() { # name, seconds, arguments...: a bench run that ends itself before its section does
  local name=$1 seconds=$2
  shift 2
  section "$name" "$seconds" "$PYTHON" -m bench.run --device "$DEVICE" --out "$OUT" --seconds $((seconds - 15)) "$@"
}

run_build() {
  S3T_CUDA=$([ "$DEVICE" = cuda ] && echo ON || echo AUTO) \
    section build "$(left 200)" "$PYTHON" -m pip install -q --no-build-isolation --no-deps --force-reinstall .
  # The package that was installed, not the source tree in the current folder.
  PYTHONSAFEPATH=1 section build "$(left 60)" "$PYTHON" -c \
    'import s3t_ext; from s3t_ext.lora.kernels import IMPLS, native; print(s3t_ext.__file__, native.build_info(), IMPLS)'
}

run_calibrate() { # the library alone: works where nothing of ours does
  local set=calibrate
  [ "$DEVICE" = cpu ] && set=tiny
  time_cases calibrate "$(left 120)" --set $set --providers baselines --skip '^compile' --case-seconds 0.5
}

run_test() {
  local files=(python_tests/lora/test_guarantees.py python_tests/lora/test_graphs.py) file parallel=()
  for file in $(find python_tests -name "test_*.py" | sort); do
    [[ " ${files[*]} " = *" $file "* ]] || files+=("$file")
  done
  # Most of the time goes into compiling some hundred Triton kernels, which eight processes do at once.
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
  # Interrupted, pytest still says what failed; the signal is ignored in what a shell starts in the background.
  STOP=INT TAIL=60 PYTHONSAFEPATH=1 section test "$(left 260)" env --default-signal=INT "$PYTHON" -m pytest -m gpu -v \
    -rfE --tb=short -p no:cacheprovider --continue-on-collection-errors --maxfail=40 --durations=8 \
    ${parallel[@]+"${parallel[@]}"} "${files[@]}"
}

run_bench() {
  local set=cuda start='' skip='^compile' status culprit compiled=60
  [ "$DEVICE" = cpu ] && set=tiny compiled=0
  for _ in 1 2 3 4; do
    time_cases bench $(($(left "$BUDGET") - compiled)) --set $set --skip "$skip" --case-seconds 0.8 \
      ${start:+--start "$start"}
    status=$?
    ((status == 3)) || break
    # A kernel that broke the device ends the process; the next one goes on from that case without its provider.
    culprit=$(grep '^device broken by ' "$OUT/bench.txt" | tail -n 1)
    skip="$skip|^$(cut -d' ' -f4 <<<"$culprit")\$"
    start=$(cut -d' ' -f6 <<<"$culprit")
    start=${start%:}
  done
  ((compiled == 0)) || time_cases bench "$(left $compiled)" --set cuda --providers compile compile_cat --case-seconds 0.3 \
    --only '^fwd-bf16-T(16|512|2048|8192)-4096x4096-r16-G1-P4-live1of1-graph'
}

run_sanitize() {
  local tool half
  if [ "$DEVICE" = cpu ]; then
    echo "== sanitize: nothing to do on a CPU"
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== sanitize: compute-sanitizer is not on PATH"
    failed+=(sanitize)
    return
  fi
  half=$(($(left 200) / 2))
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 section sanitize $half compute-sanitizer --tool $tool --error-exitcode 9 \
      --launch-timeout 60 "$PYTHON" -m bench.run --device "$DEVICE" --check --set small --providers ours --only 'bf16'
  done
}

run_summary() { # even when the time is spent: of all that was measured it is what is read
  TAIL=80 section summary 60 "$PYTHON" -m bench.plot --out "$OUT"
}

read -ra wanted <<<"${*:-build calibrate test bench sanitize summary}"
for one in "${wanted[@]}"; do
  if ! declare -F "run_$one" >/dev/null; then
    echo "$0: expected build, calibrate, test, bench, sanitize or summary, got '$one'" >&2
    exit 2
  fi
done
for at in "${!wanted[@]}"; do
  later=0
  for one in "${wanted[@]:at+1}"; do
    ((later += ${needs[$one]:-0}))
  done
  "run_${wanted[at]}"
done
echo "== done in $SECONDS s; failed: ${failed[*]:-nothing}; results in $OUT"
((${#failed[@]} == 0))
