"""What a run established: the winner of each problem, and how close it comes to what the device allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elsa_tune.device import Device
from elsa_tune.measurement import Evidence
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.tuning.peaks import least_seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the final table. ``limit`` is the share of what the measured peaks would allow, ``tried`` how many variants of ours were ever
    tried here, or None where nobody counted."""

    problem: Problem
    device: Device
    winner: Evidence | None
    gflops: float | None = None
    limit: float | None = None
    tried: int | None = None

    @classmethod
    def of(cls, database: Database, problem: Problem, device: Device) -> Outcome:
        """The recorded winner of a problem and how close it comes to the peaks measured in the same run."""
        winner = next(iter(database.winners(True, device=str(device), problem=str(problem))), None)
        known = database.measurements(True, device=str(device), problem=str(problem))
        tried = {m.variant for m in known if not m.is_rival and m.status != "candidate"}
        return replace(cls.won(problem, device, winner), tried=len(tried))

    @classmethod
    def won(cls, problem: Problem, device: Device, winner: Evidence | None) -> Outcome:
        """A problem, its winner, and how close that comes to the peaks measured in the same run."""
        measured = winner.measurement if winner else None
        if measured is None or not measured.seconds:
            return cls(problem, device, winner)
        least = least_seconds(problem, measured.provenance)
        rate = problem.flops / measured.seconds / 1e9
        return cls(problem, device, winner, rate, least and least / measured.seconds)

    @property
    def command(self) -> str:
        """The command that tunes this problem again and prints its line."""
        return f"elsa-tune --device {self.device} --problem {self.problem}"


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
