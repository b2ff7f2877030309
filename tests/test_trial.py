"""Trials on a machine that is busy: what is a verdict, what is tried again, and what a run's end cuts off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import peers, planted, variant_of

from elsa_tune.device import host_cpu
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.remember.database import Database
from elsa_tune.tuning import noise, recall
from elsa_tune.tuning.contender import check_family, check_shape
from elsa_tune.tuning.effort import EFFORTS
from elsa_tune.tuning.noise import Heard
from elsa_tune.tuning.peaks import clocks, peak
from elsa_tune.tuning.race import Raced, race
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.search import searches
from elsa_tune.tuning.task import Task
from elsa_tune.tuning.trial import Incumbent, OutOfTime, Trials
from elsa_tune.tuning.worker import WorkerFailed

PROBLEM = Problem.parse("fp32.d16@b1.h2.q300.k300")
HERE = host_cpu()


class Hanging:
    """A worker in which every race of a candidate hangs, alone or among others."""

    def __init__(self, hangs: str = "") -> None:
        self.hangs, self.races = hangs, list[int]()

    def run(self, job: Any, *arguments: Any, timeout: float) -> Any:
        if job in (check_family, check_shape):
            return Verdict(1e-7, 0.5)
        assert job is race
        self.races.append(len(arguments[1]))
        if any(str(c.variant) == self.hangs for c in arguments[1]):
            raise WorkerFailed("timeout", "no answer")
        return Raced([(1e-3,) * 3] * len(arguments[1]), [0.0] * len(arguments[1]))


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    with Database.for_writing() as one:
        yield one


def said(monkeypatch: pytest.MonkeyPatch, wanted: float) -> None:
    """What is heard of others."""
    monkeypatch.setattr(noise.Listener, "heard", lambda self: Heard(1.0, 0.0, wanted, 0.0))


@pytest.mark.parametrize(("wanted", "verdict"), [(0.0, True), (1.0, False)])
def test_a_time_out_is_a_verdict_on_a_quiet_machine_only(
    database: Database, monkeypatch: pytest.MonkeyPatch, wanted: float, verdict: bool
) -> None:
    said(monkeypatch, wanted)
    hanging, flash = planted("healthy", PROBLEM), peers(PROBLEM)[0]
    trials = Trials(database, Hanging(str(hanging.variant)), HERE)  # type: ignore[arg-type]
    (row,) = trials.trial(PROBLEM, Incumbent(flash, 1e-3), [hanging], 1.0)
    assert [row] == database.measurements(status="timeout")
    assert row.no_verdict != verdict and trials.late == ([] if verdict else [(PROBLEM, hanging.variant)])
    task = Task(PROBLEM, searches(PROBLEM, HERE, []))
    run = Run(trials, EFFORTS["quick"], 0.0, 0.0, lambda p: None, [], [task])
    recall.recall(run, task)
    asked = [str(v) for v in task.searches[0].ask(30)]
    assert (variant_of(PROBLEM) in asked) != verdict and task.trials == int(verdict)


def test_one_that_hangs_among_others_is_found(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    said(monkeypatch, 0.0)
    healthy, (flash, other) = planted("healthy", PROBLEM), peers(PROBLEM)
    worker = Hanging(str(healthy.variant))
    trials = Trials(database, worker, HERE)  # type: ignore[arg-type]
    told = list(trials.trial(PROBLEM, Incumbent(flash, 1e-3), [healthy, other], 1.0))
    assert worker.races == [3, 2, 2] and told == list(database)
    assert {m.variant: m.status for m in database} == {str(healthy.variant): "timeout", str(other.variant): "ok"}


def test_who_is_not_captured_is_recorded_alone(database: Database) -> None:
    healthy, (flash, other) = planted("healthy", PROBLEM), peers(PROBLEM)

    class Refusing(Hanging):
        def run(self, job: Any, *arguments: Any, timeout: float) -> Any:
            if job in (peak, clocks):
                return {}
            raced = super().run(job, *arguments, timeout=timeout)
            if job is race:
                lost = [c.variant for c in arguments[1]].index(healthy.variant)
                raced.failed[lost], raced.samples[lost] = "RuntimeError: not captured", ()
            return raced

    trials = Trials(database, Refusing(), HERE)  # type: ignore[arg-type]
    best = Incumbent(flash, 1e-3)
    told = [*trials.trial(PROBLEM, best, [healthy, other], 1.0), *trials.final(PROBLEM, best, [other, healthy], 5, 1.0)]
    assert {m.id for m in told} == {m.id for m in database}
    found = {(m.variant, m.stage, m.status, m.reason) for m in database}
    lost = str(healthy.variant)
    assert (lost, "trial", "failed", "RuntimeError: not captured") in found and len({v for v, *_ in found}) == 3
    assert {stage for v, stage, status, _ in found if v == str(other.variant) and status == "ok"} == {"trial", "final"}
    with pytest.raises(WorkerFailed, match=r"cpp\..*not captured"):
        list(trials.final(PROBLEM, Incumbent(healthy, 1e-3), [other], 5, 1.0))


def test_builds_that_the_end_cuts_off_say_nothing(database: Database) -> None:
    class Slow:
        def run(self, job: Any, *arguments: Any, timeout: float) -> Any:
            raise WorkerFailed("timeout", f"no answer within {timeout:.0f} s")

    variant = planted("healthy", PROBLEM).variant
    late = Trials(database, Hanging(), HERE, builders=Slow(), deadline=time.monotonic() + 3)  # type: ignore[arg-type]
    assert late.build(PROBLEM, [variant]) == ([], []) and len(database) == 0
    early = Trials(database, Hanging(), HERE, builders=Slow())  # type: ignore[arg-type]
    built, (lost,) = early.build(PROBLEM, [variant])
    assert built == [] and [lost] == list(database) and lost.status == "failed"


def test_what_the_end_of_a_run_cuts_off_is_not_recorded(database: Database) -> None:
    healthy, flash = planted("healthy", PROBLEM), peers(PROBLEM)[0]
    trials = Trials(database, Hanging(str(healthy.variant)), HERE, deadline=time.monotonic() + 1)  # type: ignore[arg-type]
    with pytest.raises(OutOfTime):
        list(trials.trial(PROBLEM, Incumbent(flash, 1e-3), [healthy], 1.0))
    assert len(database) == 0


def test_a_worse_day_changes_no_ranking() -> None:
    """What a task takes for the best is what all finals say, once they are pooled."""
    facts: dict[str, Any] = dict(
        device=str(HERE), problem=str(PROBLEM), status="ok", stage="final", incumbent="sdpa.flash"
    )
    days = [("cpp.a", 1.30, 1.0), ("cpp.b", 1.2, 1.0), ("cpp.a", 0.9, 2.0)]
    rows = [
        Measurement(
            **facts, variant=v, ratio=r, ratio_low=r - (0.02 if day == 1 else 0.5), ratio_high=r + 0.02, created=day
        )
        for v, r, day in days
    ]
    task = Task(PROBLEM, [])
    for row in rows:
        task.note(row)
    assert task.ranked() == ["cpp.b", "cpp.a"], "the newest alone"
    task.pool(Database.in_memory(rows, "test").evidence())
    assert task.ranked() == ["cpp.a", "cpp.b"] and 1.25 < task.best < 1.3
