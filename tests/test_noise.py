"""Listening to the machine: what counts as disturbed, and that what a system does not say stays silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elsa_tune.device import host_cpu
from elsa_tune.tuning import noise
from elsa_tune.tuning.noise import Heard, Listener, _Counters
from elsa_tune.tuning.race import _Referee

PRESSURE = Path("/proc/pressure/cpu")


def told(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, *readings: tuple[float, list[float], float, float]
) -> None:
    """The counters of a machine that nobody has, from nothing on."""
    each = (_Counters(*reading) for reading in readings)
    listener._before = _Counters(0.0, [0.0] * len(readings[0][1]), 0.0, 0.0)
    monkeypatch.setattr(listener, "_read", lambda: next(each))


def test_what_is_disturbed_and_what_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener() as listener:
        listener._cores = 2
        told(
            listener,
            monkeypatch,
            (1.0, [0.001, 0.0], 0.01, 0.0),
            (2.0, [0.2, 0.0], 0.02, 0.0),
            (3.0, [0.2, 0.0], 1.0, 0.0),
            (4.0, [0.2, 0.0], 1.0, 0.2),
        )
        found = [listener.heard() for _ in range(4)]
    assert [h.disturbed for h in found] == [False, True, False, True]
    assert [h.busy for h in found] == [False, False, True, True]


def test_many_threads_that_each_wait_for_an_instant_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener() as listener:
        told(listener, monkeypatch, (1.0, [0.01] * 64, 0.0, 0.0), (2.0, [0.01] * 63 + [0.06], 0.0, 0.0))
        assert [listener.heard().disturbed for _ in range(2)] == [False, True]


def test_a_system_that_says_nothing_is_taken_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Linux's counters nor getrusage."""

    def absent(path: str, flags: int) -> int:
        raise FileNotFoundError(path)

    monkeypatch.setattr(noise.os, "open", absent)
    monkeypatch.setattr(noise, "_switches", lambda: 0)
    with Listener() as listener:
        heard = listener.heard()
    assert not heard.disturbed and not heard.busy and heard.seconds > 0


def test_a_thread_that_ends_is_no_error() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with Listener() as listener:
        done.set()
        thread.join()
        assert listener.heard().seconds > 0


@pytest.mark.skipif(not PRESSURE.exists(), reason="this kernel does not count pressure")
def test_more_work_than_cores_is_heard() -> None:
    """Threads that wait for a core, whoever's they are."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.5)  # they start
        with Listener() as listener:
            time.sleep(1.0)
            heard = listener.heard()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert heard.busy and heard.wanted > 0.5


def test_a_disturbed_sample_is_taken_again_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    calm, held = Heard(0.1, 0.0, 0.0, 0.0), Heard(0.1, 0.5, 0.0, 0.0)
    taken = iter(float(n) for n in range(10))
    with _Referee(0.25, host_cpu()) as referee:
        assert referee._listener is not None and referee._whole is not None
        said = iter([calm, held, calm, calm, *[calm, held] * 2, calm, calm])
        monkeypatch.setattr(referee._listener, "heard", lambda: next(said))
        monkeypatch.setattr(referee._whole, "heard", lambda: calm)
        samples = [referee.sample(who, lambda: next(taken)) for who in (0, 1, 0)]
        assert samples == [1.0, 3.0, 4.0], "again once, then twice until patience ends, then an undisturbed one"
        assert referee.disturbed([[1.0, 4.0], [3.0]]) == [0.0, 1.0]
        monkeypatch.setattr(referee._whole, "heard", lambda: Heard(1.0, 0.0, 1.0, 0.0))
        assert referee.disturbed([[1.0, 4.0], [3.0]]) == [1.0, 1.0], "a busy machine disturbs everyone"
