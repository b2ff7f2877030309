"""Windows and macOS, as far as a compiler can tell: generated C++ becomes object code for them. Nothing runs there."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elsa_tune import space
from elsa_tune.generate import cpp
from elsa_tune.generate.cpp.compiler import FLAGS, ZIG_COMPILE, flags
from elsa_tune.generate.cpp.laws import ISAS
from elsa_tune.problem import Problem

WINDOWS, MACOS = ("x86_64-windows-gnu", "win32", b"\x64\x86"), ("aarch64-macos", "darwin", b"\xcf\xfa\xed\xfe")
"""zig's name of a system, Python's, and how its object files begin: COFF for x86-64, Mach-O of 64 bits."""

KERNELS = [
    ("cpp.serial.avx512.l16.q3.k8.v8.n96.e10", "fp64.d64.causal.softcap", WINDOWS),
    ("cpp.hybrid.avx2.l8.q2.k5.v5.n120.w4.s4.packed.p8", "fp32.d80.causal", WINDOWS),  # allocates what splits leave
    ("cpp.serial.avx2.l8.q2.k4.v4.n24.head", "bf16.d64.lengths", WINDOWS),
    ("cpp.blelloch.neon.l4.c4.q4.k2.v4.n32.s8", "fp32.d128", MACOS),
    ("cpp.serial.portable.l4.q2.k2.v4.n24", "fp32.d64.window.alibi", MACOS),
]


def compiled(folder: Path, variant: str, family: str, target: str, system: str) -> bytes:
    """The object file of a kernel for a system, quickly: unoptimised."""
    chosen = space.parse(variant)
    text, made = folder / f"{variant}.cpp", folder / f"{variant}.o"
    text.write_text(cpp.source(chosen, Problem.parse(family)).text)
    told = [flag for flag in flags(system) if flag != "-O3"]
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "c++",
        "-target",
        target,
        *told,
        *ZIG_COMPILE,
        *ISAS[str(chosen.axes["isa"])].flags,
    ]
    done = subprocess.run(
        [*command, "-w", "-c", str(text), "-o", str(made)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (variant, target, done.stderr[:1000])
    return made.read_bytes()


def test_kernels_compile_for_windows_and_macos(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="needs the compiler extra: pip install 'elsa-tune[compiler]'")
    with ThreadPoolExecutor(2) as pool:
        made = [(pool.submit(compiled, tmp_path, v, family, *where[:2]), where[2]) for v, family, where in KERNELS]
        for code, begins in made:
            assert code.result().startswith(begins) and b"elsa_attention" in code.result()


def test_each_system_is_told_what_it_understands() -> None:
    assert "-fPIC" in flags("linux") and flags("linux") == flags("darwin") and "-fPIC" not in flags("win32")
    assert flags(sys.platform) == FLAGS
