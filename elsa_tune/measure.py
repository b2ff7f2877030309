"""Runs kernels in a disposable worker: checks them, then times them in turns with the incumbent.

A worker that hangs, crashes or eats memory is killed and replaced; the caller learns why.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from elsa_tune import backends
from elsa_tune.backends import Built, Kernel
from elsa_tune.check import Verdict
from elsa_tune.device import host_cpu
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

T = TypeVar("T")

SAMPLE_SECONDS = 0.002
"""A sample repeats a fast call until it lasts this long."""

OUTCLASSED = 0.3
"""A contender below this share of the fastest at its first call is not timed again."""

HOPELESS = 0.8
"""A contender slower than this share of the best leaves the race after a few rounds."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A built variant in a race."""

    variant: Variant
    built: Built

    def load(self, problem: Problem) -> Kernel:
        """Its kernel, in this process."""
        return backends.get(self.variant.backend).load(self.built, self.variant, problem)


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


class WorkerFailed(Exception):
    """A job did not come back: ``status`` is failed or timeout."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def _start_worker(memory: int) -> None:
    """First thing in a new worker: its parent, the fork server, loads code and never computes."""
    from elsa_tune.backends import cpp

    cpp.Pool.parent_never_computed()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # a system without these limits still has the time-out


class Worker:
    """One process at a time that runs jobs; replaced when a job kills it or outlasts its time."""

    def __init__(self, memory: int | None = None) -> None:
        from pebble import ProcessPool

        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(["elsa_tune._worker"])
        limit = memory or max(4 << 30, host_cpu().memory // 2)
        self._pool = ProcessPool(max_workers=1, context=context, initializer=_start_worker, initargs=(limit,))

    def run(self, job: Callable[..., T], *arguments: object, timeout: float) -> T:
        """The job's result. Raises WorkerFailed; exceptions of the job itself are failures with their message."""
        from pebble import ProcessExpired

        future = self._pool.schedule(job, args=arguments, timeout=timeout)
        try:
            result: T = future.result()
            return result
        except FutureTimeout as error:
            raise WorkerFailed("timeout", f"no answer within {timeout:.0f} s; the worker was killed") from error
        except ProcessExpired as error:
            raise WorkerFailed("failed", f"the worker died with exit code {error.exitcode}") from error
        except Exception as error:
            raise WorkerFailed("failed", f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """End the process at once."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Jobs: run in the worker, never in the caller's process.


@dataclass
class _Bench:
    """Inputs of a problem in the worker: enough sets to outgrow the last-level cache, and the truth for one of them."""

    problem: Problem
    inputs: list[Any]
    rows: Any
    truth: Any
    peer_errors: dict[str, float]


@lru_cache(maxsize=1)
def _bench(problem: Problem) -> _Bench:
    import torch

    from elsa_tune import reference

    gc.collect()
    generator = torch.Generator().manual_seed(0)
    first = reference.random_inputs(problem, generator)
    count = min(1024, math.ceil(1.25 * host_cpu().last_cache / problem.bytes))
    copies = [
        reference.Inputs("copy", first.query.clone(), first.key.clone(), first.value.clone()) for _ in range(count - 1)
    ]
    rows = reference.sample_rows(problem, generator)
    return _Bench(problem, [first, *copies], rows, reference.attention_rows(problem, first, rows), {})


def check_family(problem: Problem, candidate: Contender, peers: Sequence[Contender]) -> Verdict:
    """Hostile inputs; see elsa_tune.check."""
    from elsa_tune import check

    return check.check_family(candidate.load(problem), problem, [peer.load(problem) for peer in peers])


def check_shape(problem: Problem, candidate: Contender, incumbent: Contender) -> Verdict:
    """The problem at its own size, against float64 rows and the incumbent's error."""
    from elsa_tune import check, reference

    bench = _bench(problem)

    def error_of(contender: Contender) -> tuple[reference.Error, str]:
        out, stray = check.run(contender.load(problem), bench.inputs[0])
        return reference.measure_error(problem, bench.inputs[0], bench.rows, out, bench.truth), stray

    name = str(incumbent.variant)
    if name not in bench.peer_errors:
        bench.peer_errors[name] = error_of(incumbent)[0].relative
    error, stray = error_of(candidate)
    return check.judge(f"{problem.shape}", error, stray, bench.peer_errors[name])


def race(
    problem: Problem, contenders: Sequence[Contender], rounds: int, seconds: float, beat: float = 0.0
) -> list[tuple[float, ...]]:
    """Seconds per call of each contender, in turns; the first is the incumbent.

    Order within a round is shuffled. A contender that is OUTCLASSED at its first call is not timed again; after three
    rounds, one below HOPELESS times the best ratio so far (``beat`` counts too) is dropped. Ends after ``rounds``
    rounds, or three once ``seconds`` have passed.
    """
    bench, rng = _bench(problem), random.Random(0)
    kernels = [contender.load(problem) for contender in contenders]
    turn = 0

    def timed(kernel: Kernel, repeats: int) -> float:
        nonlocal turn
        start = time.perf_counter()
        for _ in range(repeats):
            turn += 1
            x = bench.inputs[turn % len(bench.inputs)]
            kernel(x.query, x.key, x.value)
        return (time.perf_counter() - start) / repeats

    first = [timed(kernel, 1) for kernel in kernels]
    racing = [i for i, seconds_once in enumerate(first) if i == 0 or seconds_once * OUTCLASSED < min(first)]
    repeats = [
        max(1, min(1000, round(SAMPLE_SECONDS / timed(k, 1)))) if i in racing else 0 for i, k in enumerate(kernels)
    ]
    samples: list[list[float]] = [[] if i in racing else [seconds_once] for i, seconds_once in enumerate(first)]
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 3:
            medians = [statistics.median(s) for s in samples]
            best = max(beat, *(medians[0] / medians[i] for i in racing))
            racing = [i for i in racing if i == 0 or medians[0] / medians[i] >= HOPELESS * best]
            if len(racing) == 1 or time.perf_counter() > end:
                break
        for i in rng.sample(racing, len(racing)):
            samples[i].append(timed(kernels[i], repeats[i]))
    return [tuple(s) for s in samples]


def peak(seconds: float = 0.02) -> dict[str, float]:
    """This device's measured limits, all threads: multiply-add GFLOP/s and read GB/s."""
    from elsa_tune.backends import cpp

    return cpp.peak(seconds)
