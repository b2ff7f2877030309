"""What a run established: the winner of each problem, and how close it comes to what the device allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elsa_tune.device import Device
from elsa_tune.measurement import Evidence
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database


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

    float32 class products may be three TF32 products each.
    """
    rates = {name: float(peaks.get(f"peak_{name}", 0)) for name in ("gflops", "fp32", "tf32", "fp16", "bf16", "gbytes")}
    multiply_adds = rates["gflops"] or rates["fp32"]
    compute = {
        "strict": multiply_adds,
        "fp32": max(multiply_adds, rates["tf32"] / 3),
        "tf32": max(multiply_adds, rates["tf32"]),
    }.get(problem.precision, rates.get(problem.precision, 0.0))
    return max(problem.flops / compute, problem.bytes / rates["gbytes"]) / 1e9 if compute and rates["gbytes"] else None
