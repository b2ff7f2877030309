"""What is known before a run begins: this device's own measurements, and what its kin and other shapes suggest to try first."""

from __future__ import annotations

from elsa_tune.device import Device
from elsa_tune.errors import BadVariant
from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.layers import known_winners, layers
from elsa_tune.space import parse
from elsa_tune.tuning import drift
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.task import Task
from elsa_tune.tuning.trial import Incumbent


def recall(run: Run, task: Task) -> None:
    """Begin from every measurement of this device, and from winners of its kin and of the family's other shapes."""
    database, device, problem = run.database, run.device, task.problem
    era = drift.era(database, device, str(problem))
    for m in database.measurements(local=True, device=str(device), problem=str(problem)):
        if m.provenance.get("era", 0) != era or is_of_other_code(problem, m):
            suggest(run, task, m.variant)
            continue
        task.note(m)
        if m.no_verdict:
            suggest(run, task, m.variant)
        elif m.variant == m.incumbent and m.seconds and not m.disturbed:
            task.incumbent = Incumbent(run.trials.contender(parse(m.variant), problem), m.seconds)
        elif m.status == "ok":
            suggest(run, task, m.variant)
    pool(run, task)
    task.target = run.effort.target(task.seconds, device.is_gpu, task.weight) if task.searches else 0
    for winner in known_winners(device, layers(), family=problem.family):
        suggest(run, task, winner.variant)
    for m in database.measurements(local=False, problem=str(problem), status="ok"):
        if device.kinship(Device.parse(m.device)) not in (None, "family"):  # imported: to be tried here
            suggest(run, task, m.variant)
    for m in database.measurements(status="candidate", family=problem.family):
        if device.kinship(Device.parse(m.device)) not in (None, "family"):  # ranked for this architecture
            suggest(run, task, m.variant)


def pool(run: Run, task: Task) -> None:
    """Learn what all finals of each variant say together."""
    task.pool(run.database.evidence(True, device=str(run.device), problem=str(task.problem)))


def is_of_other_code(problem: Problem, m: Measurement) -> bool:
    """Whether the templates have changed since in what they render for this variant: then it is tried anew."""
    try:
        variant = parse(m.variant)
    except BadVariant:
        return False
    now = backends.get(variant.backend).source(variant, problem)
    return now is not None and m.provenance.get("source", now.digest) != now.digest


def suggest(run: Run, task: Task, spelling: str) -> None:
    """Enqueue a variant known from elsewhere, if this space still has it and the laws allow it here."""
    try:
        variant = parse(spelling)
    except BadVariant:
        return
    for search in task.searches:
        if variant.backend == search.backend and run.is_lawful(variant, task.problem):
            search.enqueue([variant])
