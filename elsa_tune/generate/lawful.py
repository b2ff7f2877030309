"""Which variants of a space may serve a problem on a device: what the laws of its backend leave."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

from elsa_tune import places
from elsa_tune.device import Device, detect, named
from elsa_tune.generate import backends
from elsa_tune.generate.backends import Law
from elsa_tune.problem import Problem
from elsa_tune.space import Axis, Space
from elsa_tune.variant import Value, Variant

PLAIN = Problem(head_dim=64)
"""What every backend serves, on devices that it serves at all."""


@cache
def everywhere() -> tuple[Device, ...]:
    """Devices of all kinds that kernels are generated for: those here, typical GPUs of search_spaces/targets.toml, any of OpenCL."""
    targets = places.read_toml(places.data("search_spaces") / "targets.toml")
    return tuple(dict.fromkeys([*detect(), *map(named, targets), named("opencl")]))


def unserved(problem: Problem, devices: Iterable[Device], names: Iterable[str]) -> str | None:
    """Why none of some backends generates a kernel of the problem's family for any of some devices, or None where one does."""
    reasons = []
    for name, device in product(names, devices):
        reason = backends.get(name).refusal(problem, device)
        if reason is None:
            return None
        if backends.get(name).refusal(PLAIN, device) is None:
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or "no backend generates kernels for such a device"


def refusal(variant: Variant, problem: Problem, device: Device) -> str | None:
    """The first law's reason against this variant, or None if it is valid. Raises BadVariant for an unknown backend."""
    known = {**variant.axes, "problem": problem, "device": device}
    for law in backends.get(variant.backend).LAWS:
        if reason := law(**{name: known[name] for name in _parameters(law)}):
            return f"{law.__name__}: {reason}"
    return None


def starts(space: Space, problem: Problem, device: Device) -> list[Variant]:
    """The valid ones of the variants that a search starts from."""
    return [v for v in map(space.parse, space.start) if refusal(v, problem, device) is None]


def variants(
    space: Space,
    problem: Problem,
    device: Device,
    prefer: Mapping[str, Value] | None = None,
    rng: random.Random | None = None,
) -> Iterator[Variant]:
    """Every valid variant, values nearest to ``prefer`` first (else declared or shuffled order).

    A law is asked as soon as the axes it names are chosen, so refused corners are never walked through.
    """
    due = _laws_due(space)
    known: dict[str, Any] = {"problem": problem, "device": device}

    def walk(depth: int) -> Iterator[Variant]:
        if depth == len(space.axes):
            yield space.variant({axis.name: known[axis.name] for axis in space.axes})
            return
        axis = space.axes[depth]
        for value in _ordered(axis, (prefer or {}).get(axis.name), rng):
            known[axis.name] = value
            if not any(law(**{name: known[name] for name in names}) for law, names in due[depth]):
                yield from walk(depth + 1)

    return walk(0)


def _laws_due(space: Space) -> list[list[tuple[Law, tuple[str, ...]]]]:
    """For each axis the laws that can be asked once it is chosen, and what they ask for."""
    position = {axis.name: i for i, axis in enumerate(space.axes)}
    due: list[list[tuple[Law, tuple[str, ...]]]] = [[] for _ in space.axes]
    for law in backends.get(space.backend).LAWS:
        names = _parameters(law)
        due[max((position.get(name, 0) for name in names), default=0)].append((law, names))
    return due


@cache
def _parameters(law: Law) -> tuple[str, ...]:
    """What a law asks for."""
    return tuple(inspect.signature(law).parameters)


def _ordered(axis: Axis, wanted: Value | None, rng: random.Random | None) -> tuple[Value, ...]:
    """An axis' values, those next to the wanted one first, or shuffled, or as declared."""
    if wanted is not None:
        at = axis.values.index(wanted)
        return tuple(sorted(axis.values, key=lambda v: abs(axis.values.index(v) - at)))
    if rng is not None:
        return tuple(rng.sample(axis.values, len(axis.values)))
    return axis.values
