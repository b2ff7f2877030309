"""The ladder: which variant serves a problem, one measured for it, a neighbour's, a kin device's, or torch's own SDPA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from operator import ne, sub
from typing import Protocol

from elsa_tune.device import RUNGS, Device
from elsa_tune.dispatch.exactness import as_exact, torchs_error
from elsa_tune.errors import BadVariant
from elsa_tune.generate import backends, lawful
from elsa_tune.measurement import Evidence, Winner
from elsa_tune.problem import Problem
from elsa_tune.remember.layers import Layer
from elsa_tune.space import parse
from elsa_tune.variant import Variant

LARGE_ADVANTAGE = 1.3
"""A relaxed answer serves only if it was measured at least this many times as fast as SDPA."""

NEAR = 3.0
"""Octaves, summed over (batch, KV head) pairs, query rows and keys, within which a shape is a neighbour."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer and how it was reached: ``rung`` is exact, versions (the same device, other software), neighbour, another
    device's rung, head_dim, mask (another mask or other scores), or sdpa."""

    problem: Problem
    rung: str
    winner: Winner | None
    variant: Variant | None
    steps: tuple[str, ...]

    @property
    def by_sdpa(self) -> bool:
        """Whether torch serves."""
        return self.variant is None or backends.role(str(self.variant)) == "rival"


@dataclass(frozen=True, slots=True)
class _Traits:
    """What tells how far apart two problems are: a shape's octaves, memory orders and launch; and a family's dimensions and words."""

    octaves: tuple[float, ...]
    orders: tuple[str, ...]
    launch: str
    dims: tuple[float, float]
    words: frozenset[str]

    @staticmethod
    def of(problem: Problem) -> _Traits:
        pairs, rows = problem.batch * problem.kv_heads, problem.q_len * problem.group
        return _Traits(
            (math.log2(pairs), math.log2(rows), math.log2(problem.kv_len), math.log2(problem.seen_share) / 2),
            problem.orders,
            problem.launch,
            (math.log2(problem.head_dim), math.log2(problem.value_dim)),
            frozenset((*problem.mask.split("+"), *problem.score.split("+"))),
        )

    def apart(self, other: _Traits) -> float:
        """Octaves between two shapes: of (batch, KV head) pairs, of query rows that share keys, of keys; half as many of the share of
        keys that a row sees, half of one for each operand in another memory order, one for the launch."""
        octaves = _steps(self.octaves, other.octaves)
        orders = 0 if self.orders == other.orders else sum(map(ne, self.orders, other.orders))
        return octaves + orders / 2 + (self.launch != other.launch)

    def apart_with_family(self, other: _Traits) -> float:
        """The same, with dimensions, and words of masks and scores that only one of them has."""
        return self.apart(other) + 4 * _steps(self.dims, other.dims) + len(self.words ^ other.words) / 2


def _steps(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return float(sum(map(abs, map(sub, a, b))))


@lru_cache(maxsize=4096)
def _traits_of(spelled: str) -> _Traits:
    """Of a winner's problem, which is met again at every new shape."""
    return _Traits.of(Problem.parse(spelled))


def distance(a: Problem, b: Problem) -> float:
    """Octaves between two shapes: _Traits.apart()."""
    return _Traits.of(a).apart(_Traits.of(b))


class Known(Protocol):
    """What the ladder climbs over: winners, nearer layers first. Each method is asked only if no rung before it answered."""

    def of_problem(self, problem: Problem, device: Device) -> list[Winner]:
        """Winners for the very problem on the very device, of the nearest layer that has some."""
        ...

    def of_family(self, problem: Problem, device: Device) -> list[Winner]:
        """Winners for the problem's family, of the device and its kin, best rung first."""
        ...

    def akin(self, problem: Problem, device: Device) -> list[Winner]:
        """The same for every family that differs in its dimensions at most."""
        ...

    def other_masks(self, problem: Problem, device: Device) -> list[Winner]:
        """The same for every family that differs in its mask and scores at most."""
        ...

    def slower(self, device: Device) -> set[tuple[str, str]]:
        """(problem, variant) pairs measured below SDPA on the device."""
        ...


def climb(problem: Problem, device: Device, known: Known) -> Choice:
    """The first rung that answers without a doubt; torch below the last."""
    steps: list[str] = []
    for rung, winner, doubt in _answers(problem, device, known):
        if doubt:
            steps.append(f"{rung}: {winner.variant}, won {winner.problem}: {doubt}")
            continue
        finals = f"{winner.finals} final{'s' * (winner.finals > 1)}"
        steps.append(f"{rung}: {winner.variant}, won {winner.problem} by {winner.ratio:.2f} in {finals}")
        found = Choice(problem, rung, winner, parse(winner.variant), tuple(steps))
        break
    else:
        if not steps:
            steps.append(f"nothing is known of {problem.family}")
        steps.append("sdpa: torch serves")
        found = Choice(problem, "sdpa", None, None, tuple(steps))
    if found.by_sdpa and problem.precision == "tf32":  # more exact than asked is welcome
        return climb(problem.reshaped(precision="fp32"), device, known)
    return found


def climb_as_exact(problem: Problem, device: Device, times: float, found: Iterable[Layer]) -> Choice:
    """The fastest variant measured for the very problem on the very device that errs at most ``times`` torch's error and is
    faster; nearer layers first. Nothing is carried over from other shapes: their errors are not this one's."""
    for layer in found:
        measured = layer.measurements(device=str(device), problem=str(problem))
        for m in as_exact(measured, times):
            alone = Evidence(m, m.ratio or 0.0, m.ratio_low or 0.0, m.ratio_high or 0.0, 1)
            winner = Winner(alone, layer.name, "exact")
            if winner.ratio_low > 1 and not _refusal(winner, problem, device):
                step = f"accuracy({times:g}): {m.variant} errs by {m.error:.1e}, torch by {torchs_error(measured) or 0:.1e}"
                return Choice(problem, "exact", winner, parse(m.variant), (step,))
    step = f"accuracy({times:g}): no faster variant is measured that errs at most {times:g} times torch's error; torch serves"
    return Choice(problem, "sdpa", None, None, (step,))


def _answers(problem: Problem, device: Device, known: Known) -> Iterator[tuple[str, Winner, str]]:
    """Candidate answers from the nearest rung to the farthest, each with a doubt; empty if none."""
    own = known.of_problem(problem, device)
    for winner in own:
        yield "exact", winner, _refusal(winner, problem, device)
    family, slower = known.of_family(problem, device), known.slower(device)
    spelled = str(problem)
    same = [w for w in family if w.problem == spelled]
    for winner in same:
        if winner.rung == "exact" and winner not in own:  # of a layer behind the one that answered
            yield "exact", winner, _refusal(winner, problem, device)
    for device_rung in RUNGS:
        near = _nearest(problem, [w for w in family if w.rung == device_rung])
        for winner in near:
            if device_rung == "versions" and winner in same:  # the same GPU after an update of its software
                yield "versions", winner, _refusal(winner, problem, device)
                continue
            others = [w.problem for w in near if w is not winner]
            doubt = _doubt(winner, problem, device) or next(
                (f"slower than SDPA at {other}" for other in others if (other, winner.variant) in slower), ""
            )
            yield "neighbour" if device_rung == "exact" else device_rung, winner, doubt
    own_family = problem.family
    cousins = [w for w in known.akin(problem, device) if w.measurement.family != own_family]
    for winner in _nearest(problem, cousins):
        yield "head_dim", winner, _doubt(winner, problem, device)
    masked = [w for w in known.other_masks(problem, device) if w.measurement.family != own_family]
    for winner in _nearest(problem, masked):
        yield "mask", winner, _doubt(winner, problem, device)


def _nearest(problem: Problem, winners: list[Winner]) -> list[Winner]:
    """The two measured shapes nearest to the problem's, dimensions counting too."""
    if len(winners) <= 1:
        return winners
    mine = _Traits.of(problem)
    return nsmallest(2, winners, key=lambda winner: mine.apart_with_family(_traits_of(winner.problem)))


def _doubt(winner: Winner, problem: Problem, device: Device) -> str:
    """Why a winner of another shape or device must not serve; empty if it may."""
    far = _traits_of(winner.problem).apart(_Traits.of(problem))
    if far > NEAR:
        return f"{far:.1f} octaves away, more than {NEAR:g}"
    if not winner.measurement.is_rival and winner.ratio_low < LARGE_ADVANTAGE:
        return f"its advantage of {winner.ratio_low:.2f} is below {LARGE_ADVANTAGE}, too little to carry over"
    return _refusal(winner, problem, device)


def _refusal(winner: Winner, problem: Problem, device: Device) -> str:
    try:
        variant = parse(winner.variant)
    except BadVariant as error:
        return str(error)
    backend = backends.get(variant.backend)
    return backend.refusal(problem, device) or lawful.refusal(variant, problem, device) or ""
