#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes: build on the host's own torch, the tests on the GPU, the sanitizer on small cases,
# then the benchmarks, whose table is printed last.
#
#   benchmarks/gpu.sh [build] [test] [sanitize] [bench]     all of them without arguments; a part that is done is named in OUT/done
#
# PYTHON: the interpreter with torch (python3). OUT: where logs and rows go (build/gpu). Parts already done in OUT are passed over, unless named.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
touch "$OUT/done"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=("$@")
[ $# -gt 0 ] || for part in build test sanitize bench; do grep -qx "$part" "$OUT/done" || parts+=("$part"); done

build() {  # for this GPU only: a third of the time of a wheel's
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  FASTFT_BUILD=cuda FASTFT_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace --build-temp build/gpu-temp
}

run_tests() {  # every op and backend on the GPU; then what only a GPU can show (marked gpu: huge indices, graph capture)
  timeout 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops tests/optim/test_adamw.py -x --timeout 120 -m "not slow" -k "not deepspeed"
}

sanitize() {
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  [ -n "$tool" ] || { echo "no compute-sanitizer on this host: skipped"; return; }
  for check in memcheck racecheck; do
    timeout 100 "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" benchmarks/gpu.py --quick
  done
}

bench() {
  timeout 270 "$PYTHON" benchmarks/gpu.py
  cp benchmarks/results/gpu.jsonl "$OUT/"
}

for part in "${parts[@]}"; do
  name=$part
  [ "$part" = test ] && name=run_tests
  echo "== $part"
  "$name" >"$OUT/$part.log" 2>&1 || { tail -n 40 "$OUT/$part.log"; echo "== $part FAILED; its log: $OUT/$part.log"; exit 1; }
  tail -n "$([ "$part" = bench ] && echo 100 || echo 4)" "$OUT/$part.log"
  echo "$part" >>"$OUT/done"
done
