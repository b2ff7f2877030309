"""Finals: a problem's best variants raced with many samples; all finals of a variant count together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from elsa_tune.space import parse
from elsa_tune.tuning.recall import pool
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.task import Task
from elsa_tune.tuning.worker import WorkerFailed
from elsa_tune.variant import Variant

STARTERS = 2
"""Variants that stand in the final for a backend of which none was tried."""

MORE_FINALS = 2
"""Finals that a problem may have in a run, time allowing, after its first."""

REFINE_SECONDS = 5.0
"""How long a run looks further when every problem is settled already."""


def seconds_of(run: Run, task: Task) -> float:
    """What a final takes."""
    return run.effort.final(task.seconds)


def every_final(run: Run) -> None:
    """Each problem's final, in its share of the time that is left."""
    for number, task in enumerate(run.tasks):
        later = sum(seconds_of(run, other) for other in run.tasks[number + 1 :])
        wanted = seconds_of(run, task)
        final(run, task, max(0.3 * wanted, min(wanted, run.left() - later)))


def finals_again(run: Run) -> None:
    """Finals of the least certain winners again, with the time that is left."""
    open_to_finals = [t for t in run.tasks if t.incumbent and t.ranked()]
    uncertain = sorted(open_to_finals, key=lambda task: (task.finals > 0, -uncertainty(run, task)))
    for task in uncertain * MORE_FINALS:
        if seconds_of(run, task) < run.left():
            final(run, task, seconds_of(run, task))


def refine(run: Run) -> None:
    """Everything is known: race the least certain winners again for a few seconds."""
    run.deadline = min(run.deadline, time.monotonic() + REFINE_SECONDS)
    for task in sorted(run.tasks, key=lambda task: uncertainty(run, task), reverse=True):
        if run.left() > 1 + 25 * task.seconds:
            final(run, task, seconds=0.6)


def final(run: Run, task: Task, seconds: float, entrants: Sequence[Variant] = ()) -> None:
    """Race entrants, or this problem's best variants and the best of the family's other shapes, with many samples."""
    trials, problem, incumbent = run.trials, task.problem, task.incumbent
    if incumbent is None or not task.searches:
        return
    run.show(f"{problem}  final")
    with trials.alone():
        built = run.build(task, list(entrants or finalists(run, task)))
        run.note(task, filter(None, (trials.check(problem, incumbent, c) for c in built)))
        right = [c for c in built if trials.is_right(problem, c)]
        if not right:
            return
        try:
            run.note(task, trials.final(problem, incumbent, right, run.effort.rounds(task.seconds), seconds))
        except WorkerFailed as error:
            if (note := f"{problem}: the final was lost: {error.reason}") not in run.notes:
                run.notes.append(note)
    pool(run, task)


def finalists(run: Run, task: Task) -> Iterator[Variant]:
    """The best three of the problem, the best of each other shape of its family that was not tried here, and STARTERS of
    each backend of which nothing was tried."""
    chosen = task.ranked()[:3]
    for other in run.siblings(task):
        chosen += [best for best in other.ranked()[:1] if best not in task.latest]
    chosen += [str(search.best) for search in task.searches if search.best]  # in a fleet, another's
    allowed = [v for v in map(parse, dict.fromkeys(chosen)) if run.is_lawful(v, task.problem)]
    yield from allowed
    known = {variant.backend for variant in allowed}
    for search in task.searches:
        if search.backend not in known and (not search.results or not known):
            yield from search.ask(STARTERS)


def uncertainty(run: Run, task: Task) -> float:
    """Relative width of the winner's interval."""
    winner = run.winner(task)
    return float("inf") if winner is None else (winner.ratio_high - winner.ratio_low) / winner.ratio
