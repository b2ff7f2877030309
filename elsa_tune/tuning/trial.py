"""Trials: contenders are built, checked and raced, one problem at a time, and whatever they come to is recorded."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from elsa_tune import places
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import ElsaTuneError, NoRoom
from elsa_tune.generate import backends, kernel_cache, lawful
from elsa_tune.generate.backends import Built
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.prove.check import Verdict
from elsa_tune.remember.database import Database
from elsa_tune.space import Space
from elsa_tune.tuning import noise
from elsa_tune.tuning.contender import Contender, build, check_family, check_shape
from elsa_tune.tuning.peaks import clocks, peak
from elsa_tune.tuning.race import Raced, race, ratio
from elsa_tune.tuning.record import Recorder
from elsa_tune.tuning.worker import GivenUp, Worker, WorkerFailed
from elsa_tune.variant import Variant

T = TypeVar("T")

TRIAL_ROUNDS, TRIAL_SECONDS = 5, 0.3
"""Rounds of a trial, and seconds for each variant in it."""

BUILD_SECONDS = 120.0

PATIENCE = 15.0
"""Seconds after which a kernel hangs, beside what its calls are known to take."""

PEAKS_LAST = 120.0
"""Seconds for which a GPU's peaks are taken to stay what they were: measuring them takes longer than a final."""

SLOW = 0.5
"""One of torch's kernels below this share of the fastest is not called for larger shapes of its family."""


class OutOfTime(Exception):
    """The run's time was over before a job had ended, or could begin: it says nothing of the job."""


@dataclass(frozen=True, slots=True)
class Incumbent:
    """What candidates for a problem are raced against: the fastest of torch's own kernels, and its seconds per call."""

    contender: Contender
    seconds: float


@dataclass
class Trials:
    """What a device's tuning does to contenders. Every outcome is safe in the database before it is told, and before the next
    step begins."""

    database: Database
    worker: Worker
    device: Device
    builders: Worker | None = None  # compile apart from this process, where a compiler is a library that may crash
    thorough: bool = False  # race also those of torch's kernels that take long to start
    deadline: float = math.inf  # of time.monotonic(): a job that lasts longer is given up
    late: list[tuple[Problem, Variant]] = field(default_factory=list)  # took too long on a busy machine
    waited: float = 0.0  # seconds, for another tuner of this machine
    _peaks_until: float = 0.0  # of time.monotonic()
    _slow: set[tuple[str, bool, str]] = field(default_factory=set)  # torch's own, by family and regime
    _families: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    _shapes: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.database, self.device)

    @property
    def peaks(self) -> dict[str, float]:
        """This device's measured peaks."""
        return self.recorder.peaks

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One tuner of a machine at a time builds or times; another waits its turn. Raises OutOfTime, NoRoom."""
        lock, start = FileLock(places.home() / "tuning.lock"), time.monotonic()
        try:
            with places.written(Path(lock.lock_file), kernel_cache.ELSEWHERE):
                places.home().mkdir(mode=0o700, parents=True, exist_ok=True)
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

    def incumbent(self, problem: Problem) -> tuple[Incumbent, list[Measurement]]:
        """The fastest of torch's own kernels; and what each of them came to, raced against it."""
        regime = problem.family, problem.q_len > 1
        peers = [c for c in self.peers(problem, self.thorough) if (*regime, str(c.variant)) not in self._slow]
        contenders, came_to = list[Contender](), list[Measurement]()
        for peer in peers:
            if (refused := self._try_to_run(problem, peer)) is None:
                contenders.append(peer)
            else:
                came_to.append(refused)
        raced = self._race(900.0, problem, contenders, TRIAL_ROUNDS, 0.2)
        came_to += self._absent(problem, contenders, raced)
        medians = {number: statistics.median(s) for number, s in enumerate(raced.samples) if s}
        best = min(medians, key=medians.__getitem__)
        self._slow |= {
            (*regime, str(contenders[number].variant))
            for number, median in medians.items()
            if medians[best] < SLOW * median and not self.device.is_gpu
        }
        for number in medians:
            stage = "final" if number == best else "trial"
            came_to.append(self._record_ratio(problem, contenders, stage, raced, number, best))
        return Incumbent(contenders[best], medians[best]), came_to

    def _race(
        self, limit: float, problem: Problem, contenders: Sequence[Contender], rounds: int, seconds: float, beat: float = 0.0
    ) -> Raced:  # fmt: skip
        """A race in the worker. Raises WorkerFailed and OutOfTime."""
        raced = self._job(limit, race, problem, contenders, rounds, seconds, beat)
        if raced.failed and self.device.is_gpu:
            self.worker.renew()
        return raced

    def _absent(self, problem: Problem, contenders: Sequence[Contender], raced: Raced) -> list[Measurement]:
        """Who could not take part in a race, with the reason."""
        return [
            self._record_contender(problem, contenders[number], "failed", reason=reason)
            for number, reason in raced.failed.items()
        ]

    def _try_to_run(self, problem: Problem, peer: Contender) -> Measurement | None:
        """Call one of torch's kernels: what speaks against it, if it does not take the problem here. On GPUs each has its own
        conditions."""
        try:
            self._shapes[str(problem), peer.built.digest] = self._job(900.0, check_shape, problem, peer, peer)
            return None
        except WorkerFailed as error:
            return self._record_contender(problem, peer, error.status, reason=error.reason)

    def peers(self, problem: Problem, slow: bool = False) -> list[Contender]:
        """torch's own kernels that can serve the problem, those that are slow to start only if asked."""
        every = (v for name in backends.rivals() for v in lawful.variants(Space.read(name), problem, self.device))
        return [self.contender(v, problem) for v in every if slow or not backends.get(v.backend).slow_to_start(v)]

    def build(self, problem: Problem, variants: Sequence[Variant]) -> tuple[list[Contender], list[Measurement]]:
        """Compile side by side until the deadline: what can be used, and what failed or has a flaw. Raises NoRoom."""

        def attempt(variant: Variant, again: bool = True) -> Built | ElsaTuneError | WorkerFailed | None:
            left = self.deadline - time.monotonic()
            try:
                if self.builders:
                    limit = max(0.1, min(BUILD_SECONDS, left))
                    return self.builders.run(build, variant, problem, self.device, timeout=limit)
                return backends.get(variant.backend).build(variant, problem, self.device)
            except NoRoom:  # says nothing of the variant, and the next one would not fit either
                raise
            except (ElsaTuneError, WorkerFailed) as error:
                if isinstance(error, GivenUp) and again and left > 0:  # another's fault
                    return attempt(variant, again=False)
                cut_off = isinstance(error, WorkerFailed) and error.status == "timeout" and left < BUILD_SECONDS
                return None if cut_off else error

        with ThreadPoolExecutor(host_cpu().cores) as pool:
            attempts = list(pool.map(attempt, variants))
        built, lost = list[Contender](), list[Measurement]()
        for variant, result in zip(variants, attempts, strict=True):
            if result is None:  # the run was over before it was built: that says nothing of it
                continue
            if not isinstance(result, Built):
                lost.append(self.recorder.record(problem, variant, "failed", reason=str(result)))
            elif result.flaw:
                facts: dict[str, Any] = {"digest": result.digest, "resources": dict(result.resources)}
                lost.append(self.recorder.record(problem, variant, "pruned", reason=result.flaw, **facts))
            else:
                built.append(Contender(variant, result, self.device))
        return built, lost

    def trial(
        self, problem: Problem, incumbent: Incumbent, candidates: Sequence[Contender], best: float
    ) -> Iterator[Measurement]:
        """Check candidates, then time the right ones in one race with few samples, fewer for one far below the ``best`` ratio
        known: what each came to, as soon as it is recorded. Raises OutOfTime."""
        for candidate in candidates:
            if (wrong := self.check(problem, incumbent, candidate)) is not None:
                yield wrong
        yield from self._try(problem, incumbent, [c for c in candidates if self.is_right(problem, c)], best)

    def _try(
        self, problem: Problem, incumbent: Incumbent, candidates: Sequence[Contender], best: float
    ) -> Iterator[Measurement]:
        if not candidates:
            return
        contenders = [incumbent.contender, *candidates]
        limit = PATIENCE + (TRIAL_SECONDS + 20 * incumbent.seconds) * len(contenders)
        with noise.Listener() as listener:
            try:
                raced = self._race(limit, problem, contenders, TRIAL_ROUNDS, TRIAL_SECONDS * len(candidates), best)
                yield from self._absent(problem, contenders, raced)
                _needs_incumbent(contenders, raced)
            except WorkerFailed as error:
                if len(candidates) == 1:
                    yield self._record_failure(problem, candidates[0], error, listener.heard())
                for alone in candidates if len(candidates) > 1 else ():  # one of them did it
                    yield from self._try(problem, incumbent, [alone], best)
                return
        for number in range(1, len(contenders)):
            if raced.samples[number]:
                yield self._record_ratio(problem, contenders, "trial", raced, number)

    def check(self, problem: Problem, incumbent: Incumbent, candidate: Contender) -> Measurement | None:
        """Check a candidate, once per kernel and problem: what was found against it now, or None. Raises OutOfTime."""
        key = (str(problem), candidate.built.digest)
        if key in self._shapes:
            return None
        with noise.Listener() as listener:
            try:
                verdict = self._family(problem, candidate)
                if not verdict.reason:
                    limit = PATIENCE + 40 * incumbent.seconds
                    verdict = self._job(limit, check_shape, problem, candidate, incumbent.contender)
            except WorkerFailed as error:
                return self._record_failure(problem, candidate, error, listener.heard())
        self._shapes[key] = verdict
        return self._record_contender(problem, candidate, "wrong", reason=verdict.reason) if verdict.reason else None

    def is_right(self, problem: Problem, contender: Contender) -> bool:
        """Whether a contender was checked on the problem and nothing was found against it."""
        verdict = self._shapes.get((str(problem), contender.built.digest))
        return verdict is not None and not verdict.reason

    def take(self, problem: Problem, candidate: Contender, verdict: Verdict) -> None:
        """Know what check_family said of a candidate elsewhere on this device."""
        self._families[problem.family, candidate.built.digest] = verdict

    def _family(self, problem: Problem, candidate: Contender) -> Verdict:
        key = (problem.family, candidate.built.digest)
        if key not in self._families:
            self._families[key] = self._job(60.0, check_family, problem, candidate, self.peers(problem))
        return self._families[key]

    def find_peaks(self) -> None:
        """Measure the device's peaks and note its clocks under load, those of a GPU again once they are PEAKS_LAST old; what
        cannot be measured is left out."""
        if self.device.is_gpu and time.monotonic() < self._peaks_until:
            return
        try:
            rates = self._job(60.0, peak, self.device)
            found = {f"peak_{name}": value for name, value in rates.items()}
            found |= self._job(60.0, clocks, self.device)
        except WorkerFailed:
            found = {}
        self.recorder.peaks = found
        self._peaks_until = time.monotonic() + PEAKS_LAST

    def final(
        self, problem: Problem, incumbent: Incumbent, finalists: Sequence[Contender], rounds: int, seconds: float
    ) -> Iterator[Measurement]:
        """Race finalists that are right with many samples: what each came to. Raises WorkerFailed if the race is lost."""
        self.find_peaks()
        contenders = [incumbent.contender, *finalists]
        raced = self._race(120 + 10 * seconds, problem, contenders, rounds, seconds)
        yield from self._absent(problem, contenders, raced)
        _needs_incumbent(contenders, raced)
        longest = max((len(s) for s in raced.samples[1:]), default=0)
        for number, samples in enumerate(raced.samples):
            if samples:
                stage = "final" if len(samples) == longest or number == 0 else "trial"
                yield self._record_ratio(problem, contenders, stage, raced, number)

    # Recording.

    def _record_ratio(
        self, problem: Problem, contenders: Sequence[Contender], stage: str, raced: Raced, own: int, against: int = 0
    ) -> Measurement:  # fmt: skip
        mine, incumbents = raced.samples[own], raced.samples[against]
        found = ratio(incumbents, mine)
        return self._record_contender(
            problem, contenders[own], "ok", raced.disturbed[own], stage=stage, samples=mine, seconds=statistics.median(mine),
            ratio=found.median, ratio_low=found.low, ratio_high=found.high,
            incumbent=str(contenders[against].variant), incumbent_samples=incumbents[: len(mine)], reading=raced.reading,
        )  # fmt: skip

    def _record_failure(
        self, problem: Problem, contender: Contender, error: WorkerFailed, heard: noise.Heard
    ) -> Measurement:
        """A failure is a verdict; a time-out on a busy machine is none: it is to be tried again."""
        no_verdict = error.status == "timeout" and heard.busy
        if no_verdict:
            self.late.append((problem, contender.variant))
        return self._record_contender(problem, contender, error.status, float(no_verdict), reason=error.reason)

    def _record_contender(
        self, problem: Problem, contender: Contender, status: str, disturbed: float = 0.0, **facts: Any
    ) -> Measurement:
        verdict = self._shapes.get((str(problem), contender.built.digest))
        if verdict and math.isfinite(verdict.error):
            facts.update(error=verdict.error, constant=verdict.constant)
        facts.update(digest=contender.built.digest, resources=dict(contender.built.resources))
        return self.recorder.record(problem, contender.variant, status, disturbed, **facts)


def _needs_incumbent(contenders: Sequence[Contender], raced: Raced) -> None:
    """Raise WorkerFailed where the incumbent could not take part: nobody has a ratio then."""
    if 0 in raced.failed:
        raise WorkerFailed("failed", f"{contenders[0].variant}: {raced.failed[0]}")
