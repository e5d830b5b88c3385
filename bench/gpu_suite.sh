#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with nvcc and a torch that sees the device; no network.
#
#   bench/gpu_suite.sh [build] [calibrate] [test] [bench] [sanitize] [summary]      default: all, in this order
#
# OUT                where results go (bench/results): rows, one log a section, summary, two figures
# S3T_BENCH_BUDGET   seconds for all sections together (570)
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

left() { # seconds of the budget, at most $1
  local rest=$((BUDGET - SECONDS))
  echo $((rest < $1 ? rest : $1))
}

section() { # name, seconds at most, command...: log to a file, show its end
  local name=$1 seconds
  seconds=$(left "$2")
  shift 2
  if ((seconds < 5)); then
    echo "== $name: no time left"
    failed+=("$name")
    return 1
  fi
  echo "== $name (at most $seconds s, $SECONDS s gone)"
  timeout -k 5 "$seconds" "$@" >>"$OUT/$name.txt" 2>&1
  local status=$?
  tail -n "${TAIL:-12}" "$OUT/$name.txt" | cut -c1-220
  if ((status)); then
    echo "== $name: status $status$( ((status == 124)) && echo ' (out of time)')"
    failed+=("$name")
  fi
  return $status
}

time_cases() { # seconds, arguments...: a bench run that ends itself before its section does
  local seconds
  seconds=$(left "$1")
  shift
  section bench $((seconds + 30)) "$PYTHON" -m bench.run --device "$DEVICE" --out "$OUT" --seconds "$seconds" "$@"
}

build() {
  S3T_CUDA=$([ "$DEVICE" = cuda ] && echo ON || echo AUTO) \
    section build 200 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --force-reinstall .
  # The package that was installed, not the source tree in the current folder.
  PYTHONSAFEPATH=1 section build 60 "$PYTHON" -c \
    'import s3t_ext; from s3t_ext.lora.kernels import IMPLS, native; print(s3t_ext.__file__, native.build_info(), IMPLS)'
}

calibrate() { # the library alone: works where nothing of ours does
  local set=calibrate
  [ "$DEVICE" = cpu ] && set=tiny
  section calibrate 120 "$PYTHON" -m bench.run --device "$DEVICE" --out "$OUT" --set $set --providers baselines \
    --skip compile --case-seconds 0.5 --seconds 90
}

tests() {
  PYTHONSAFEPATH=1 section test 200 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --maxfail=40 --durations=8
}

bench() {
  local set=cuda start='' skip='^compile$' status culprit
  [ "$DEVICE" = cpu ] && set=tiny
  for _ in 1 2 3 4; do
    time_cases $((BUDGET - SECONDS - 60)) --set $set --skip "$skip" --case-seconds 0.8 ${start:+--start "$start"}
    status=$?
    ((status == 3)) || break
    # A kernel that broke the device ends the process; the next one goes on from that case without its provider.
    culprit=$(grep '^device broken by ' "$OUT/bench.txt" | tail -n 1)
    skip="$skip|^$(cut -d' ' -f4 <<<"$culprit")\$"
    start=$(cut -d' ' -f6 <<<"$culprit")
    start=${start%:}
  done
  [ "$DEVICE" = cpu ] || time_cases 60 --set cuda --only '^fwd-bf16-T(16|512|2048|8192)-4096x4096-r16-G1-P4-live1of1-graph' \
    --providers compile --case-seconds 0.3
}

sanitize() {
  local tool
  if [ "$DEVICE" = cpu ]; then
    echo "== sanitize: nothing to do on a CPU"
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== sanitize: compute-sanitizer is not on PATH"
    failed+=(sanitize)
    return
  fi
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 section sanitize 100 compute-sanitizer --tool $tool --error-exitcode 9 \
      --launch-timeout 60 "$PYTHON" -m bench.run --device "$DEVICE" --check --set small --providers ours --only 'bf16'
  done
}

summary() {
  local rows
  rows=$(find "$OUT" -maxdepth 1 -name '*.csv' ! -name 'roofline*' -newer "$0" -print | sort)
  [ -n "$rows" ] || rows=$(find "$OUT" -maxdepth 1 -name '*.csv' ! -name 'roofline*' | sort)
  # shellcheck disable=SC2086
  TAIL=80 section summary 60 "$PYTHON" -m bench.plot $rows --out "$OUT"
}

for wanted in "${@:-build calibrate test bench sanitize summary}"; do
  for one in $wanted; do
    case $one in
      build | calibrate | bench | sanitize | summary) $one ;;
      test) tests ;;
      *)
        echo "$0: expected build, calibrate, test, bench, sanitize or summary, got '$one'" >&2
        exit 2
        ;;
    esac
  done
done
echo "== done in $SECONDS s; failed: ${failed[*]:-nothing}; results in $OUT"
((${#failed[@]} == 0))
