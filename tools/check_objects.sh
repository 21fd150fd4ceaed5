#!/usr/bin/env bash
# Checks every kernel object under the given build directories: it shows the linker its table and
# nothing else, no weak symbol above all, and has no static initialiser. Otherwise the linker could
# keep one instruction set's copy of a shared inline function, and a processor without that
# instruction set would die of it.
set -euo pipefail

mapfile -t objects < <(find "$@" -path '*/fusedopt_*.dir/*/cpu/kernel.cpp.o')
if ((${#objects[@]} == 0)); then
  echo "no kernel objects under: $*" >&2
  exit 1
fi

failed=0
for object in "${objects[@]}"; do
  isa=$(sed 's|.*/fusedopt_\([^/]*\)\.dir/.*|\1|' <<<"$object")
  symbols=$(nm --demangle --extern-only --defined-only "$object" | cut -d' ' -f2-)
  if ! [[ $symbols =~ ^[DR]\ fusedopt::"$isa"::kKernels$ ]]; then
    printf '%s: expected one global symbol, fusedopt::%s::kKernels (D or R), but found:\n%s\n' \
      "$object" "$isa" "${symbols:-nothing}" >&2
    failed=1
  fi
  if objdump --section-headers "$object" | grep --extended-regexp '\.(init_array|ctors)' >&2; then
    echo "$object: has a static initialiser" >&2
    failed=1
  fi
done
((failed == 0)) && echo "${#objects[@]} kernel objects: one table each, nothing else"
