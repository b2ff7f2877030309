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
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import backends
from elsa_tune.generate.backends import Built
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.tuning import clock, gauge, quiet
from elsa_tune.variant import Variant

T = TypeVar("T")

SAMPLE_SECONDS = 0.002
"""A sample repeats a fast call until it lasts this long."""

OUTCLASSED = 0.3
"""A contender below this share of the fastest at its first call is not timed again."""

LAGS = 0.6
"""A contender below this share of the best after the first round leaves the race."""

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


class GivenUp(WorkerFailed):
    """A job was ended together with others of its worker's processes, for a fault of theirs: it says nothing of the job."""


def _start_worker(memory: int) -> None:
    """First thing in a new worker: its parent, the fork server, loads code and never computes."""
    from elsa_tune.generate import cpp

    cpp.Pool.parent_never_computed()
    try:
        import resource

        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # a system without these limits still has the time-out


_of_main = threading.Lock()


@contextmanager
def _main_is_not_imported() -> Iterator[None]:
    """Processes started meanwhile leave the caller's script alone, which need not guard ``__main__`` then: jobs are this
    package's functions."""
    with _of_main:
        main: dict[str, Any] = vars(sys.modules["__main__"])
        shown: dict[str, Any] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
        main.update(dict.fromkeys(shown))
        try:
            yield
        finally:
            main.update(shown)


_METHODS = multiprocessing.get_all_start_methods()
_START: Any = multiprocessing.get_context("forkserver" if "forkserver" in _METHODS else "spawn")
"""How workers start: forked by a server that has loaded torch, where systems have that."""


class _Process(_START.Process):  # type: ignore[misc]
    @staticmethod
    def _Popen(process: Any) -> Any:
        with _main_is_not_imported():
            return _START.Process._Popen(process)


class _Context(type(_START)):  # type: ignore[misc]
    Process = _Process


class Worker:
    """``count`` processes that run jobs; one is replaced when a job kills it, outlasts its time or breaks its GPU.

    ``memory`` bounds the bytes a process may take, half of the machine's by default; 0 leaves it unbounded, as GPU
    drivers need, which reserve addresses without using them.
    """

    def __init__(self, memory: int | None = None, count: int = 1) -> None:
        context = _Context()
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(["elsa_tune.tuning._worker"])
        limit = max(4 << 30, host_cpu().memory // 2) if memory is None else memory
        self._options: dict[str, Any] = {
            "max_workers": count, "context": context, "initializer": _start_worker, "initargs": (limit,),
        }  # fmt: skip
        self._start()

    def _start(self) -> None:
        from pebble import CONSTS, ProcessPool

        CONSTS.term_timeout = (
            0.1  # each that is stuck in a compiler or a kernel is waited for, one by one, before it is killed
        )
        self._pool, self._waiting = ProcessPool(**self._options), set[Any]()

    def run(self, job: Callable[..., T], *arguments: object, timeout: float) -> T:
        """The job's result. Raises WorkerFailed; exceptions of the job itself are failures with their message."""
        from pebble import ProcessExpired

        future = self._pool.schedule(job, args=arguments, timeout=timeout)
        waiting = self._waiting
        waiting.add(future)
        try:
            result: T = future.result()
            return result
        except FutureTimeout as error:
            raise WorkerFailed("timeout", f"no answer within {timeout:.0f} s; the worker was killed") from error
        except ProcessExpired as error:
            raise WorkerFailed("failed", f"the worker died with exit code {error.exitcode}") from error
        except CancelledError as error:
            raise GivenUp("failed", "given up: the worker was ended") from error
        except Exception as error:
            if any(name in str(error) for name in ("CUDA error", "HIP error", "Triton Error")):
                self.renew()  # its GPU context may be lost for good
            raise WorkerFailed("failed", f"{type(error).__name__}: {error}") from error
        finally:
            waiting.discard(future)

    def renew(self) -> None:
        """Go on in a new process: what is left of a job that failed may be in the way of the next one's."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process at once; whoever waits for a job, in another thread, learns that it was given up."""
        for future in list(self._waiting):
            future.cancel()
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
    """Inputs of a problem in the worker, in its memory order: enough sets to outgrow the last-level cache, and the truth for
    one of them."""

    problem: Problem
    inputs: list[Any]
    rows: Any
    truth: Any
    peer_errors: dict[str, float]
    last_cache: int

    @property
    def bytes(self) -> int:
        """What the inputs take."""
        return len(self.inputs) * self.problem.bytes

    def written(self) -> list[Callable[[], object]]:
        """For each set, what writes it as a model does just before attention: projections write all of it, and a cache that
        grows is copied as a whole. What no cache could hold is in memory either way: then only the query is written."""
        many = 3 if self.problem.bytes < 2 * self.last_cache else 1
        return [partial(_write, x.tensors[:many]) for x in self.inputs]


def _write(tensors: Sequence[Any]) -> None:
    for x in tensors:
        x.mul_(1.0)  # every value again, in place


_benches: dict[tuple[Problem, Device], _Bench] = {}
"""Those made last: shapes of a family are raced in turns, and making inputs takes longer than checking a kernel on them."""

MEMORY_FOR_INPUTS = 1 / 8
"""Share of the device's memory that the inputs of several problems may take."""


def _bench(problem: Problem, device: Device) -> _Bench:
    name = (problem, device)
    if name in _benches:
        _benches[name] = _benches.pop(name)
        return _benches[name]
    count = min(
        1024, math.ceil(1.25 * device.last_cache / problem.bytes) + device.is_gpu
    )  # a GPU writes nothing in between
    while (
        _benches and count * problem.bytes + sum(b.bytes for b in _benches.values()) > MEMORY_FOR_INPUTS * device.memory
    ):
        del _benches[next(iter(_benches))]
        gc.collect()
    _benches[name] = _made_bench(problem, device, count)
    return _benches[name]


def _made_bench(problem: Problem, device: Device, count: int) -> _Bench:
    import torch

    from elsa_tune.prove import reference

    generator = torch.Generator().manual_seed(0)
    first = reference.random_inputs(problem, generator).to(device.torch)
    if problem.direction == "backward":
        first = reference.with_forward(problem, first, generator)
    copies = [first.ordered(problem.orders) for _ in range(count)]
    rows = reference.sample_rows(problem, generator)
    return _Bench(problem, copies, rows, reference.attention_rows(problem, first, rows), {}, device.last_cache)


def build(variant: Variant, problem: Problem, device: Device) -> Built:
    """Build apart from the caller's process: a compiler that crashes takes nobody with it."""
    os.environ.pop("TRITON_INTERPRET", None)  # whoever asks for a device means its compiler
    return backends.get(variant.backend).build(variant, problem, device)


def check_family(problem: Problem, candidate: Contender, peers: Sequence[Contender]) -> Verdict:
    """Hostile inputs; see elsa_tune.prove.check."""
    from elsa_tune.prove import check

    kernels = [peer.load(problem) for peer in peers]
    longest = check.longest(candidate.variant, problem, candidate.device)
    return check.check_family(candidate.load(problem), problem, kernels, device=candidate.device.torch, longest=longest)


def check_shape(problem: Problem, candidate: Contender, incumbent: Contender) -> Verdict:
    """The problem at its own size, against float64 rows and the incumbent's error."""
    from elsa_tune.prove import check, reference

    bench = _bench(problem, candidate.device)

    def error_of(contender: Contender) -> tuple[reference.Error, str]:
        if problem.direction == "backward":
            return check.gradient_error(contender.load(problem), problem, bench.inputs[0]), ""
        out, stray = check.run(contender.load(problem), bench.inputs[0])
        return reference.measure_error(problem, bench.inputs[0], bench.rows, out, bench.truth), stray

    name, (error, stray) = str(incumbent.variant), error_of(candidate)
    if candidate.variant == incumbent.variant:
        bench.peer_errors[name] = error.relative
    elif name not in bench.peer_errors:
        bench.peer_errors[name] = error_of(incumbent)[0].relative
    return check.judge(problem, f"{problem.shape}", error, stray, bench.peer_errors[name])


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
    bench, rng = _bench(problem, contenders[0].device), random.Random(0)

    def calls(kernel: Callable[..., object]) -> list[Callable[[], object]]:
        return [partial(kernel, *x.tensors, **({"operands": x.operands} if x.operands else {})) for x in bench.inputs]

    before = () if contenders[0].device.is_gpu else bench.written()
    reader = gauge.Gauge(contenders[0].device)
    timers, failed = dict[int, clock.Timer](), dict[int, str]()
    first = dict[int, float]()
    for i, c in enumerate(contenders):
        try:
            timers[i] = clock.timer(calls(c.load(problem)), c.device, problem.launch, before, reader.read)
            first[i] = timers[i](1)
        except Exception as error:
            clock.survive(c.device, f"{c.variant}: {_told(error)}")
            failed[i] = _told(error)
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


def _told(error: BaseException) -> str:
    """An exception, and what went wrong before it: a broken capture fails again when it is ended."""
    first = error
    while (earlier := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = earlier
    told = f"{type(error).__name__}: {error}"
    return told if first is error else f"{told}; before that, {type(first).__name__}: {first}"


def _repeats(timer: clock.Timer, once: float) -> int:
    """Calls in a sample, by one that is warm; a slow call is a sample by itself."""
    return 1 if once > 4 * SAMPLE_SECONDS else max(1, min(1000, round(SAMPLE_SECONDS / timer(1))))


class _Referee:
    """Takes samples, again where others disturbed them, for at most ``patience`` seconds; a GPU keeps time for itself."""

    def __init__(self, patience: float, device: Device) -> None:
        self._patience = patience
        self._listener = quiet.Listener() if device.kind == "cpu" else None
        self._whole = quiet.Listener() if device.kind == "cpu" else None
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


def peak(device: Device, seconds: float = 0.02) -> dict[str, float]:
    """The device's measured limits, all threads: GFLOP/s of each kind of product, and read GB/s (``gbytes``);
    nothing for an OpenCL device. A GPU is kept busy for longer than ``seconds``, until its clocks have settled."""
    if device.is_gpu:
        return clock.gpu_peak(device)
    if device.kind != "cpu":
        return {}
    from elsa_tune.generate import cpp

    return cpp.peak(seconds)


def state(device: Device) -> dict[str, float]:
    """What the device says, while it works, of its clocks, power and temperature; nothing for a CPU."""
    return clock.gpu_state(device) if device.is_gpu else {}
