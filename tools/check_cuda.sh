#!/usr/bin/env bash
# Compiles the CUDA kernels for each architecture, warnings as errors, and reads what came out:
# tools/check_sass.py says what must not be. Needs nvcc and cuobjdump, and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

out=build/cuda
mkdir -p "$out"
command -v cuobjdump >/dev/null || {
  echo "no cuobjdump, of the CUDA toolkit; or: pip install nvidia-cuda-cuobjdump" >&2
  exit 1
}
# Those that CMakeLists.txt builds, as far as this nvcc knows them.
archs=(${FUSEDOPT_CUDA_ARCHS:-$(nvcc --list-gpu-arch | sed -En 's/^compute_(80|90|100|120)$/\1/p')})
# The flags that CMakeLists.txt gives, but for what only makes the result smaller.
flags=(-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false)
flags+=(--expt-relaxed-constexpr -Icsrc -Werror=all-warnings)

check() { # ARCH
  local to=$out/sm_$1
  mkdir -p "$to"
  nvcc "${flags[@]}" -gencode "arch=compute_$1,code=sm_$1" --keep --keep-dir "$to" -cubin \
    csrc/cuda/kernel.cu -o "$to/kernel.cubin" 2>"$to/log" || { cat "$to/log" >&2; return 1; }
  cuobjdump -sass "$to/kernel.cubin" >"$to/sass"
  cuobjdump -res-usage "$to/kernel.cubin" >"$to/usage" 2>&1
  python3 tools/check_sass.py "$to" || { echo "sm_$1: see above" >&2; return 1; }
}
failed=0
jobs=()
for arch in "${archs[@]}"; do
  # Two at a time.
  if ((${#jobs[@]} == 2)); then
    wait "${jobs[0]}" || failed=1
    jobs=("${jobs[1]}")
  fi
  check "$arch" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
exit "$failed"
