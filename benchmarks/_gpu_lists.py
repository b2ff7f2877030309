"""What benchmarks/gpu.py asks of a GPU: twelve problems, the most telling first, and the variants that stand for each family."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain, islice, zip_longest

from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate import backends, lawful
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant

PROBLEMS = (
    "fp32.d64@b1.h16.q4096.k4096",
    "bf16.d128.causal@b1.h16.q4096.k4096",
    "fp32.strict.d64@b1.h16.q4096.k4096",
    "fp16.d64@b1.h16.q4096.k4096",
    "bf16.d128@b1.h32.kv8.q1.k16384",
    "fp32.d64.backward@b1.h16.q4096.k4096",
    "fp32.d64@b1.h16.q1024.k1024",
    "fp32.d64@b1.h4.q16384.k16384",
    "bf16.d128.causal@b1.h4.q16384.k16384",
    "fp16.d64@b1.h16.q1024.k1024",
    "bf16.d128.causal.backward@b1.h16.q4096.k4096",
    "fp32.d128.causal@b1.h16.q4096.k4096",
)
"""A cut at any time leaves the most valuable: every class, dimension, length, mask and direction is here once."""

LEAST, MOST = 6, 10
"""Variants of a family that are raced: lawful starts, and their neighbours where those are few."""

SHORT = 1e-4
"""Seconds below which a problem is raced from a graph too, and what a launch costs the host is measured."""

CHECKED = ("@b2.h4.kv2.q300.k300", "@b2.h4.kv2.q1.k300")
"""Shapes that every family is checked on first: ragged and grouped; decoding."""

FAMILIES = ("fp32.d64", "fp32.strict.d40.causal", "bf16.d128.causal", "fp16.d80", "fp32.d64.backward", "fp16.d64.causal.backward")  # fmt: skip
"""Families that are checked first."""

NETWORKS = (
    *(f"cuda.{scan}.t64.x8.r2.k2.w4" for scan in ("hillis_steele", "blelloch")),
    *(f"cuda.{scan}.t64.x8.r2.k2.s4.{how}" for scan in ("hillis_steele", "blelloch") for how in ("two_kernels", "last_block")),
    *(f"cuda.hybrid.t64.x8.r2.k2.w2.s4.{how}" for how in ("two_kernels", "last_block")),
)  # fmt: skip
"""A variant for each scan and schedule of the CUDA C backend."""


def generators(problem: Problem, device: Device) -> list[str]:
    """Backends that render kernels for the problem on the device, and have their compiler: Triton first."""
    found = []
    for name in sorted(backends.candidates(), key=lambda name: (name != "triton", name)):
        backend = backends.get(name)
        if not backend.refusal(problem, device):
            with suppress(CompilerMissing):
                backend.toolchain(device)
                found.append(name)
    return found


def candidates(problem: Problem, device: Device, most: int = MOST) -> list[Variant]:
    """The lawful starting variants of each backend, in turns, ``most`` at most; where they are fewer than LEAST, their nearest
    neighbours too."""
    spaces = [Space.read(name) for name in generators(problem, device)]
    starts = [lawful.starts(s, problem, device) for s in spaces]
    found = [v for v in chain.from_iterable(zip_longest(*starts)) if v is not None][:most]
    near = [islice(lawful.variants(Space.read(v.backend), problem, device, prefer=v.axes), LEAST) for v in found]
    for v in chain.from_iterable(zip_longest(*near)):
        if len(found) >= min(LEAST, most):
            break
        if v is not None and v not in found:
            found.append(v)
    return found


def checks(device: Device) -> list[tuple[Problem, Variant]]:
    """What is checked first: of each family and shape the first variant, then the second, and so on; networks last."""
    posed = [Problem.parse(f + s) for s in CHECKED for f in FAMILIES if not ("backward" in f and ".q1." in s)]
    turns = zip_longest(*([(p, v) for v in candidates(p, device, 4)] for p in posed))
    found = [one for turn in turns for one in turn if one is not None]
    plain, space = Problem.parse(FAMILIES[0] + CHECKED[0]), Space.read("cuda")
    if "cuda" in generators(plain, device):
        found += [(plain, v) for v in map(space.parse, NETWORKS) if lawful.refusal(v, plain, device) is None]
    return found
