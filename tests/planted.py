"""Kernels with one planted fault each, to see that every fault is caught by its own mechanism."""

from __future__ import annotations

from elsa_tune import space
from elsa_tune.device import host_cpu
from elsa_tune.generate import backends, cpp
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.tuning.contender import Contender

CALL = "int elsa_attention(const Call* call) { return run(*call); }"

FAULTS = {
    "healthy": ("", ""),
    "segfault": (CALL, CALL.replace("return", "*(volatile int*)8 = 1; return")),
    "hang": (CALL, CALL.replace("return", "for (volatile int forever = 1; forever;) {} return")),
    "eats memory": (
        CALL,
        "int elsa_attention(const Call* call) {\n"
        "  for (;;) {\n"
        "    volatile char* p = static_cast<volatile char*>(std::malloc(1 << 24));\n"
        "    for (int i = 0; i < 1 << 24; i += 4096) p[i] = 1;\n"
        "  }\n"
        "  return run(*call);\n"
        "}",
    ),
    "writes past its output": (
        CALL,
        CALL.replace("return", "call->output[call->batch * call->heads * call->q_len * VALUE_DIM + 2] = 0; return"),
    ),
    "wrong by 1e-3": ("1.0f / state.s[i]", "1.001f / state.s[i]"),
    "loses the last key": ("const int64_t limit = c.kv_len,", "const int64_t limit = c.kv_len > 1 ? c.kv_len - 1 : 1,"),
    "leaves a row unwritten": ("const bool inside = first + r < rows;", "const bool inside = first + r < rows - 1;"),
    "swallows NaN": ("return reinterpret_cast<vec>((x < -126.0f) ? ivec{} : bits);", "return reinterpret_cast<vec>((x >= -126.0f) ? bits : ivec{});"),
}  # fmt: skip


def variant_of(problem: Problem) -> str:
    """A small variant that is valid on every x86 and Arm processor."""
    isa = host_cpu().isas[0]
    return f"cpp.serial.{isa}.l{cpp.ISAS[isa].lanes}.q2.k4.v4.n48"


def planted(fault: str, problem: Problem) -> Contender:
    """The variant with the fault in its code."""
    variant = space.parse(variant_of(problem))
    before, after = FAULTS[fault]
    text = cpp.source(variant, problem).text
    assert before in text, f"the template no longer has {before!r}"
    name = "planted-" + fault.replace(" ", "-").replace(".", "-").lower()
    return Contender(variant, cpp.find(name) or cpp.build_text(text.replace(before, after), name, variant), host_cpu())


def peers(problem: Problem) -> list[Contender]:
    """torch's own kernels."""
    sdpa = backends.get("sdpa")
    return [
        Contender(v, sdpa.build(v, problem), host_cpu())
        for v in map(Space.load("sdpa").parse, ("sdpa.flash", "sdpa.math"))
    ]
