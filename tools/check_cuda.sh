#!/usr/bin/env bash
# Compiles the CUDA kernels, warnings as errors, and reads what came out: no kernel may spill
# registers or keep a stack frame, and no update in float may hold a contracted multiplication and
# addition or any arithmetic in double. Needs nvcc, and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

archs=(${FUSEDOPT_CUDA_ARCHS:-80 90})
out=build/cuda
mkdir -p "$out"
# The flags that CMakeLists.txt gives, but for what only speeds up a build.
flags=(-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false -Icsrc)
flags+=(-Xcompiler=-Wall,-Wextra,-Werror -Werror=all-warnings)

failed=0
fail() {
  echo "$*" >&2
  failed=1
}
# Names of functions with a line that matches, for an awk over PTX.
functions_with() {
  awk -v pattern="$1" '
    /^[.]entry|^[.]visible [.]entry/ { name = $0; sub(/.*entry /, "", name); sub(/\(.*/, "", name) }
    $0 ~ pattern { if (!seen[name]++) print name }' "$2"
}

compile() { # ARCH
  local to=$out/sm_$1
  mkdir -p "$to"
  nvcc "${flags[@]}" -gencode "arch=compute_$1,code=sm_$1" -Xptxas=-v --keep --keep-dir "$to" \
    -c csrc/cuda/kernel.cu -o "$to/kernel.o" 2>"$to/log" || { cat "$to/log" >&2; return 1; }
}
jobs=()
for arch in "${archs[@]}"; do
  compile "$arch" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done

for arch in "${archs[@]}"; do
  log=$out/sm_$arch/log ptx=$out/sm_$arch/kernel.ptx
  kernels=$(grep --count 'Compiling entry function' "$log")
  frames=$(grep 'bytes stack frame' "$log" |
    grep --invert-match --count ' 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads') || true
  ((frames == 0)) || fail "sm_$arch: $frames kernels spill registers or keep a stack frame"

  updates=$(functions_with '^[.](visible )?[.]?entry' "$ptx" | grep --count update_kernel) || true
  ((kernels > 200 && updates > 100)) || fail "sm_$arch: found $kernels kernels, $updates updates"
  # "Mixed" and "Uniform<float>" are the updates in float; I7UniformIf is how the latter is mangled.
  in_float=$(functions_with '[.]f64|fma' "$ptx" |
    grep update_kernel | grep --extended-regexp '5Mixed|7UniformIf') || true
  [[ -z $in_float ]] || fail "sm_$arch: fma or f64 in $in_float"
  # That the pattern finds what it is to find: the updates in double are full of it.
  doubles=$(functions_with '[.]f64' "$ptx" | grep --count 7UniformId) || true
  ((doubles > 20)) || fail "sm_$arch: the check found f64 in $doubles updates in double"
  for needed in 'div[.]rn[.]f32' 'sqrt[.]rn[.]f32'; do
    grep --quiet "$needed" "$ptx" || fail "sm_$arch: no $needed"
  done
  echo "sm_$arch: $kernels kernels, $updates of them updates"
done
exit "$failed"
