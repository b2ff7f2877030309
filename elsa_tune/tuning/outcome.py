"""What a run established: the winner of each problem, and how close it comes to what the device allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elsa_tune.device import Device
from elsa_tune.measurement import Evidence
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.remember.winners import Database


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the final table. ``limit`` is the share of what the measured peaks would allow."""

    problem: Problem
    device: Device
    winner: Evidence | None
    gflops: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run established, one outcome a problem and device."""

    outcomes: list[Outcome]
    seconds: float
    notes: list[str]

    @property
    def complete(self) -> bool:
        """Whether every problem has a winner; torch's SDPA counts."""
        return all(outcome.winner for outcome in self.outcomes)


def outcome(database: Database, problem: Problem, device: Device) -> Outcome:
    """The recorded winner of a problem and how close it comes to the limits measured in the same run."""
    winner = next(iter(database.winners(True, device=str(device), problem=str(problem))), None)
    measured = winner.measurement if winner else None
    if measured is None or not measured.seconds:
        return Outcome(problem, device, winner)
    least = least_seconds(problem, measured.provenance)
    rate = problem.flops / measured.seconds / 1e9
    return Outcome(problem, device, winner, rate, least and least / measured.seconds)


def least_seconds(problem: Problem, peaks: Mapping[str, str | float]) -> float | None:
    """What operations and bytes allow at measured ``peak_*`` rates, or None where those are unknown.

    A product of a class may be several of the kind that matrix units multiply.
    """

    def peak(name: str) -> float:
        return float(peaks.get(f"peak_{name}", 0))

    precision, narrow = elements.precision(problem.precision), elements.get(problem.dtype).narrow
    multiply_adds = 0.0 if narrow else peak("gflops") or peak("fp32")
    compute = max(multiply_adds, peak(precision.peak) / precision.products)
    gbytes = peak("gbytes")
    return max(problem.flops / compute, problem.bytes / gbytes) / 1e9 if compute and gbytes else None
