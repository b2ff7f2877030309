"""Traffic: what programs ask of a device, how often, and how long torch's own kernels take over it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from elsa_tune.device import Device
from elsa_tune.measurement import canonical
from elsa_tune.problem import Problem

LEAST_SHARE = 0.01
"""Of all seconds, below which a problem is not worth tuning."""


class Asked(NamedTuple):
    """A problem, how often it was asked, and the seconds that this took."""

    problem: Problem
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Calls of a problem by one process on a device, and their seconds by torch's own kernel, of version ``torch``, with so many
    ``threads``. ``process`` is the process's random name, ``wall`` the seconds that it had lasted when this was written."""

    device: Device
    problem: Problem
    calls: int
    seconds: float
    process: str
    wall: float
    torch: str
    threads: int

    @property
    def said(self) -> dict[str, Any]:
        """Each field as JSON has it."""
        return {
            **{name: getattr(self, name) for name in FIELDS},
            "device": str(self.device),
            "problem": str(self.problem),
        }

    @property
    def line(self) -> str:
        """Canonical JSON: equal content is equal text."""
        return canonical(self.said)

    @property
    def asked(self) -> Asked:
        """What was asked."""
        return Asked(self.problem, self.calls, self.seconds)


FIELDS = tuple(field.name for field in fields(Traffic))


def merged(asked: Iterable[Asked]) -> list[Asked]:
    """Equal problems as one, and problems that differ in their length of keys alone and that dispatch serves alike; those of most seconds
    first."""
    alike: dict[Problem, dict[Problem, Asked]] = defaultdict(dict)
    for problem, calls, seconds in asked:
        lengths = alike[problem.nearby]
        before = lengths.get(problem, Asked(problem, 0, 0.0))
        lengths[problem] = Asked(problem, before.calls + calls, before.seconds + seconds)
    return sorted((_as_one(nearby, [*x.values()]) for nearby, x in alike.items()), key=lambda one: -one.seconds)


def _as_one(nearby: Problem, lengths: list[Asked]) -> Asked:
    """By the length that has most of the seconds; where none has, by the least, whose winner dispatch takes for all of them."""
    seconds = sum(one.seconds for one in lengths)
    most = max(lengths, key=lambda one: one.seconds)
    problem = most.problem if len(lengths) == 1 or 2 * most.seconds > seconds else nearby
    return Asked(problem, sum(one.calls for one in lengths), seconds)


def worth_tuning(asked: Iterable[Asked]) -> dict[Problem, float]:
    """The problems that have LEAST_SHARE of all seconds, each with its own, or the largest; the smaller ones of a family count with its largest, whose
    winner may serve them too."""
    found, total = merged(asked), 0.0
    weights: dict[Problem, float] = {}
    largest: dict[str, Problem] = {}
    for problem, _, seconds in found:
        total += seconds
        largest.setdefault(problem.family, problem)
    for problem, _, seconds in found:
        counts = problem if seconds >= LEAST_SHARE * total else largest[problem.family]
        weights[counts] = weights.get(counts, 0.0) + seconds
    worth = {problem: seconds for problem, seconds in weights.items() if seconds >= LEAST_SHARE * total}
    if not worth and found:
        worth = {found[0].problem: total}
    return worth if total else dict.fromkeys(worth, 1.0)


def of(device: Device, found: Iterable[Traffic]) -> list[Traffic]:
    """What was asked of a device; if nothing was, of others of its kind; else of any."""
    every = list(found)
    return (
        [one for one in every if one.device == device]
        or [one for one in every if one.device.kind == device.kind]
        or every
    )


def wall_of(found: Iterable[Traffic]) -> float:
    """Seconds that the processes lasted, together."""
    lasted: dict[str, float] = {}
    for one in found:
        lasted[one.process] = max(one.wall, lasted.get(one.process, 0.0))
    return sum(lasted.values())
