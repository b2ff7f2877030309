"""What a run knows of each problem it tunes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from elsa_tune.errors import BadVariant
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.space import parse
from elsa_tune.tuning.search import Search
from elsa_tune.tuning.trial import Incumbent


@dataclass
class Task:
    """One problem being tuned on one device: what is known of it."""

    problem: Problem
    searches: list[Search]
    weight: float = 1.0  # how much it matters beside the others, 1 on average
    incumbent: Incumbent | None = None
    trials: int = 0
    target: int = 0
    finals: int = 0  # that nobody disturbed
    busy: bool = False  # whether its last final was disturbed
    counts: dict[str, int] = field(default_factory=dict)  # status -> measurements
    latest: dict[str, Measurement] = field(default_factory=dict)  # variant -> its last usable measurement
    pooled: dict[str, float] = field(default_factory=dict)  # variant -> what its finals together say, where it has some

    @property
    def seconds(self) -> float:
        """Of one incumbent call; 0 while nobody knows."""
        return self.incumbent.seconds if self.incumbent else 0.0

    @property
    def best(self) -> float:
        """The best ratio to the incumbent so far; 1 is the incumbent's own."""
        return max(map(self.ratio, self.latest), default=1.0)

    def ratio(self, spelling: str) -> float:
        """What is known of a variant that was timed: its finals together, or its last trial."""
        return self.pooled.get(spelling) or self.latest[spelling].ratio or 0.0

    def ranked(self) -> list[str]:
        """Variants that were timed, the best first, without torch's own."""
        return sorted((v for v in self.latest if not self.latest[v].is_rival), key=self.ratio, reverse=True)

    @property
    def wants_trials(self) -> bool:
        """Whether it can be tried, and enough was not."""
        return self.incumbent is not None and self.trials < self.target

    @property
    def settled(self) -> bool:
        """Enough tried, and the finalists raced while nobody disturbed them."""
        return self.incumbent is not None and self.trials >= self.target and (self.finals > 0 or not self.searches)

    def close(self) -> None:
        """Ask nothing more of its searches."""
        self.target = self.trials

    def reopen(self) -> None:
        """Begin anew: what was measured is no evidence any more."""
        self.trials = self.finals = 0

    def pool(self, found: list[Evidence]) -> None:
        """Take what finals say together into account."""
        self.pooled = {pool.variant: pool.ratio for pool in found}

    def note(self, m: Measurement) -> None:
        """Take a measurement into account."""
        if m.is_hint:
            return
        self.counts[m.status] = self.counts.get(m.status, 0) + 1
        if m.no_verdict:
            return
        if m.status == "ok":
            self.latest[m.variant] = m
        if m.is_rival:
            return
        self.trials += m.stage == "trial"
        self.finals += m.stage == "final" and not m.disturbed
        if m.stage == "final":
            self.busy = m.disturbed
        for search in self.searches:
            with suppress(BadVariant):  # recorded by a version whose space had other values
                variant = parse(m.variant)
                if variant.backend == search.backend:
                    search.tell(variant, m.ratio if m.status == "ok" else None)


FAILURES = ("wrong", "failed", "timeout", "pruned")
"""What becomes of variants that are not timed."""


@dataclass(frozen=True, slots=True)
class OfFamily:
    """What a run knows of a family: the best ratio to torch's own among its problems so far, None before anything of ours was timed, variants
    tried, wanted, and failed."""

    family: str
    best: float | None
    trials: int
    target: int
    failures: int


@dataclass
class Progress:
    """What ``watch`` sees after every step."""

    tasks: list[Task]
    doing: str
    elapsed: float
    budget: float

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return max(0.0, self.budget - self.elapsed)

    @property
    def families(self) -> list[OfFamily]:
        """Every family of the run, by name."""
        found: dict[str, list[Task]] = {}
        for task in self.tasks:
            found.setdefault(str(task.problem.family), []).append(task)
        return [
            OfFamily(
                family, max((t.best for t in tasks if t.ranked()), default=None), sum(t.trials for t in tasks), sum(t.target for t in tasks),
                sum(t.counts.get(status, 0) for t in tasks for status in FAILURES),
            )
            for family, tasks in sorted(found.items())
        ]  # fmt: skip
