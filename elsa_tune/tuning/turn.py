"""A problem's turn: ask for a few new variants, build them side by side, check and time them, for its family's other shapes too."""

from __future__ import annotations

from collections.abc import Sequence

from elsa_tune.device import host_cpu
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.peaks import least_seconds
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.task import Task
from elsa_tune.variant import Variant

ENOUGH = 0.95
"""Share of the physical limit that ends a search: what is left is within the noise of the limit itself."""

SIDE_BY_SIDE = 4
"""Variants asked of each backend, built and raced at once; on a CPU one a core, where there are more. On a GPU checks take
longer than building side by side, so more at once would save nothing, and results could not guide the next."""

HARDLY = 12
"""A problem for which fewer variants were tried was hardly searched, and the run says so."""


def turn(run: Run, task: Task, reserve: float = 0.0) -> None:
    """One turn, and the siblings' part in it as long as more than ``reserve`` seconds are left.

    A problem whose best variant is ENOUGH of what the measured peaks allow is asked nothing more.
    """
    if is_near_the_limit(run, task):
        return
    run.show(f"{task.problem}  building")
    asked = ask(run, task)
    if not asked:
        task.close()
        return
    with run.trials.alone():
        built = run.build(task, asked)
        try_out(run, task, built)
        for other in run.siblings(task):
            if _affords(run, other, built, reserve):
                try_out(run, other, _taken(run, other, built))


def try_late_ones_again(run: Run, reserve: float) -> None:
    """Kernels that took too long while others used the machine get one more chance."""
    late, run.trials.late = run.trials.late, []
    tasks = {task.problem: task for task in run.tasks}
    for problem, variant in late:
        if run.left() > reserve:
            with run.trials.alone():
                try_out(run, tasks[problem], run.build(tasks[problem], [variant]))


def try_out(run: Run, task: Task, built: Sequence[Contender]) -> None:
    """Check and time kernels on one problem."""
    assert task.incumbent is not None
    if built:
        run.note(task, run.trials.trial(task.problem, task.incumbent, built, task.best))


def ask(run: Run, task: Task) -> list[Variant]:
    """A few variants of each search, as many together as are still to be tried."""
    few = SIDE_BY_SIDE if run.device.is_gpu else max(SIDE_BY_SIDE, host_cpu().cores)
    asked: list[Variant] = []
    for search in task.searches:
        missing, heard = -(-(task.target - task.trials) // len(task.searches)), search.heard
        asked += search.ask(max(2, min(few, missing)))
        task.trials += search.heard - heard
    return asked


def is_near_the_limit(run: Run, task: Task) -> bool:
    """Whether what is left is within the noise of the physical limit itself; then the search of a problem ends."""
    least = least_seconds(task.problem, run.trials.peaks)
    searched = task.trials >= min(HARDLY, task.target)
    near = bool(least and searched and task.seconds and least * task.best / task.seconds > ENOUGH)
    if near:
        task.close()
    return near


def _affords(run: Run, task: Task, built: Sequence[Contender], reserve: float) -> bool:
    """Whether a problem is still open, and there is time to try so many variants on it."""
    if not task.wants_trials or is_near_the_limit(run, task):
        return False
    return run.left() - reserve > len(built) * (0.2 + 6 * task.seconds)


def _taken(run: Run, task: Task, built: Sequence[Contender]) -> list[Contender]:
    """Which kernels, built for another shape of the family, are lawful and new for this one."""
    allowed = [c.variant for c in built if run.is_lawful(c.variant, task.problem)]
    new = {v for search in task.searches for v in search.take(v for v in allowed if v.backend == search.backend)}
    return [c for c in built if c.variant in new]
