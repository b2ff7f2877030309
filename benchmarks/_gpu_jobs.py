"""Jobs of benchmarks/gpu.py that run in workers, and the ledger of what workers' time was spent on."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from elsa_tune.device import Device
from elsa_tune.generate.backends import Built
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.tuning import contender as contenders
from elsa_tune.tuning import timing
from elsa_tune.tuning.contender import Contender
from elsa_tune.tuning.workbench import workbench
from elsa_tune.variant import Variant

CALLS = 100
BROKEN = 77
"""The exit code of a process whose GPU context a kernel broke."""


class Ledger:
    """A worker, and the seconds that each of its jobs took."""

    def __init__(self, worker: Any) -> None:
        self._worker, self.spent = worker, Counter[str]()

    def run(self, job: Callable[..., Any], *arguments: object, timeout: float) -> Any:
        start = time.monotonic()
        try:
            return self._worker.run(job, *arguments, timeout=timeout)
        finally:
            self.spent[job.__name__] += time.monotonic() - start

    def renew(self) -> None:
        self._worker.renew()

    def rounded(self) -> dict[str, float]:
        return {name: round(seconds, 1) for name, seconds in self.spent.items()}


class Prepared(NamedTuple):
    """A kernel before its race: what was built, its check on the family's hostile inputs, the seconds of both; or why not."""

    built: Built | None
    verdict: Verdict | None
    building: float
    checking: float = 0.0
    failure: str = ""


def prepare(variant: Variant, problem: Problem, device: Device, peers: Sequence[Contender] | None) -> Prepared:
    """Build, and check beside torch's own (``peers``; None: build only). A kernel that breaks the GPU's context ends this process:
    the next job must not run in it."""
    start, built = time.monotonic(), None
    try:
        built = contenders.build(variant, problem, device)
        building = time.monotonic() - start
        if built.flaw or peers is None:
            return Prepared(built, None, building)
        verdict = contenders.check_family(problem, Contender(variant, built, device), peers)
        return Prepared(built, verdict, building, time.monotonic() - start - building)
    except Exception as error:
        return _failed(built, time.monotonic() - start, device, f"{type(error).__name__}: {error}")


def warm(problem: Problem, contender: Contender) -> Prepared:
    """Call a contender once, so that what it compiles is on disk."""
    start = time.monotonic()
    try:
        contenders.check_shape(problem, contender, contender)
        return Prepared(contender.built, None, time.monotonic() - start)
    except Exception as error:
        return _failed(contender.built, time.monotonic() - start, contender.device, f"{type(error).__name__}: {error}")


def _failed(built: Built | None, seconds: float, device: Device, why: str) -> Prepared:
    try:
        if torch.cuda.is_initialized():
            timing.survive(device, why)
    except RuntimeError:
        print(why, file=sys.stderr, flush=True)
        os._exit(BROKEN)
    return Prepared(built, None, seconds, failure=why)


def launch_costs(problem: Problem, several: Sequence[Contender]) -> dict[str, float | str]:
    """Microseconds that a call takes the host, which does not wait for the GPU: the least of three rows of CALLS; or why it
    could not be called."""
    found: dict[str, float | str] = {}
    for contender in several:
        try:
            found[str(contender.variant)] = _launch_cost(problem, contender)
        except Exception as error:
            found[str(contender.variant)] = f"{type(error).__name__}: {error}"
    return found


def _launch_cost(problem: Problem, contender: Contender) -> float:
    tensors = workbench(problem, contender.device).inputs[0].tensors
    wait = torch.cuda.synchronize if contender.device.is_gpu else lambda: None
    kernel, rows = contender.load(problem), list[float]()
    call = kernel.bind(*tensors) if problem.direction == "forward" else kernel
    call(*tensors)
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call(*tensors)
        rows.append(1e6 * (time.perf_counter() - start) / CALLS)
    wait()
    return round(min(rows), 2)
