"""A kernel as one header with a plain C interface, for programs without Python."""

from __future__ import annotations

import re
from dataclasses import dataclass

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.errors import BadVariant, KernelMissing
from elsa_tune.generate import backends, cpp, lawful
from elsa_tune.generate.cuda import laws as cuda_laws
from elsa_tune.generate.laws import SCRATCH_BYTES, mask_has_text
from elsa_tune.generate.render import write
from elsa_tune.measurement import Measurement
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.remember.layers import known_winners, layers
from elsa_tune.remember.winners import Database
from elsa_tune.ship import archs
from elsa_tune.space import Space
from elsa_tune.variant import Variant

LANGUAGES = {"cuda": "cuda", "opencl": "opencl", "cpu": "cpp"}
"""What a header is written in, by a device's kind."""

BACKENDS = ("cuda", "cpp")
"""Whose kernels can be headers."""


@dataclass(frozen=True, slots=True)
class Header:
    """One header: its C name (also its file's, with .h), what it computes, and its text."""

    name: str
    variant: Variant
    problem: Problem
    text: str


def header(variant: Variant, problem: Problem, name: str = "", device: str = "") -> Header:
    """The header of a variant for the problem's family. Raises KernelMissing for a variant that has none."""
    backend, axes = backends.get(variant.backend), variant.axes
    language = "cpp" if variant.backend == "cpp" else str(axes.get("dialect", ""))
    source = backend.source(variant, problem)
    if source is None or language not in LANGUAGES.values():
        raise KernelMissing(f"{variant} cannot be a header; variants of cpp, and of cuda in CUDA and OpenCL, can")
    if reason := refusal(problem, language):
        raise KernelMissing(reason)
    name = name or f"attention_{re.sub('[^a-z0-9]+', '_', problem.family)}"
    context = {
        "name": name, "variant": variant, "problem": problem, "language": language, "device": device,
        "text": source.text, "bytes": elements.get(problem.dtype).bytes, "splits": int(axes["splits"]),
        "schedule": axes.get("schedule", "fold"), "scratch_bytes": SCRATCH_BYTES,
        "tiling": cuda_laws.Tiling.of(axes, problem) if variant.backend == "cuda" else None,
        "flags": " ".join(compile_flags(variant)) if variant.backend == "cpp" else "",
    }  # fmt: skip
    return Header(name, variant, problem, write("kit/header.h.j2", context))


def refusal(problem: Problem, language: str) -> str | None:
    """Why no header can call kernels of the problem, or None."""
    if untold := mask_has_text(problem):
        return f"a header's function has no place for operands, scores and masks but causal: {untold}"
    return "a C++ header's function takes floats" if language == "cpp" and problem.dtype != "fp32" else None


def compile_flags(variant: Variant) -> list[str]:
    """What a C++ compiler is told, beside input and output."""
    flags = [flag for flag in cpp.FLAGS if flag not in ("-fPIC", "-fvisibility=hidden", "-std=c++17")]
    return ["-std=c++14", *flags, "-fopenmp", *cpp.ISAS[str(variant.axes["isa"])].flags]


def best(problem: Problem, device: Device) -> list[Variant]:
    """Variants for a device that need not be here, the most trusted first: winners, what a kit measured, unmeasured
    candidates, then what a search would start from; those that can be headers and the laws allow."""
    known: list[Measurement] = [
        w.measurement for w in known_winners(device, layers(), family=problem.family) if w.rung != "family"
    ]
    for layer in layers():
        if layer.database:
            known += _of_kits(layer.database, problem, device)
    spellings = [m.variant for m in known] + [s for name in BACKENDS for s in Space.load(name).start]
    found = []
    for spelling in dict.fromkeys(spellings):
        try:
            variant = space.parse(spelling)
        except BadVariant:  # recorded by a version whose space had other values
            continue
        if variant.backend in BACKENDS and not (
            backends.get(variant.backend).refusal(problem, device) or lawful.refusal(variant, problem, device)
        ):
            found.append(variant)
    return found


def _of_kits(database: Database, problem: Problem, device: Device) -> list[Measurement]:
    """What was measured on such a device without torch, fastest first, then unmeasured candidates."""
    rows = [
        m
        for m in database.measurements(family=problem.family)
        if device.kinship(Device.parse(m.device)) not in (None, "family")
    ]
    measured = [m for m in rows if m.status == "ok" and m.seconds and not m.incumbent.startswith("sdpa.")]
    same = [m for m in measured if m.problem == str(problem)]
    return [*sorted(same or measured, key=lambda m: -(m.ratio or 0)), *(m for m in rows if m.status == "candidate")]


def export(problem: Problem, device: str) -> Header:
    """The best known kernel for a problem on a device as a header. Raises BadDevice, KernelMissing."""
    goal = archs.device(device)
    if goal.kind not in LANGUAGES:
        raise KernelMissing(f"headers are written in C++, CUDA C and OpenCL C; {goal} speaks none of them")
    for variant in best(problem, goal):
        return header(variant, problem, device=device)
    raise KernelMissing(f"no variant can serve {problem} on {goal}; `elsa-tune explain {problem}` says more")
