#!/usr/bin/env bash
# Everything that wants a GPU, in parts of at most three minutes, the most wanted first: any ten minutes on a GPU leave rows.
# A part that fails or runs out of time is named, and the next one runs. What falls short is printed last; then the exit status is 1.
#
#   benchmarks/gpu.sh [build] [test] [kernels] [step] [profile] [sanitize]     all of them without arguments
#
# PYTHON: the interpreter with torch (python3). OUT: where logs and rows go (build/gpu). WORKERS: test processes (8).
# Parts that passed in OUT before are passed over, unless named.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
WORKERS=${WORKERS:-8}
LIMIT=180  # seconds for each part
mkdir -p "$OUT"
touch "$OUT/done"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=("$@")
[ $# -gt 0 ] || for part in build test kernels step profile sanitize; do grep -qx "$part" "$OUT/done" || parts+=("$part"); done

build() {  # for this GPU only: a third of the time of a wheel's
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  FASTFT_BUILD=cuda FASTFT_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace --build-temp build/gpu-temp
}

run_tests() {  # every op and backend on the GPU; what only a GPU can show is marked gpu: huge indices, graph capture
  options=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && options+=(-n "$WORKERS") || echo "no pytest-xdist here: one process"
  "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout 120)
  "$PYTHON" -m pytest -q -p no:cacheprovider "${options[@]}" -m "not slow and not long" -k "not deepspeed" \
    tests/ops tests/optim/test_adamw.py
}

kernels() {  # a process for each op: one that crashes takes no other's rows along
  local status=0 op code
  for op in linear_cross_entropy:70 cross_entropy:55 adamw:35 sum_squares:18; do
    timeout -k 5 "${op#*:}" "$PYTHON" benchmarks/gpu.py --out "$OUT/kernels.jsonl" "${op%:*}"
    code=$?
    [ $code -eq 0 ] || status=1
    # 3: it has said itself what falls short
    case $code in 0 | 3) ;; *) echo "SHORT ${op%:*}: ended with $code (124: ran past ${op#*:} s)" ;; esac
  done
  return $status
}

step() {  # whole training steps beside their peers
  "$PYTHON" benchmarks/gpu_step.py --out "$OUT/step.jsonl" --limit 50
}

profile() {  # where a step's time goes
  "$PYTHON" benchmarks/gpu_step.py --out "$OUT/profile.jsonl" --limit 60 --profile --steps 10 --shapes llama-1.1b --contenders fastft
}

sanitize() {
  local tool status=0 check
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  [ -n "$tool" ] || { echo "no compute-sanitizer on this host: skipped"; return; }
  for check in memcheck racecheck; do
    timeout -k 5 85 "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" benchmarks/gpu_small.py || {
      echo "SHORT $check: ended with $? (9: it found something, 124: ran out of time)"
      status=1
    }
  done
  return $status
}

short=() running=
trap '[ -z "$running" ] || kill "$running"; exit 143' INT TERM  # timeout hands it on to all that the part started
for part in "${parts[@]}"; do
  name=$part
  [ "$part" = test ] && name=run_tests
  case " build run_tests kernels step profile sanitize " in *" $name "*) ;; *) short+=("$part: there is no such part"); continue ;; esac
  log=$OUT/$part.log
  echo "== $part"
  start=$SECONDS
  # A shell of its own, so that timeout can end the part with all it started.
  (export -f build run_tests kernels step profile sanitize; export PYTHON OUT WORKERS
   exec timeout -k 10 "$LIMIT" bash -uo pipefail -c "$name") >"$log" 2>&1 &
  running=$!
  wait "$running"
  status=$? running=
  tail -n "$([ "$part" = kernels ] && echo 120 || echo 15)" "$log" | cut -c1-200
  echo "== $part: status $status after $((SECONDS - start)) s; $log"
  while IFS= read -r line; do short+=("$part: ${line#SHORT }"); done < <(grep -aE '^(SHORT|FAILED|ERROR) ' "$log" | cut -c1-300)
  if [ $status -eq 0 ]; then
    echo "$part" >>"$OUT/done"
  elif [ $status -eq 124 ]; then
    short+=("$part: ran past $LIMIT s")
  else
    short+=("$part: ended with $status")
  fi
done
[ ${#short[@]} -eq 0 ] && exit 0
echo "== short"
printf '%s\n' "${short[@]}"
exit 1
