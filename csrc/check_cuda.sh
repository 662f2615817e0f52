#!/bin/sh
# Compiles every .cu for each architecture with warnings as errors, and prints what ptxas says about registers, shared memory
# and spills. Needs no GPU. Without nvcc: exits 0 with a message, or 1 when FASTFT_REQUIRE_NVCC=1.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
nvcc=${CUDACXX:-nvcc}
if ! command -v "$nvcc" >/dev/null 2>&1; then
  echo "check_cuda: skipped, no nvcc on PATH (set CUDACXX to name one)"
  [ "${FASTFT_REQUIRE_NVCC:-0}" = 1 ] && exit 1
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
archs=${FASTFT_CUDA_ARCHS:-80 90 100}
for source in "$here"/cuda/*.cu; do
  for arch in $archs; do  # side by side
    {
      "$nvcc" -c -O3 -std=c++17 -arch="sm_$arch" -I"$here/include" -Werror all-warnings \
        -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v -o "$out/$arch.o" "$source" >"$out/$arch.log" 2>&1
      echo $? >"$out/$arch.status"
    } &
  done
  wait
  for arch in $archs; do
    echo "== $(basename "$source") sm_$arch"
    [ "$(cat "$out/$arch.status")" = 0 ] || {
      cat "$out/$arch.log"
      exit 1
    }
    # Name, then registers and spills, one kernel per line
    sed -n -e "s/.*Compiling entry function '\([^']*\)'.*/\1/p" -e 's/^ *\([0-9]* bytes stack.*\)/    \1/p' \
      -e 's/^ptxas info *: Used/    used/p' "$out/$arch.log" | { command -v c++filt >/dev/null && c++filt || cat; }
  done
done
echo "check_cuda: all clean"
