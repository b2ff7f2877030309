"""Rendered code, kept in view: a change of a template shows as a diff of tests/golden."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.generate import backends, cpp
from elsa_tune.problem import Problem

CASES = [
    ("cpp.serial.avx512.l16.q3.k8.v8.n192", "fp32.d64"),
    ("cpp.hybrid.avx2.l8.q2.k5.v5.n120.w4.s4.packed.p8", "fp32.d80.causal"),
    ("cpp.blelloch.neon.l4.c4.q4.k2.v4.n32.s8", "fp32.d128"),
    ("cpp.serial.avx2.l8.q2.k4.v4.n24", "fp32.d64.causal+lengths.softcap"),
    ("cpp.serial.avx512.l16.q3.k8.v8.n96.e10", "fp64.d64.causal.softcap"),
    ("cpp.serial.avx512.l16.q3.k8.v8.n96", "fp32.d64.causal.softcap+bias.backward"),
    ("cpp.serial.avx2.l8.q2.k4.v4.n24.products7.s2.packed", "bf16.d40.v24.lengths.alibi+sinks.backward"),
    ("triton.serial.half.m128.n64.warps8.stages3", "fp16.d64"),
    ("triton.hybrid.ieee.m32.n32.warps4.stages1.w2.s4.last_block.pair.apart.parts.longest", "fp32.strict.d80.causal"),
    ("triton.blelloch.fma.m1.n32.warps4.stages2.s16.two_kernels.apart.persistent2", "bf16.d128"),
    ("triton.serial.half.m32.n32.warps4.stages2", "bf16.d96.v64.causal.backward"),
    ("triton.serial.half.m32.n32.warps4.stages1", "fp16.d64.columns+lengths.softcap+bias+alibi.backward"),
    ("triton.serial.half.m64.n64.warps4.stages2", "bf16.d64.lengths+window.softcap"),
    ("cuda.serial.t128.x8.r6.k6.stages2.async", "fp32.d64"),
    ("cuda.serial.half2.v8.t64.x8.r8.k4.apart", "fp16.approx.d64.causal"),
    ("cuda.serial.t64.x8.r2.k2", "fp32.d64.lengths.softcap"),
    ("cuda.hybrid.hip.t128.x8.r2.k2.c32.w2.s4.last_block.native.apart", "bf16.d96.causal"),
    ("cuda.blelloch.opencl.v2.swizzled.t64.x8.r2.k4.w2.s4.two_kernels.shared.polynomial", "fp16.d64.v32"),
]


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("variant", "family"), CASES)
def test_golden(variant: str, family: str) -> None:
    backend = variant.partition(".")[0]
    source = backends.get(backend).source(space.parse(variant), Problem.parse(family))
    assert source is not None
    text, path = source.text, GOLDEN / backend / f"{variant}-{family}.{source.suffix}"
    if os.environ.get("ACCEPT_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.is_file() and text == path.read_text(), (
        "the rendering changed; look at it with ACCEPT_GOLDEN=1 pytest tests/test_golden.py && git diff tests/golden"
    )


def test_digest_ignores_comments_and_sees_code() -> None:
    problem, other = Problem.parse("fp32.d64"), Problem.parse("fp32.d64@b2.h8.q5.k9")
    variant = space.parse(CASES[0][0])
    assert cpp.digest(variant, problem) == cpp.digest(variant, other), "a shape must not recompile"
    gpu = Device("cuda", "some", "sm_90", 10)  # a target that every backend can name
    digests = {backends.get(v.partition(".")[0]).digest(space.parse(v), Problem.parse(f), gpu) for v, f in CASES}
    assert len(digests) == len(CASES)
    assert cpp.digest(variant, problem) != cpp.digest(variant, Problem.parse("fp32.d80"))
