"""Times contenders in turns with the incumbent, a job for a worker, and says how many times faster they are."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from elsa_tune.device import Device
from elsa_tune.problem import Problem
from elsa_tune.tuning import noise, telemetry, timing
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.workbench import workbench

SAMPLE_SECONDS = 0.002
"""A sample repeats a fast call until it lasts this long."""

OUTCLASSED = 0.3
"""A contender below this share of the fastest at its first call is not timed again."""

LAGS = 0.6
"""A contender below this share of the best after the first round leaves the race."""

HOPELESS = 0.8
"""A contender slower than this share of the best leaves the race after a few rounds."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster than the incumbent: median and 95 % interval over rounds."""

    median: float
    low: float
    high: float


def ratio(incumbent: Sequence[float], candidate: Sequence[float], resamples: int = 1000) -> Ratio:
    """Median of the round-by-round ratios with a bootstrap interval (Efron 1979), seeded."""
    pairs = np.array(incumbent[: len(candidate)]) / np.array(candidate)
    draws = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.percentile(np.median(pairs[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(pairs)), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Raced:
    """Seconds per call of each contender, and the share of its rounds that others disturbed; why some could not take part
    (they have no samples); what a GPU said of its clocks and power meanwhile."""

    samples: list[tuple[float, ...]]
    disturbed: list[float]
    failed: dict[int, str] = field(default_factory=dict)
    reading: dict[str, float] = field(default_factory=dict)


def race(problem: Problem, contenders: Sequence[Contender], rounds: int, seconds: float, beat: float = 0.0) -> Raced:
    """Time contenders in turns; the first is the incumbent, or the first of those that can be launched as the problem says.

    Order within a round is shuffled. A contender that is OUTCLASSED at its first call is not timed again, one that LAGS
    after a round neither; after three rounds, one below HOPELESS times the best ratio so far (``beat`` counts too) is
    dropped. Ends after ``rounds`` rounds, or three once ``seconds`` have passed. On a CPU, a sample that others disturbed
    is taken again, for up to half as long. One that raises when it is first called, or cannot be captured in a graph, loses
    alone. Raises RuntimeError where none is left, or the GPU's context is.
    """
    made, rng = workbench(problem, contenders[0].device), random.Random(0)

    def calls(kernel: Callable[..., object]) -> list[Callable[[], object]]:
        return [partial(kernel, *x.tensors, **({"operands": x.operands} if x.operands else {})) for x in made.inputs]

    before = () if contenders[0].device.is_gpu else made.written()
    reader = telemetry.Gauge(contenders[0].device)
    timers, failed = dict[int, timing.Timer](), dict[int, str]()
    first = dict[int, float]()
    for i, c in enumerate(contenders):
        try:
            timers[i] = timing.timer(calls(c.load(problem)), c.device, problem.launch, before, reader.read)
            first[i] = timers[i](1)
        except Exception as error:
            timing.survive(c.device, f"{c.variant}: {_whole_story(error)}")
            failed[i] = _whole_story(error)
    if not first:
        raise RuntimeError(f"nobody could be timed: {next(iter(failed.values()))}")
    base = min(first)
    for i, once in first.items():  # a call that was held up proves nothing
        if i != base and once * OUTCLASSED >= min(first.values()):
            first[i] = min(once, timers[i](1))
    fastest = min(first.values())
    racing = [i for i, once in first.items() if i == base or once * OUTCLASSED < fastest]
    repeats = {i: _repeats(timers[i], first[i]) for i in racing}
    samples: list[list[float]] = [[first[i]] if i in first and i not in racing else [] for i in range(len(contenders))]
    with _Referee(0.5 * seconds, contenders[0].device) as referee:
        end = time.perf_counter() + seconds
        for number in range(rounds):
            if number == 1 or number >= 3:
                medians = {i: statistics.median(samples[i]) for i in racing}
                least = LAGS * max(medians[base] / medians[i] for i in racing)
                if number >= 3:
                    least = HOPELESS * max(beat, least / LAGS)
                racing = [i for i in racing if i == base or medians[base] / medians[i] >= least]
                if len(racing) == 1 or (number >= 3 and time.perf_counter() > end):
                    break
            for i in rng.sample(racing, len(racing)):
                samples[i].append(referee.sample(i, partial(timers[i], repeats[i])))
        return Raced([tuple(s) for s in samples], referee.disturbed(samples, base), failed, reader.summary())


def _whole_story(error: BaseException) -> str:
    """An exception, and what went wrong before it: a broken capture fails again when it is ended."""
    first = error
    while (earlier := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = earlier
    told = f"{type(error).__name__}: {error}"
    return told if first is error else f"{told}; before that, {type(first).__name__}: {first}"


def _repeats(timer: timing.Timer, once: float) -> int:
    """Calls in a sample, by one that is warm; a slow call is a sample by itself."""
    return 1 if once > 4 * SAMPLE_SECONDS else max(1, min(1000, round(SAMPLE_SECONDS / timer(1))))


class _Referee:
    """Takes samples, again where others disturbed them, for at most ``patience`` seconds; a GPU keeps time for itself."""

    def __init__(self, patience: float, device: Device) -> None:
        self._patience = patience
        self._listener = noise.Listener() if device.kind == "cpu" else None
        self._whole = noise.Listener() if device.kind == "cpu" else None
        self._held_up: list[tuple[int, int]] = []  # contender, number of its sample
        self._taken: dict[int, int] = {}

    def sample(self, contender: int, take: Callable[[], float]) -> float:
        number = self._taken[contender] = self._taken.get(contender, -1) + 1
        if self._listener is None:
            return take()
        while True:
            self._listener.heard()
            found = take()
            heard = self._listener.heard()
            if not heard.disturbed:
                return found
            self._patience -= heard.seconds
            if self._patience < 0:
                self._held_up.append((contender, number))
                return found

    def disturbed(self, samples: Sequence[Sequence[float]], base: int = 0) -> list[float]:
        """The share of each contender's rounds in which it or the incumbent was held up; all, if others wanted the machine."""
        if self._whole is not None and self._whole.heard().busy:
            return [1.0] * len(samples)
        rounds = [{n for i, n in self._held_up if i in (base, contender)} for contender in range(len(samples))]
        return [
            len([n for n in held if n < len(own)]) / max(1, len(own)) for held, own in zip(rounds, samples, strict=True)
        ]

    def __enter__(self) -> _Referee:
        return self

    def __exit__(self, *exception: object) -> None:
        for listener in (self._listener, self._whole):
            if listener is not None:
                listener.close()
