"""Trials: build, check, race and record contenders, one problem at a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from elsa_tune import places
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import ElsaTuneError
from elsa_tune.generate import backends, sdpa
from elsa_tune.generate.backends import Built
from elsa_tune.measurement import KERNELS, Measurement
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.remember.database import Database
from elsa_tune.space import Space
from elsa_tune.tuning import drift, quiet
from elsa_tune.tuning.gauge import Reading
from elsa_tune.tuning.measure import (
    Contender,
    GivenUp,
    Raced,
    Worker,
    WorkerFailed,
    build,
    check_family,
    check_shape,
    peak,
    race,
    ratio,
    state,
)
from elsa_tune.variant import Variant

T = TypeVar("T")

TRIAL_ROUNDS, TRIAL_SECONDS = 5, 0.3
"""Rounds of a trial, and seconds for each variant in it."""

BUILD_SECONDS = 120.0

PATIENCE = 15.0
"""Seconds after which a kernel hangs, beside what its calls are known to take."""

LIMITS_LAST = 120.0
"""Seconds for which a GPU's peaks are taken to stay what they were: measuring them takes longer than a final."""

SLOW = 0.5
"""One of torch's kernels below this share of the fastest is not called for larger shapes of its family."""


class OutOfTime(Exception):
    """The run's time was over before a job had ended, or could begin: it says nothing of the job."""


@dataclass
class Trials:
    """What a device's tuning does to contenders. Every outcome is recorded before the next step begins.

    ``recorded`` is called with each measurement, after it is safe in the database.
    """

    database: Database
    worker: Worker
    device: Device
    recorded: Callable[[Problem, Measurement], None] = lambda problem, measurement: None
    builders: Worker | None = None  # compile apart from this process, where a compiler is a library that may crash
    thorough: bool = False  # race also those of torch's kernels that take long to start
    limits: dict[str, float] = field(default_factory=dict)  # this device's measured peaks
    deadline: float = math.inf  # of time.monotonic(): a job that lasts longer is given up
    _limits_until: float = 0.0  # of time.monotonic()
    late: list[tuple[Problem, Variant]] = field(default_factory=list)  # took too long on a busy machine
    waited: float = 0.0  # seconds, for another tuner of this machine
    _slow: set[tuple[str, bool, str]] = field(default_factory=set)  # torch's own, by family and regime
    _families: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    _shapes: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One tuner of a machine at a time builds or times; another waits its turn. Raises OutOfTime."""
        places.home().mkdir(mode=0o700, parents=True, exist_ok=True)
        lock, start = FileLock(places.home() / "tuning.lock"), time.monotonic()
        try:
            lock.acquire(timeout=max(0.0, self.deadline - start))
        except Timeout as error:
            raise OutOfTime from error
        finally:
            self.waited += time.monotonic() - start
        try:
            yield
        finally:
            lock.release()

    def contender(self, variant: Variant, problem: Problem) -> Contender:
        """A built variant. Raises what building raises."""
        return Contender(variant, backends.get(variant.backend).build(variant, problem, self.device), self.device)

    def _job(self, limit: float, job: Callable[..., T], *arguments: object) -> T:
        """What a job returns in the worker. Raises WorkerFailed, or OutOfTime where the run was over before its limit."""
        left = self.deadline - time.monotonic()
        try:
            return self.worker.run(job, *arguments, timeout=max(0.1, min(limit, left)))
        except WorkerFailed as error:
            if error.status == "timeout" and left < limit:
                raise OutOfTime from error
            raise

    def incumbent(self, problem: Problem) -> tuple[Contender, float]:
        """The fastest of torch's own kernels and its seconds per call; the others are recorded against it."""
        regime = problem.family, problem.q_len > 1
        peers = [c for c in self.peers(problem, self.thorough) if (*regime, str(c.variant)) not in self._slow]
        contenders = [c for c in peers if self._runs(problem, c)]
        raced = self._race(900.0, problem, contenders, TRIAL_ROUNDS, 0.2, needs_first=False)
        medians = {number: statistics.median(s) for number, s in enumerate(raced.samples) if s}
        best = min(medians, key=medians.__getitem__)
        self._slow |= {
            (*regime, str(contenders[number].variant))
            for number, median in medians.items()
            if medians[best] < SLOW * median and not self.device.is_gpu
        }
        for number in medians:
            stage = "final" if number == best else "trial"
            self._record_ratio(problem, contenders[number], contenders[best], stage, raced, number, best)
        return contenders[best], medians[best]

    def _race(
        self, limit: float, problem: Problem, contenders: Sequence[Contender], rounds: int, seconds: float,
        beat: float = 0.0, needs_first: bool = True,
    ) -> Raced:  # fmt: skip
        """A race in the worker; who could not take part is recorded, with the reason. Raises WorkerFailed, also where that is
        the incumbent, and OutOfTime."""
        raced = self._job(limit, race, problem, contenders, rounds, seconds, beat)
        for number, reason in raced.failed.items():
            self._record_contender(problem, contenders[number], "failed", reason=reason)
        if raced.failed and self.device.is_gpu:
            self.worker.renew()
        if needs_first and 0 in raced.failed:
            raise WorkerFailed("failed", f"{contenders[0].variant}: {raced.failed[0]}")
        return raced

    def _runs(self, problem: Problem, peer: Contender) -> bool:
        """Whether one of torch's kernels takes the problem here: on GPUs each has its own conditions."""
        try:
            self._shapes[str(problem), peer.built.digest] = self._job(900.0, check_shape, problem, peer, peer)
            return True
        except WorkerFailed as error:
            self._record_contender(problem, peer, error.status, reason=error.reason)
            return False

    def peers(self, problem: Problem, slow: bool = False) -> list[Contender]:
        """torch's own kernels that can serve the problem, those that are slow to start only if asked."""
        every = Space.load("sdpa").variants(problem, self.device)
        return [self.contender(v, problem) for v in every if slow or v.axes["kernel"] not in sdpa.SLOW_TO_START]

    def build(self, problem: Problem, variants: Sequence[Variant]) -> list[Contender]:
        """Compile side by side until the deadline; what fails or has a flaw is recorded and left out."""

        def attempt(variant: Variant, again: bool = True) -> Built | ElsaTuneError | WorkerFailed | None:
            left = self.deadline - time.monotonic()
            try:
                if self.builders:
                    limit = max(0.1, min(BUILD_SECONDS, left))
                    return self.builders.run(build, variant, problem, self.device, timeout=limit)
                return backends.get(variant.backend).build(variant, problem, self.device)
            except (ElsaTuneError, WorkerFailed) as error:
                if isinstance(error, GivenUp) and again and left > 0:  # another's fault
                    return attempt(variant, again=False)
                cut_off = isinstance(error, WorkerFailed) and error.status == "timeout" and left < BUILD_SECONDS
                return None if cut_off else error

        with ThreadPoolExecutor(host_cpu().cores) as pool:
            attempts = list(pool.map(attempt, variants))
        built = []
        for variant, result in zip(variants, attempts, strict=True):
            if result is None:  # the run was over before it was built: that says nothing of it
                continue
            if not isinstance(result, Built):
                self._record(problem, variant, "failed", reason=str(result))
            elif result.flaw:
                facts: dict[str, Any] = {"digest": result.digest, "resources": dict(result.resources)}
                self._record(problem, variant, "pruned", reason=result.flaw, **facts)
            else:
                built.append(Contender(variant, result, self.device))
        return built

    def trial(
        self, problem: Problem, incumbent: Contender, seconds: float, candidates: Sequence[Contender], best: float
    ) -> None:
        """Check candidates, then time them in one race with few samples, fewer for one far below the ``best`` ratio known."""
        usable = [c for c in candidates if self.usable(problem, incumbent, seconds, c)]
        limit = PATIENCE + (TRIAL_SECONDS + 20 * seconds) * (1 + len(usable))
        with quiet.Listener() as listener:
            try:
                rounds = (TRIAL_ROUNDS, TRIAL_SECONDS * len(usable), best)
                raced = self._race(limit, problem, [incumbent, *usable], *rounds) if usable else None
            except WorkerFailed as error:
                if len(usable) == 1:
                    self._record_failure(problem, usable[0], error, listener.heard())
                for alone in usable if len(usable) > 1 else ():  # one of them did it
                    self.trial(problem, incumbent, seconds, [alone], best)
                return
        for number, candidate in enumerate(usable if raced else (), 1):
            if raced and raced.samples[number]:
                self._record_ratio(problem, candidate, incumbent, "trial", raced, number, 0)

    def usable(self, problem: Problem, incumbent: Contender, seconds: float, candidate: Contender) -> bool:
        """Whether a candidate is right, checked once per kernel and problem; if not, that is recorded."""
        key = (str(problem), candidate.built.digest)
        if key in self._shapes:
            return not self._shapes[key].reason
        with quiet.Listener() as listener:
            try:
                verdict = self._family(problem, candidate)
                if not verdict.reason:
                    limit = PATIENCE + 40 * seconds
                    verdict = self._job(limit, check_shape, problem, candidate, incumbent)
            except WorkerFailed as error:
                self._record_failure(problem, candidate, error, listener.heard())
                return False
        self._shapes[key] = verdict
        if verdict.reason:
            self._record_contender(problem, candidate, "wrong", reason=verdict.reason)
        return not verdict.reason

    def take(self, problem: Problem, candidate: Contender, verdict: Verdict) -> None:
        """Know what check_family said of a candidate elsewhere on this device."""
        self._families[problem.family, candidate.built.digest] = verdict

    def _family(self, problem: Problem, candidate: Contender) -> Verdict:
        key = (problem.family, candidate.built.digest)
        if key not in self._families:
            self._families[key] = self._job(60.0, check_family, problem, candidate, self.peers(problem))
        return self._families[key]

    def find_limits(self) -> None:
        """Measure the device's peaks and note its clocks under load, those of a GPU again once they are LIMITS_LAST old; what
        cannot be measured is left out."""
        if self.device.is_gpu and time.monotonic() < self._limits_until:
            return
        try:
            peaks = self._job(60.0, peak, self.device)
            self.limits = {f"peak_{name}": value for name, value in peaks.items()}
            self.limits |= self._job(60.0, state, self.device)
        except WorkerFailed:
            self.limits = {}
        self._limits_until = time.monotonic() + LIMITS_LAST

    def final(
        self, problem: Problem, incumbent: Contender, finalists: Sequence[Contender], rounds: int, seconds: float
    ) -> Raced:
        """Race usable finalists with many samples. Raises WorkerFailed if the race is lost."""
        self.find_limits()
        contenders = [incumbent, *finalists]
        raced = self._race(120 + 10 * seconds, problem, contenders, rounds, seconds)
        longest = max((len(s) for s in raced.samples[1:]), default=0)
        for number, contender in enumerate(contenders):
            if raced.samples[number]:
                stage = "final" if len(raced.samples[number]) == longest or number == 0 else "trial"
                self._record_ratio(problem, contender, incumbent, stage, raced, number, 0)
        return raced

    def versions(self, backend: str) -> dict[str, str]:
        """The software that a measurement of a backend depends on."""
        return {**backends.get("sdpa").toolchain(), **backends.get(backend).toolchain(self.device)}

    # Recording.

    def _record_ratio(
        self, problem: Problem, contender: Contender, incumbent: Contender, stage: str, raced: Raced, own: int, against: int
    ) -> None:  # fmt: skip
        mine, incumbents = raced.samples[own], raced.samples[against]
        found = ratio(incumbents, mine)
        self._record_contender(
            problem, contender, "ok", raced.disturbed[own], stage=stage, samples=mine, seconds=statistics.median(mine),
            ratio=found.median, ratio_low=found.low, ratio_high=found.high,
            incumbent=str(incumbent.variant), incumbent_samples=incumbents[: len(mine)], reading=raced.reading,
        )  # fmt: skip

    def _record_failure(self, problem: Problem, contender: Contender, error: WorkerFailed, heard: quiet.Heard) -> None:
        """A failure is a verdict; a time-out on a busy machine is none: it is to be tried again."""
        no_verdict = error.status == "timeout" and heard.busy
        if no_verdict:
            self.late.append((problem, contender.variant))
        self._record_contender(problem, contender, error.status, float(no_verdict), reason=error.reason)

    def _record_contender(
        self, problem: Problem, contender: Contender, status: str, disturbed: float = 0.0, **facts: Any
    ) -> None:
        verdict = self._shapes.get((str(problem), contender.built.digest))
        if verdict and math.isfinite(verdict.error):
            facts.update(error=verdict.error, constant=verdict.constant)
        facts.update(digest=contender.built.digest, resources=dict(contender.built.resources))
        self._record(problem, contender.variant, status, disturbed, **facts)

    def _record(
        self,
        problem: Problem,
        variant: Variant,
        status: str,
        disturbed: float = 0.0,
        reading: Reading | None = None,
        **facts: Any,
    ) -> None:
        versions: dict[str, str | float] = {
            **self.versions(variant.backend),
            "installation": self.database.installation,
        }
        if source := backends.get(variant.backend).source(variant, problem):
            versions |= {"source": source.digest, "kernels": float(KERNELS)}
        if era := drift.era(self.database, self.device, str(problem)):
            versions["era"] = era
        if disturbed:
            versions["disturbed"] = disturbed
        measurement = Measurement(
            device=str(self.device),
            problem=str(problem),
            variant=str(variant),
            status=status,
            role=backends.role(str(variant)),
            provenance={**versions, **self.limits, **(reading or {})},
            created=self.database.now(),
            **facts,
        )
        self.database.record(measurement)
        self.recorded(problem, measurement)
