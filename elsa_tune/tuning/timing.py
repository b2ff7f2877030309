"""How long calls take: by the monotonic clock on a CPU, by device events on a GPU, called or replayed as a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from elsa_tune.device import Device

Call = Callable[[], object]
Timer = Callable[[int], float]
"""Seconds per call, over at least so many calls."""


def timer(
    calls: Sequence[Call],
    device: Device,
    launch: str,
    before: Sequence[Call] = (),
    during: Call = lambda: None,
) -> Timer:
    """Times ``calls`` in turn: they do the same on different inputs, so that caches do not hold what is read next.

    On a CPU ``before`` holds what is done, and not timed, before each of them: a model writes what attention then reads.
    On a GPU, launch "eager" is timed call by call, as a program without graphs would; "graph" captures all calls into one
    CUDA graph and replays it. ``during`` is called while the GPU still computes what it was told. A call that cannot be
    captured raises what torch raises.
    """
    if not device.is_gpu:
        return _Called(calls, before) if before else _Repeated(calls)
    return _Graph(calls, during) if launch == "graph" else _Events(calls, during)


class _Called:
    def __init__(self, calls: Sequence[Call], before: Sequence[Call]) -> None:
        self._calls, self._before, self._turn = calls, before, 0

    def __call__(self, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self._turn = (self._turn + 1) % len(self._calls)
            call = self._calls[self._turn]
            self._before[self._turn]()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / repeats


class _Repeated:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._turn = calls, 0

    def _next(self) -> Call:
        self._turn = (self._turn + 1) % len(self._calls)
        return self._calls[self._turn]

    def __call__(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self._next()()
        return (time.perf_counter() - start) / repeats


class _Events(_Repeated):
    def __init__(self, calls: Sequence[Call], during: Call) -> None:
        super().__init__(calls)
        self._during = during
        calls[0]()  # warm up: libraries and compilers do things once

    def __call__(self, repeats: int) -> float:
        return between_events(lambda: repeat(lambda: self._next()(), repeats), self._during) / repeats


NODES = 16
"""Calls in a graph, at least: the pause between two replays is no call's."""


class _Graph:
    def __init__(self, calls: Sequence[Call], during: Call) -> None:
        cuda, calls = _cuda(), list(calls) * -(-NODES // len(calls))
        self._calls, self._graph, self._during = calls, cuda.CUDAGraph(), during
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # warm up: what is done once may be forbidden in a capture
            for call in calls[:2]:
                call()
        cuda.current_stream().wait_stream(side)
        here = cuda.current_stream()
        try:
            with cuda.graph(self._graph):
                self._outputs = [call() for call in calls]
        except BaseException:  # where ending a broken capture raises too, torch stays on the capture's stream
            cuda.set_stream(here)
            raise

    def __call__(self, repeats: int) -> float:
        turns = -(-repeats // len(self._calls))
        return between_events(lambda: repeat(self._graph.replay, turns), self._during) / (turns * len(self._calls))


def _cuda() -> Any:
    import torch

    return torch.cuda


def repeat(work: Call, times: int) -> None:
    for _ in range(times):
        work()


def between_events(work: Callable[[], object], during: Call = lambda: None) -> float:
    """Seconds that the GPU spends between the start and the end of the work; ``during`` is called meanwhile."""
    cuda = _cuda()
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    start.record()
    work()
    end.record()
    during()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def survive(device: Device, what: str) -> None:
    """Raise RuntimeError where a failure, ``what``, has left the GPU's context unusable; else nothing is known to be wrong."""
    if device.is_gpu:
        try:
            _cuda().synchronize()
        except RuntimeError as error:
            raise RuntimeError(f"{what}; after that, CUDA error: {error}") from error
