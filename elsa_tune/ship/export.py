"""A kernel as one header with a plain C interface, for programs without Python."""

from __future__ import annotations

import re
from dataclasses import dataclass

from elsa_tune import device as devices
from elsa_tune import places, space
from elsa_tune.device import Device
from elsa_tune.errors import BadVariant, KernelMissing
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.laws import family_has_text
from elsa_tune.generate.portable import Portable
from elsa_tune.generate.render import write
from elsa_tune.measurement import Measurement
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem
from elsa_tune.remember.layers import Layer, known_winners, layers
from elsa_tune.space import Space
from elsa_tune.variant import Variant


@dataclass(frozen=True, slots=True)
class Header:
    """One header: its C name (also its file's, with .h), what it computes, the kernel in it, and its text."""

    name: str
    variant: Variant
    problem: Problem
    kernel: Portable
    text: str


def header(variant: Variant, problem: Problem, name: str = "", device: str = "") -> Header:
    """The header of a variant for the problem's family. Raises KernelMissing for a variant or a family that has none."""
    backend = backends.get(variant.backend)
    if reason := backend.no_header(problem):
        raise KernelMissing(f"{variant} cannot be a header for {problem.family}: {reason}")
    made = backend.portable(variant, problem)
    if made is None:
        raise KernelMissing(f"{variant} cannot be a header; headers are written in {', '.join(languages())}")
    name = name or f"attention_{re.sub('[^a-z0-9]+', '_', problem.family)}"
    context = {
        "name": name, "variant": variant, "problem": problem, "mask": masks.get(problem.mask), "language": made.language, "device": device,
        "text": made.source.text, "bytes": elements.get(problem.dtype).bytes, "launch": made.launch,
        "flags": " ".join(made.flags),
    }  # fmt: skip
    return Header(name, variant, problem, made, write("kit/header.h.j2", context))


def languages() -> list[str]:
    """What headers are written in: a folder of texts each."""
    return sorted(path.parent.name for path in (places.data("templates") / "kit").glob("*/header.j2"))


def refusal(problem: Problem, device: Device) -> str | None:
    """Why no kernel for the problem can be a header for the device, or None."""
    if unknown := family_has_text("kit", problem):
        return f"a header cannot say it: {unknown}"
    reasons = []
    for name in speakers(device):
        if reason := backends.get(name).no_header(problem) or backends.get(name).refusal(problem, device):
            reasons.append(reason)
        else:
            return None
    return "; ".join(reasons) or f"headers are written in {', '.join(languages())}; {device} speaks none of them"


def speakers(device: Device) -> list[str]:
    """Backends whose kernels can be headers for the device."""
    return [name for name in backends.names() if backends.get(name).speaks(device)]


def best(problem: Problem, device: Device) -> list[Variant]:
    """Variants for a device that need not be here, the most trusted first: winners, what a kit measured, unmeasured
    candidates, then what a search would start from; those that can be headers and the laws allow."""
    known: list[Measurement] = [
        w.measurement for w in known_winners(device, layers(), family=problem.family) if w.rung != "family"
    ]
    for layer in layers():
        known += _of_kits(layer, problem, device)
    those = [name for name in speakers(device) if backends.get(name).refusal(problem, device) is None]
    spellings = [m.variant for m in known] + [s for name in those for s in Space.read(name).start]
    found = []
    for spelling in dict.fromkeys(spellings):
        try:
            variant = space.parse(spelling)
        except BadVariant:  # recorded by a version whose space had other values
            continue
        if variant.backend in those and not (
            backends.get(variant.backend).refusal(problem, device) or lawful.refusal(variant, problem, device)
        ):
            found.append(variant)
    return found


def _of_kits(layer: Layer, problem: Problem, device: Device) -> list[Measurement]:
    """What was measured on such a device without torch, fastest first, then unmeasured candidates."""
    rows = [
        m
        for m in layer.measurements(family=problem.family)
        if device.kinship(Device.parse(m.device)) not in (None, "family")
    ]
    measured = [m for m in rows if m.status == "ok" and m.seconds and (m.is_hint or not m.incumbent)]
    same = [m for m in measured if m.problem == str(problem)]
    return [*sorted(same or measured, key=lambda m: -(m.ratio or 0)), *(m for m in rows if m.status == "candidate")]


def export(problem: Problem, device: str) -> Header:
    """The best known kernel for a problem on a device as a header. Raises BadDevice, KernelMissing."""
    goal = devices.named(device)
    if reason := refusal(problem, goal):
        raise KernelMissing(reason)
    for variant in best(problem, goal):
        return header(variant, problem, device=device)
    raise KernelMissing(f"no variant can serve {problem} on {goal}; `elsa-tune explain {problem}` says more")
