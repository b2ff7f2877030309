"""Workers, checks and races: planted faults are each caught by their own mechanism, and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from planted import FAULTS, peers, planted

from elsa_tune.device import host_cpu
from elsa_tune.problem import Problem
from elsa_tune.tuning import timing
from elsa_tune.tuning.contender import check_family, check_shape
from elsa_tune.tuning.peaks import peak
from elsa_tune.tuning.race import race, ratio
from elsa_tune.tuning.worker import Worker, WorkerFailed

PROBLEM = Problem.parse("fp32.d16@b1.h2.q300.k300")

CAUGHT = {
    "healthy": None,
    "segfault": ("failed", "exit code -11"),
    "hang": ("timeout", "no answer within"),
    "eats memory": ("failed", ""),
    "writes past its output": ("wrong", "written outside the output"),
    "wrong by 1e-3": ("wrong", "of max"),
    "loses the last key": ("wrong", "of max"),
    "leaves a row unwritten": ("wrong", "error inf"),
    "swallows NaN": ("wrong", "NaN"),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(memory=2 << 30) as one:
        yield one


def verdict(worker: Worker, fault: str) -> tuple[str, str] | None:
    """(status, reason) of what stopped a planted kernel, or None."""
    try:
        limit = 8.0 if fault == "hang" else 60.0
        reason = worker.run(check_family, PROBLEM, planted(fault, PROBLEM), peers(PROBLEM), timeout=limit).reason
    except WorkerFailed as failure:
        return failure.status, failure.reason
    return ("wrong", reason) if reason else None


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught_by_its_own_mechanism(worker: Worker, fault: str) -> None:
    found, expected = verdict(worker, fault), CAUGHT[fault]
    if expected is None:
        assert found is None
    else:
        assert found is not None and found[0] == expected[0] and expected[1] in found[1]


def test_the_worker_serves_on_after_every_fault(worker: Worker) -> None:
    for fault in ("segfault", "hang", "healthy"):
        verdict(worker, fault)
    assert verdict(worker, "healthy") is None


def test_who_waits_for_a_worker_that_is_ended_learns_of_it() -> None:
    """One job runs, one waits for its turn; nobody waits for ever."""
    with Worker() as one, ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(one.run, time.sleep, 60.0, timeout=100.0) for _ in range(2)]
        time.sleep(0.2)
        one.renew()
        for job in waiting:
            with pytest.raises(WorkerFailed, match="given up"):
                job.result(timeout=20)
        assert one.run(divmod, 7, 2, timeout=30.0) == (3, 1)


def test_exceptions_of_a_job_are_failures_with_their_message(worker: Worker) -> None:
    with pytest.raises(WorkerFailed, match="ZeroDivisionError"):
        worker.run(divmod, 1, 0, timeout=5.0)


def test_shape_check_sees_what_small_shapes_hide(worker: Worker) -> None:
    flash = peers(PROBLEM)[0]
    assert worker.run(check_shape, PROBLEM, planted("healthy", PROBLEM), flash, timeout=30.0).reason == ""
    assert "of max" in worker.run(check_shape, PROBLEM, planted("wrong by 1e-3", PROBLEM), flash, timeout=30.0).reason


def test_race_takes_turns_and_drops_the_hopeless(worker: Worker) -> None:
    contenders = [*peers(PROBLEM), planted("healthy", PROBLEM)]
    samples = worker.run(race, PROBLEM, contenders, 6, 10.0, timeout=60.0).samples
    assert len(samples) == 3 and len(samples[0]) == 6
    assert all(len(s) == 1 or 3 <= len(s) <= 6 for s in samples), (
        "outclassed at once, hopeless after three, or to the end"
    )
    stopped = worker.run(race, PROBLEM, contenders[:1] + contenders[2:], 6, 10.0, 1e9, timeout=60.0).samples
    assert len(stopped[1]) in (1, 3), "far below the ratio to beat: timed three times only, or outclassed at once"


@pytest.mark.parametrize("lost", [0, 2])
def test_who_cannot_be_launched_loses_alone(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """The others are raced, the reason is told; where it is the first, the next is compared with."""
    contenders = [*peers(PROBLEM), planted("healthy", PROBLEM)]
    made: list[int] = []
    timer = timing.timer

    def refused(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == lost + 1:
            try:
                raise ValueError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("capture ended badly")
        return timer(*arguments)

    monkeypatch.setattr(timing, "timer", refused)
    raced = race(PROBLEM, contenders, 4, 10.0)
    assert set(raced.failed) == {lost} and raced.samples[lost] == ()
    assert "capture ended badly" in raced.failed[lost] and "not permitted" in raced.failed[lost]
    assert all(s for i, s in enumerate(raced.samples) if i != lost) and len(raced.disturbed) == 3


def test_a_race_of_nobody_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Any:
        raise ValueError("planted")

    monkeypatch.setattr(timing, "timer", refused)
    with pytest.raises(RuntimeError, match="nobody could be timed: ValueError: planted"):
        race(PROBLEM, peers(PROBLEM), 4, 1.0)


def test_peaks_are_plausible(worker: Worker) -> None:
    found = worker.run(peak, host_cpu(), timeout=60.0)
    assert 1 < found["gflops"] < 1e5 and 0.1 < found["gbytes"] < 1e4


def test_ratio_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    speed = rng.lognormal(0, 0.05, 200)
    found = ratio(list(2.0 * speed * rng.lognormal(0, 0.02, 200)), list(speed))
    assert found.low <= found.median <= found.high and abs(found.median - 2) < 0.02 and found.high - found.low < 0.05
    assert ratio([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).low == 1


def test_drift_cancels() -> None:
    """A machine that slows down threefold while measuring slows both: the ratio stays."""
    drift = np.linspace(1, 3, 50)
    found = ratio(list(1.5 * drift), list(drift))
    assert found.low == pytest.approx(1.5) == found.high


def test_covering_the_truth() -> None:
    """The 95 % interval holds the true ratio in most of many noisy races."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        base = rng.lognormal(0, 0.1, 25)
        found = ratio(list(1.3 * rng.lognormal(0, 0.03, 25) * base), list(base))
        held += found.low <= 1.3 <= found.high
    assert held >= 85
