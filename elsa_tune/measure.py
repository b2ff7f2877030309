"""Runs kernels in a disposable worker: checks them, then times them in turns with the incumbent.

A worker that hangs, crashes or eats memory is killed and replaced; the caller learns why.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from elsa_tune import backends, clock
from elsa_tune.backends import Built
from elsa_tune.check import Verdict
from elsa_tune.device import Device, host_cpu
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
    """A variant built for a device, in a race."""

    variant: Variant
    built: Built
    device: Device

    def load(self, problem: Problem) -> Any:
        """Its kernel, or gradients, in this process."""
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

        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # a system without these limits still has the time-out


class Worker:
    """``count`` processes that run jobs; one is replaced when a job kills it, outlasts its time or breaks its GPU.

    ``memory`` bounds the bytes a process may take, half of the machine's by default; 0 leaves it unbounded, as GPU
    drivers need, which reserve addresses without using them.
    """

    def __init__(self, memory: int | None = None, count: int = 1) -> None:
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(["elsa_tune._worker"])
        limit = max(4 << 30, host_cpu().memory // 2) if memory is None else memory
        self._options: dict[str, Any] = {
            "max_workers": count, "context": context, "initializer": _start_worker, "initargs": (limit,),
        }  # fmt: skip
        self._start()

    def _start(self) -> None:
        from pebble import ProcessPool

        self._pool = ProcessPool(**self._options)

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
            if any(name in str(error) for name in ("CUDA error", "HIP error", "Triton Error")):
                self.close()  # the process's GPU context may be lost for good: start another
                self._start()
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
def _bench(problem: Problem, device: Device) -> _Bench:
    import torch

    from elsa_tune import reference

    gc.collect()
    generator = torch.Generator().manual_seed(0)
    first = reference.random_inputs(problem, generator).to(device.torch)
    if problem.direction == "backward":
        first = reference.with_forward(problem, first, generator)
    count = min(1024, math.ceil(1.25 * device.last_cache / problem.bytes))
    copies = [first.with_tensors(torch.clone) for _ in range(count - 1)]
    rows = reference.sample_rows(problem, generator)
    return _Bench(problem, [first, *copies], rows, reference.attention_rows(problem, first, rows), {})


def build(variant: Variant, problem: Problem, device: Device) -> Built:
    """Build apart from the caller's process: a compiler that crashes takes nobody with it."""
    os.environ.pop("TRITON_INTERPRET", None)  # whoever asks for a device means its compiler
    return backends.get(variant.backend).build(variant, problem, device)


def check_family(problem: Problem, candidate: Contender, peers: Sequence[Contender]) -> Verdict:
    """Hostile inputs; see elsa_tune.check."""
    from elsa_tune import check

    kernels = [peer.load(problem) for peer in peers]
    longest = check.longest(candidate.variant, problem, candidate.device)
    return check.check_family(candidate.load(problem), problem, kernels, device=candidate.device.torch, longest=longest)


def check_shape(problem: Problem, candidate: Contender, incumbent: Contender) -> Verdict:
    """The problem at its own size, against float64 rows and the incumbent's error."""
    from elsa_tune import check, reference

    bench = _bench(problem, candidate.device)

    def error_of(contender: Contender) -> tuple[reference.Error, str]:
        if problem.direction == "backward":
            return check.gradient_error(contender.load(problem), problem, bench.inputs[0]), ""
        out, stray = check.run(contender.load(problem), bench.inputs[0])
        return reference.measure_error(problem, bench.inputs[0], bench.rows, out, bench.truth), stray

    name = str(incumbent.variant)
    if name not in bench.peer_errors:
        bench.peer_errors[name] = error_of(incumbent)[0].relative
    error, stray = error_of(candidate)
    return check.judge(problem, f"{problem.shape}", error, stray, bench.peer_errors[name])


def race(
    problem: Problem, contenders: Sequence[Contender], rounds: int, seconds: float, beat: float = 0.0
) -> list[tuple[float, ...]]:
    """Seconds per call of each contender, in turns; the first is the incumbent.

    Order within a round is shuffled. A contender that is OUTCLASSED at its first call is not timed again; after three
    rounds, one below HOPELESS times the best ratio so far (``beat`` counts too) is dropped. Ends after ``rounds``
    rounds, or three once ``seconds`` have passed.
    """
    bench, rng = _bench(problem, contenders[0].device), random.Random(0)

    def calls(kernel: Callable[..., object]) -> list[Callable[[], object]]:
        return [partial(kernel, *x.tensors) for x in bench.inputs]

    timers = [clock.timer(calls(c.load(problem)), c.device, problem.launch) for c in contenders]
    first = [timer(1) for timer in timers]
    racing = [i for i, seconds_once in enumerate(first) if i == 0 or seconds_once * OUTCLASSED < min(first)]
    repeats = [
        max(1, min(1000, round(SAMPLE_SECONDS / timer(1)))) if i in racing else 0 for i, timer in enumerate(timers)
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
            samples[i].append(timers[i](repeats[i]))
    return [tuple(s) for s in samples]


def peak(device: Device, seconds: float = 0.02) -> dict[str, float]:
    """The device's measured limits, all threads: GFLOP/s of each kind of product, and read GB/s (``gbytes``);
    nothing for an OpenCL device."""
    if device.is_gpu:
        return clock.gpu_peak(device, seconds)
    if device.kind != "cpu":
        return {}
    from elsa_tune.backends import cpp

    return cpp.peak(seconds)


def state(device: Device) -> dict[str, float]:
    """What the device says of its clocks and temperature; nothing for a CPU."""
    return clock.gpu_state(device) if device.is_gpu else {}
