"""A run: one device, its problems, and the time they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from elsa_tune.generate import lawful
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.effort import Effort
from elsa_tune.tuning.task import Progress, Task
from elsa_tune.tuning.trial import Trials
from elsa_tune.variant import Variant

GRACE, LEAST_GRACE = 0.05, 5.0
"""What a run may last beyond its budget: a share of it, and seconds, before whatever it does is given up."""


@dataclass
class Run:
    """One device's tasks until the deadline (of time.monotonic()), ``budget`` seconds after it began."""

    trials: Trials
    effort: Effort
    deadline: float
    budget: float
    watch: Callable[[Progress], None]
    notes: list[str]
    tasks: list[Task]

    def __post_init__(self) -> None:
        self.database, self.device = self.trials.database, self.trials.device

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def give_up_after(self, seconds: float) -> None:
        """From now on, what lasts longer than so many seconds beyond the deadline is given up with OutOfTime."""
        self.trials.deadline = self.deadline + seconds

    @property
    def grace(self) -> float:
        """Seconds beyond the deadline that what has begun may last."""
        return max(LEAST_GRACE, GRACE * self.budget)

    def show(self, doing: str) -> None:
        """Tell whoever watches."""
        self.watch(Progress(self.tasks, doing, self.budget - self.left(), self.budget))

    def note(self, task: Task, measurements: Iterable[Measurement]) -> None:
        """Take what was measured into account, each as it comes."""
        for m in measurements:
            task.note(m)
            self.show(f"{task.problem}  {m.variant}")

    def build(self, task: Task, variants: Sequence[Variant]) -> Sequence[Contender]:
        """Those of some variants that can be built and have no flaw."""
        built, lost = self.trials.build(task.problem, variants)
        self.note(task, lost)
        return built

    def siblings(self, task: Task) -> list[Task]:
        """The other shapes of a problem's family."""
        return [t for t in self.tasks if t is not task and t.problem.family == task.problem.family]

    def is_lawful(self, variant: Variant, problem: Problem) -> bool:
        """Whether the laws allow a variant here."""
        return lawful.refusal(variant, problem, self.device) is None

    def winner(self, task: Task) -> Evidence | None:
        """What the database says is best here."""
        return next(iter(self.database.winners(True, device=str(self.device), problem=str(task.problem))), None)
