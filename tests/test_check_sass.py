"""tools/check_sass.py: it finds what it looks for, in listings of a few lines."""

from __future__ import annotations

import pytest

from tools import check_sass

NAME = "_ZN8fusedopt4cuda13update_kernelILi{kind}E{rule}Ev"


def kernel(
    kind: int, *code: str, registers: int = 40, stack: int = 0, rule: str = ""
) -> check_sass.Kernel:
    """Return a kernel as it is read of what cuobjdump prints."""
    name = NAME.format(kind=kind, rule=rule)
    lines = [f"        /*{16 * i:04x}*/    {text} ;   /* 0x0 */" for i, text in enumerate(code)]
    listing = "\n".join(["code for sm_90", f"\t\tFunction : {name}", *lines])
    usage = f" Function {name}:\n  REG:{registers} STACK:{stack} SHARED:0 LOCAL:0"
    (found,) = check_sass.read_kernels(listing, usage)
    return found


DECISION = ["LDG.E R0, [R2.64+0x8]", "LDG.E R1, [R2.64]"]
ONE_BY_ONE = ["LDG.E R4, [R2.64]", "STG.E [R2.64], R4"]
IN_WORDS = ["LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4"]
GOOD = [*DECISION, *IN_WORDS, *ONE_BY_ONE]


def test_words_are_as_they_should_be() -> None:
    assert not list(check_sass.faults_of(kernel(0, *GOOD)))
    # Without a gradient, no factor is read.
    assert not list(check_sass.faults_of(kernel(0, *GOOD[1:])))
    sixteen_bits = ["LDG.E.U16 R4, [R2.64]", "STG.E.U16 [R2.64], R4"]
    assert not list(check_sass.faults_of(kernel(2, *DECISION, *IN_WORDS, *sixteen_bits)))
    codes = [
        "LDG.E.64 R4, [R2.64]",
        "STG.E.64 [R2.64], R4",
        "LDG.E.U8 R4, [R2]",
        "STG.E.U8 [R2], R4",
    ]
    kind = check_sass.SPLIT_CODES
    assert not list(check_sass.faults_of(kernel(kind, *GOOD, *IN_WORDS, *codes)))


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ([*GOOD[:3], *ONE_BY_ONE * 5], "stores so many times so many bits"),  # a word in parts
        ([*GOOD[:2], IN_WORDS[1], *ONE_BY_ONE], "loads so many times so many bits"),
        ([*GOOD, "DADD R4, R4, R6"], "computes in double: DADD"),
        ([*GOOD, "@P0 F2F.F64.F32 R4, R6"], "computes in double: F2F.F64.F32"),
    ],
)
def test_faults_are_found(code: list[str], fault: str) -> None:
    assert any(each.startswith(fault) for each in check_sass.faults_of(kernel(0, *code)))


def test_one_array_that_is_left_alone_may_lack_single_elements() -> None:
    lacking = [*GOOD, IN_WORDS[1]]  # words are stored of two arrays, single elements of one
    assert not list(check_sass.faults_of(kernel(0, *lacking, rule="MuonMomentum")))
    assert list(check_sass.faults_of(kernel(0, *lacking)))
    in_parts = [*GOOD[:3], *ONE_BY_ONE * 5]
    assert list(check_sass.faults_of(kernel(0, *in_parts, rule="MuonMomentum")))
    assert list(check_sass.faults_of(kernel(0, *lacking, IN_WORDS[1], rule="MuonMomentum")))


def test_a_double_kernel_may_compute_in_double() -> None:
    in_words = ["LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4"]
    one_by_one = ["LDG.E.64 R4, [R2.64]", "STG.E.64 [R2.64], R4", "DADD R4, R4, R6"]
    decision = ["LDG.E R0, [R2.64+0x8]", "LDG.E.64 R8, [R2.64]"]
    assert not list(check_sass.faults_of(kernel(1, *decision, *in_words, *one_by_one)))


def test_registers_and_stacks_are_bounded() -> None:
    assert list(check_sass.faults_of(kernel(0, *GOOD, registers=65))) == [
        "takes 65 registers, at most 64 are expected"
    ]
    assert list(check_sass.faults_of(kernel(0, *GOOD, stack=8))) == ["keeps 8 bytes on a stack"]


def test_contracted_operations_are_found_in_float_alone() -> None:
    ptx = "".join(
        f".visible .entry {NAME.format(kind=kind, rule='')}(\n)\n{{ {body} }}\n"
        for kind, body in [(0, "fma.rn.f32 %f1;"), (1, "fma.rn.f64 %d1;"), (2, "add.f32 %f1;")]
    )
    assert list(check_sass.fused_in(ptx)) == [NAME.format(kind=0, rule="")]


def test_what_a_group_usually_takes() -> None:
    """The loop of words, without what a special division takes."""
    loop = [
        "LDG.E.128 R4, [R2.64]",
        "@!P0 BRA 0x40",
        "MOV R4, R5",
        "CALL.REL.NOINC 0x200",
        "STG.E.128 [R2.64], R4",
        "@P1 BRA 0x0",
        "EXIT",
    ]
    assert len(kernel(0, *loop).loop_of_words()) == 6
    assert kernel(0, *loop).usual_instructions() == 4
