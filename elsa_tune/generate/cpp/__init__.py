"""C++ kernels for CPUs: what this backend answers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate.backends import Built, Finding, Gradients, Interposer, Kernel
from elsa_tune.generate.context import of_family
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cpp import native as _native
from elsa_tune.generate.cpp import peak as _peak
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.generate.cpp.build import build_text, find
from elsa_tune.generate.cpp.call import CppGradients, CppKernel
from elsa_tune.generate.cpp.compiler import FLAGS, WARNINGS
from elsa_tune.generate.cpp.laws import EXP, ISAS, LAWS, SCRATCH_BYTES, columns
from elsa_tune.generate.cpp.real import real_of
from elsa_tune.generate.laws import dims_are_generated, family_has_text, mask_has_text, reliable, slopes_have_text
from elsa_tune.generate.portable import Portable
from elsa_tune.generate.render import Source, render
from elsa_tune.parts import element as elements
from elsa_tune.parts import operator as operators
from elsa_tune.parts import scan
from elsa_tune.parts import state as states
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

__all__ = ["LAWS", "find"]
TEMPLATES = {"forward": "cpp/attention.cpp.j2", "backward": "cpp/backward.cpp.j2"}


def refusal(problem: Problem, device: Device) -> str | None:
    """C++ serves float32 and float64, and bfloat16 and float16 with float32 states, forward and backward, masks and scores that it has texts
    of, dimensions up to 256, on CPUs."""
    if device.kind != "cpu":
        return f"the C++ backend runs on CPUs, not on {device}"
    precision = elements.precision(problem.precision)
    if precision not in elements.get(problem.dtype).precisions or precision.rounds_products:
        return f"the C++ backend multiplies and adds what states are of; {problem.dtype} has no class {problem.precision} there"
    untold = family_has_text("cpp", problem) or dims_are_generated(problem)
    return untold or (slopes_have_text("cpp", problem) if problem.direction == "backward" else None)


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The C++ text for the problem's family."""
    axes, real = variant.axes, real_of(problem.dtype)
    strategy, lanes = scan.get(str(axes["scan"])), real.lanes(int(axes["lanes"]))
    isa, grad_tile = ISAS[str(axes["isa"])], int(axes["grad_tile"])
    return render(
        TEMPLATES[problem.direction],
        {
            **axes,
            "lanes": lanes,
            "real": real,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": scan.get(strategy.grid or strategy.name),
            "state": states.get(str(axes["state"])),
            "operator": operators.get(problem.operator),
            "variant": variant,
            "family": problem.family,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            **of_family(problem),
            "element": elements.get(problem.dtype),
            "block_m": int(axes["query_vectors"]) * lanes // int(axes["chunk"]),
            "exp": EXP,
            "query_columns": columns(problem.head_dim, lanes, grad_tile, isa),
            "value_columns": columns(problem.value_dim, lanes, grad_tile, isa),
            "reliable": reliable(problem),
            "scratch_bytes": SCRATCH_BYTES,
        },
    )


def command(variant: Variant) -> list[str]:
    """The compile command for a shared library, without input and output. Raises CompilerMissing."""
    return [*_compiler.find().command, *FLAGS, *WARNINGS, *ISAS[str(variant.axes["isa"])].flags, "-shared"]


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """What a built kernel is filed under: code, compile command and compiler version."""
    parts = [source(variant, problem).digest, *command(variant), _compiler.find().version]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """The compiled family, from the cache or the compiler."""
    name = digest(variant, problem)
    built = find(name) or build_text(source(variant, problem).text, name, variant)
    return replace(built, resources={**built.resources, **_network(variant)})


def _network(variant: Variant) -> dict[str, int]:
    """Depth and merges of the scan of one query tile: among the workers of a core, then among splits."""
    strategy = scan.get(str(variant.axes["scan"]))
    counts = {"depth": 0, "merges": 0}
    for level, axis in (("block", "workers"), ("grid", "splits")):
        n = int(variant.axes[axis])
        rounds = scan.get(getattr(strategy, level) or strategy.name).total(n)
        counts["depth"] += scan.depth(rounds, n)
        counts["merges"] += sum(r.merges(n) for r in rounds)
    return counts


def load(built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
    """The kernel of the problem's family."""
    assert built.path is not None
    return CppKernel(built.path, problem) if problem.direction == "forward" else CppGradients(built.path, problem)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """Compiler and OpenMP runtime."""
    return {
        "compiler": _compiler.find().version,
        "openmp": Path(_pool.openmp()[0]).name,
        "python": sys.version.split()[0],
    }


def examine() -> Iterator[Finding]:
    """The compiler, and the OpenMP runtime that torch loaded."""
    try:
        found = _compiler.find()
        yield Finding("C++ compiler", True, f"{' '.join(found.command)}: {found.version}")
        if named := _compiler.passed_over(found):
            yield Finding(
                "CXX", False, f"{named} does not answer, and was passed over", "name a compiler that does, or unset CXX"
            )
    except CompilerMissing as error:
        yield Finding("C++ compiler", False, "none; torch's own SDPA serves", str(error))
    file, entry = _pool.openmp()
    if entry:
        yield Finding("OpenMP runtime", True, f"{file}, {torch.get_num_threads()} threads, shared with torch")
    else:
        remedy = "install a torch built with OpenMP; until then kernels run on one thread"
        yield Finding("OpenMP runtime", False, "torch loaded none with GOMP_parallel", remedy)


def begin_worker() -> None:
    """Kernels may start threads: no pool was used before the fork."""
    _pool.Pool.parent_never_computed()


def peak(device: Device, seconds: float) -> dict[str, float]:
    """Multiply-adds and reads of this CPU."""
    return _peak.peak(seconds) if device.kind == "cpu" else {}


def interposer() -> Interposer:
    """The extension of native.cpp."""
    return _native.load()


def speaks(device: Device) -> str:
    """C++, on CPUs."""
    return "cpp" if device.kind == "cpu" else ""


def no_header(problem: Problem) -> str | None:
    """A header's function takes floats, neither integers nor masks but causal, and computes attention."""
    if problem.direction != "forward":
        return f"a C++ header's function computes attention, and not the gradients of {problem.family}"
    if elements.get(problem.dtype).torch != "float32":
        return f"a C++ header's function takes floats, not {problem.dtype}"
    return mask_has_text(problem)


def portable(variant: Variant, problem: Problem) -> Portable | None:
    """The text as it is: its function is called."""
    flags = [flag for flag in FLAGS if flag not in ("-fPIC", "-fvisibility=hidden", "-std=c++17")]
    told = ("-std=c++14", *flags, "-fopenmp", *ISAS[str(variant.axes["isa"])].flags)
    return Portable("cpp", "cpp", source(variant, problem), told)
