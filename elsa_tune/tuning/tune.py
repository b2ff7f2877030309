"""The whole story: problems and a device in, measured winners out.

recall -> incumbent -> ask -> build -> check -> race -> record, again and again -> finals -> winners
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from elsa_tune import workload as workloads
from elsa_tune.device import Device, detect, host_cpu
from elsa_tune.errors import ElsaTuneError, shown
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.remember.layers import listeners, refresh_all
from elsa_tune.space import parse
from elsa_tune.tuning import drift
from elsa_tune.tuning.canaries import look_for_drift
from elsa_tune.tuning.effort import EFFORTS
from elsa_tune.tuning.final import every_final, final, finals_again, refine, seconds_of
from elsa_tune.tuning.fleet import Fleet
from elsa_tune.tuning.recall import recall
from elsa_tune.tuning.report import Outcome, Report
from elsa_tune.tuning.run import GRACE, Run
from elsa_tune.tuning.search import searches
from elsa_tune.tuning.task import Progress, Task
from elsa_tune.tuning.trial import OutOfTime, Trials
from elsa_tune.tuning.turn import HARDLY, try_late_ones_again, turn
from elsa_tune.tuning.worker import Worker, WorkerFailed

BUDGET = 180.0
MOST_NAMED = 5
"""Problems that a note names."""


def tune(
    problems: Sequence[Problem | str] | Mapping[Problem, float] | None = None,
    *,
    workload: str = "default",
    device: str = "auto",
    budget: float = BUDGET,
    effort: str = "quick",
    seed: int = 0,
    sampler: str = "local",
    exhaustive: bool = False,
    storage: str = "",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Find the fastest exact kernel for each problem on each device, and record everything that was measured.

    ``problems`` are Problems or their spellings, or a mapping from Problems to weights, to which their trials are proportional; without them
    the workload's. ``budget`` is wall seconds, compiling included. ``effort`` is quick or full; ``sampler`` local, tpe or random;
    ``exhaustive`` walks the whole space instead. ``storage`` shares the search with every machine of this model that names it
    (elsa_tune.tuning.fleet.open_storage). Raises FleetUnreachable, BadProblem, BadWorkload, BadDevice, DatabaseUnusable. May be stopped at any
    moment: what is recorded stays. Its workers are processes, for which a script needs no ``__main__`` guard.
    """
    if effort not in EFFORTS:
        raise ElsaTuneError(f"effort {effort!r} is unknown; use one of {', '.join(EFFORTS)}")
    start, notes, outcomes = time.monotonic(), list[str](), list[Outcome]()
    devices = detect(device)
    notes += refresh_all()
    with Database.for_writing() as database:
        for number, here in enumerate(devices):
            wanted = _weighted(problems or workloads.read(workload, here))
            share = (budget - (time.monotonic() - start)) / (len(devices) - number)
            with ExitStack() as stack:
                fleet = stack.enter_context(Fleet(storage, database.installation, here)) if storage else None
                look = partial(searches, device=here, notes=notes, sampler=sampler, seed=seed, exhaustive=exhaustive)
                tasks = [Task(p, look(p, fleet=fleet), weight) for p, weight in wanted.items()]
                _tune(stack.enter_context(running(database, here, effort, share, watch, notes, tasks)))
            outcomes += [Outcome.of(database, p, here) for p in wanted]
    return _reported(outcomes, start, notes)


def _weighted(given: Sequence[Problem | str] | Mapping[Problem, float]) -> dict[Problem, float]:
    """Each problem once, with a weight that is 1 on average. Raises BadProblem, ElsaTuneError."""
    each = given.items() if isinstance(given, Mapping) else ((problem, 1.0) for problem in given)
    weights = {p if isinstance(p, Problem) else Problem.parse(p): weight for p, weight in each}
    if wrong := [weight for weight in weights.values() if not 0 < weight < float("inf")]:
        raise ElsaTuneError(f"problems have the weight {shown(wrong[0])}; give each a number above 0")
    mean = sum(weights.values()) / len(weights)
    return {problem: weight / mean for problem, weight in weights.items()}


def settle(
    device: str = "auto", *, budget: float = BUDGET, watch: Callable[[Progress], None] = lambda progress: None
) -> Report:
    """Time what was imported for these devices, or is disputed, against this machine's best and torch; record the results.

    Raises BadDevice, DatabaseUnusable.
    """
    start, notes, outcomes = time.monotonic(), list[str](), list[Outcome]()
    with Database.for_writing() as database:
        for here in detect(device):
            contested = drift.contested(database, here)
            tasks = [Task(p, searches(p, here, notes)) for p in map(Problem.parse, contested)]
            left = budget - (time.monotonic() - start)
            with running(database, here, "quick", left, watch, notes, tasks) as run:
                _settle(run, contested)
            outcomes += [Outcome.of(database, task.problem, here) for task in tasks]
    return _reported(outcomes, start, notes)


def _reported(outcomes: list[Outcome], start: float, notes: list[str]) -> Report:
    for changed in listeners:
        changed()
    return Report(outcomes, time.monotonic() - start, notes)


@contextmanager
def running(
    database: Database, device: Device, effort: str, seconds: float, watch: Callable[[Progress], None],
    notes: list[str], tasks: list[Task],
) -> Iterator[Run]:  # fmt: skip
    """One device's run, with the processes that build and time for it."""
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(memory=0 if device.is_gpu else None))
        builders = stack.enter_context(Worker(count=host_cpu().cores)) if device.is_gpu else None
        trials = Trials(database, worker, device, builders=builders, thorough=effort == "full")
        yield Run(trials, EFFORTS[effort], time.monotonic() + seconds, seconds, watch, notes, tasks)


def _tune(run: Run) -> None:
    """Incumbents, then trials where most are missing, then finals; refinement where nothing is missing."""
    run.give_up_after(run.grace)
    run.tasks.sort(key=lambda task: task.problem.flops + 20 * task.problem.bytes)
    with suppress(OutOfTime):
        for task in run.tasks:
            recall(run, task)
        for task in run.tasks:
            _find_incumbent(run, task)
        run.trials.find_peaks()
        look_for_drift(run)
        if all(task.settled for task in run.tasks):
            refine(run)
            return
        reserve = min(0.4 * run.budget, sum(seconds_of(run, task) for task in run.tasks))
        run.give_up_after(-0.5 * reserve)
        with suppress(OutOfTime):
            _search(run, reserve)
            try_late_ones_again(run, reserve)
        run.give_up_after(run.grace)
        every_final(run)
        finals_again(run)
    _say_what_was_not_done(run)


def _find_incumbent(run: Run, task: Task) -> None:
    """Time torch's own kernels, unless it is known which is the fastest."""
    if task.incumbent is not None:
        return
    if task.problem.bytes > run.device.memory > 0:
        gib = f"{task.problem.bytes / (1 << 30):.0f} GiB, of which this device has {run.device.memory >> 30}"
        run.notes.append(f"{task.problem}: its tensors take {gib}; give a smaller one, or fewer at a time")
        return
    run.show(f"{task.problem}  torch's own kernels")
    try:
        with run.trials.alone():
            incumbent, came_to = run.trials.incumbent(task.problem)
            run.note(task, came_to)
            task.incumbent = incumbent
    except WorkerFailed as error:
        run.notes.append(f"{task.problem}: torch's own kernels could not be timed: {error.reason}")
    task.target = run.effort.target(task.seconds, run.device.is_gpu, task.weight) if task.searches else 0


def _search(run: Run, reserve: float) -> None:
    """Turns, for the problem that most are missing of, until only finals can still be run."""
    while run.left() > reserve and (waiting := [t for t in run.tasks if t.wants_trials]):
        turn(run, min(waiting, key=lambda task: task.trials / task.target), reserve)


def _settle(run: Run, contested: dict[str, list[str]]) -> None:
    """Settle what others measured: their variants against this machine's best and torch."""
    run.give_up_after(run.grace)
    with suppress(OutOfTime):
        for number, task in enumerate(run.tasks):
            recall(run, task)
            _find_incumbent(run, task)
            spellings = task.ranked()[:1] + contested[str(task.problem)]
            share = run.left() / (len(run.tasks) - number)
            entrants = [v for v in map(parse, dict.fromkeys(spellings)) if run.is_lawful(v, task.problem)]
            if entrants and run.left() > 0:
                final(run, task, min(share, seconds_of(run, task)), entrants)


def _say_what_was_not_done(run: Run) -> None:
    wanted = min(HARDLY, run.effort.trials)
    if few := [f"{t.problem} ({t.trials})" for t in run.tasks if t.trials < min(wanted, t.target)]:
        few = [*few[:MOST_NAMED], *([f"{len(few) - MOST_NAMED} more"] if len(few) > MOST_NAMED else [])]
        run.notes.append(f"time for fewer than {HARDLY} variants: {', '.join(few)}; a longer --budget tries more")
    if run.trials.waited > GRACE * run.budget:
        run.notes.append(f"waited {run.trials.waited:.0f} s for another elsa-tune that used this machine")
    if busy := [str(task.problem) for task in run.tasks if task.busy and not task.finals]:
        run.notes.append(f"others used this machine; not settled: {', '.join(busy)}; run again when it is quiet")
