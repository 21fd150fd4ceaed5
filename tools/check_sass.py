"""Read compiled CUDA kernels: how they access memory, what they compute with, what they take.

    python tools/check_sass.py FOLDER

For tools/check_cuda.sh, which puts there what the compilers have made: kernel.ptx; sass, which is
what ``cuobjdump -sass`` prints of the object file; and usage, which ``cuobjdump -res-usage`` does.
Nothing may be kept on a stack. Updates take so many registers at most, and access memory in words
of 16 bytes wherever they can; those in float contract no multiplication and addition, and compute
nothing in double.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The kinds of updates by their numbers (csrc/cuda/tables.h): those that are named take other words
# or registers than most.
F32, F64, SPLIT_CODES, RANDOM_CODES, ANY_NUMBERS, ANY_CODECS = 0, 1, 8, 10, 11, 12
ELEMENTS = {F32: 4, F64: 2}  # of a group; of all other kinds 8, and of the last one 1

# The most registers an update may take, for 4, 3 or 2 blocks of 256 threads on a multiprocessor:
# it has 65,536.
MOST_REGISTERS = {
    F32: 64,
    **dict.fromkeys((F64, SPLIT_CODES, RANDOM_CODES, ANY_NUMBERS, ANY_CODECS), 128),
}
MOST_REGISTERS_OF_OTHERS = 80
# The most instructions an element of AdamW in float32 where all is aligned: 38 are its arithmetic,
# a division and a root among it.
ADAMW, MOST_INSTRUCTIONS = "4AdamIfLb0ELb0EE", 45

# Rules that leave an array as it is, or do not look at it. The compiler finds that out for words or
# for single elements alone, so that one array may have no access of the other kind.
LEAVE_AN_ARRAY = ("MuonMomentum", "MuonNesterov")


class Instruction(NamedTuple):
    at: int
    text: str

    @property
    def operation(self) -> str:
        return self.text.removeprefix("@").split(" ")[1 if self.text.startswith("@") else 0]


class Kernel(NamedTuple):
    name: str
    code: list[Instruction]
    registers: int
    stack: int

    @property
    def kind(self) -> int | None:
        """The number of the kind that an update takes; None of what is no update."""
        found = re.search(r"update_kernelILi(\d+)E", self.name)
        return int(found[1]) if found else None

    def accesses(self, operation: str) -> Counter[int]:
        """Return how many instructions access so many bits of global memory."""
        sizes: Counter[int] = Counter()
        for each in self.code:
            if each.operation.startswith(f"{operation}."):
                found = re.search(r"\.(U8|S8|U16|S16|64|128)\b", each.operation)
                sizes[int(found[1].lstrip("US")) if found else 32] += 1
        return sizes

    def loop_of_words(self) -> list[Instruction]:
        """Return the smallest loop that stores words of 16 bytes."""
        loops = []
        for each in self.code:
            found = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", each.text)
            if found and int(found[1], 16) < each.at:
                body = [i for i in self.code if int(found[1], 16) <= i.at <= each.at]
                if any(i.operation.startswith("STG") and ".128" in i.operation for i in body):
                    loops.append(body)
        return min(loops, key=len, default=[])

    def usual_instructions(self) -> int:
        """Return how many of that loop are executed where no division and no root is special."""
        loop = self.loop_of_words()
        special: set[int] = set()
        for each in loop:
            found = re.match(r"@!?U?P\d+ BRA\b.* 0x([0-9a-f]+)", each.text)
            skipped = {i.at for i in loop if found and each.at < i.at < int(found[1], 16)}
            if len(skipped) < 8 and any(
                i.operation.startswith("CALL") for i in loop if i.at in skipped
            ):
                special |= skipped
        return len(loop) - len(special)


def read_kernels(listing: str, usage: str) -> Iterator[Kernel]:
    used = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    for part in re.split(r"^\s+Function : ", listing, flags=re.MULTILINE)[1:]:
        name = part.split("\n", 1)[0].strip()
        code = [
            Instruction(int(at, 16), text)
            for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part)
        ]
        yield Kernel(name, code, *used[name])


def faults_of(kernel: Kernel) -> Iterator[str]:
    """Yield what is wrong with a kernel."""
    if kernel.stack:
        yield f"keeps {kernel.stack} bytes on a stack"
    kind = kernel.kind
    if kind is None:
        return
    most = MOST_REGISTERS.get(kind, MOST_REGISTERS_OF_OTHERS)
    if kernel.registers > most:
        yield f"takes {kernel.registers} registers, at most {most} are expected"
    if kind != F64:
        wrong = {i.operation for i in kernel.code if re.match(r"(D[A-Z]+|F2F.*F64)\b", i.operation)}
        if wrong:
            yield f"computes in double: {', '.join(sorted(wrong))}"
    if kind == ANY_CODECS:
        return
    instructions = kernel.usual_instructions() / ELEMENTS.get(kind, 8)
    if kind == F32 and ADAMW in kernel.name and not 0 < instructions <= MOST_INSTRUCTIONS:
        yield f"takes {instructions} instructions an element, {MOST_INSTRUCTIONS} are expected"
    # Each array has one access of one element, for what is left over, and as many words as a group
    # takes: any other number would be of partial ones. Eight codes are half a word.
    width = ELEMENTS.get(kind, 8)

    def is_in_words(sizes: Counter[int]) -> bool:
        words = sizes[16] + sizes[32] * width // 4 + (sizes[64] if kind == F64 else 0)
        halves = sizes[64] if kind == F64 else sizes[8]
        may_lack = any(rule in kernel.name for rule in LEAVE_AN_ARRAY)
        as_many = abs(sizes[128] - words) <= (max(1, width // 4) if may_lack else 0)
        return words > 0 and as_many and sizes[64] == halves

    loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
    # Of the decision: whether to skip, and a factor where there is a gradient.
    decision = Counter([32, 64 if kind == F64 else 32]), Counter([32])
    if not any(is_in_words(loads - each) for each in decision):
        yield f"loads so many times so many bits: {dict(loads)}"
    if not is_in_words(stores):
        yield f"stores so many times so many bits: {dict(stores)}"


def fused_in(ptx: str) -> Iterator[str]:
    """Yield the names of float updates that contract operations.

    (Division and root are made of such instructions later, in the machine's code.)
    """
    for part in re.split(r"\.entry ", ptx)[1:]:
        name = part.split("(", 1)[0].strip()
        if "update_kernelILi" in name and f"ILi{F64}E" not in name and re.search(r"\bfma\.", part):
            yield name


def main() -> int:
    folder = Path(sys.argv[1])
    ptx = (folder / "kernel.ptx").read_text()
    kernels = list(read_kernels((folder / "sass").read_text(), (folder / "usage").read_text()))
    faults = [f"{kernel.name}: {fault}" for kernel in kernels for fault in faults_of(kernel)]
    faults += [f"{name}: has fma" for name in fused_in(ptx)]
    faults += [f"no {each}" for each in ("div.rn.f32", "sqrt.rn.f32") if each not in ptx]
    updates = [kernel for kernel in kernels if kernel.kind is not None]
    doubles = [kernel for kernel in updates if any(i.operation == "DADD" for i in kernel.code)]
    if len(updates) < 100 or {kernel.kind for kernel in doubles} != {F64}:  # what is looked for?
        faults.append(f"found {len(updates)} updates, {len(doubles)} of them in double")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{folder.name}: {len(kernels)} kernels, {len(updates)} of them updates")
    for kernel in updates:  # what docs/gpu.md says of them
        if ADAMW in kernel.name and kernel.kind not in (F64, ANY_NUMBERS, ANY_CODECS):
            each = kernel.usual_instructions() / ELEMENTS.get(kernel.kind or F32, 8)
            print(
                f"  AdamW, kind {kernel.kind}: {kernel.registers} registers, {each:.1f} an element"
            )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
