"""Trials: build, check, race and record contenders, one problem at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from filelock import FileLock

from elsa_tune import backends, drift, places
from elsa_tune.backends import Built, sdpa
from elsa_tune.check import Verdict
from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import ElsaTuneError
from elsa_tune.measure import (
    Contender,
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
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant
from elsa_tune.winners import Database

TRIAL_ROUNDS, TRIAL_SECONDS = 5, 0.6
BUILD_SECONDS = 120.0


@contextmanager
def quiet_machine() -> Iterator[None]:
    """One tuner of a machine at a time builds or times; another waits its turn."""
    places.home().mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(places.home() / "tuning.lock"):
        yield


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
    _families: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    _shapes: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def contender(self, variant: Variant, problem: Problem) -> Contender:
        """A built variant. Raises what building raises."""
        return Contender(variant, backends.get(variant.backend).build(variant, problem, self.device), self.device)

    def incumbent(self, problem: Problem) -> tuple[Contender, float]:
        """The fastest of torch's own kernels and its seconds per call; the others are recorded against it."""
        contenders = [c for c in self.peers(problem, self.thorough) if self._runs(problem, c)]
        samples = self.worker.run(race, problem, contenders, TRIAL_ROUNDS, 0.2, timeout=900.0)
        medians = [statistics.median(s) for s in samples]
        best = medians.index(min(medians))
        for contender, own in zip(contenders, samples, strict=True):
            stage = "final" if contender is contenders[best] else "trial"
            self._record_ratio(problem, contender, contenders[best], stage, own, samples[best])
        return contenders[best], medians[best]

    def _runs(self, problem: Problem, peer: Contender) -> bool:
        """Whether one of torch's kernels takes the problem here: on GPUs each has its own conditions."""
        try:
            self._shapes[str(problem), peer.built.digest] = self.worker.run(
                check_shape, problem, peer, peer, timeout=900.0
            )
            return True
        except WorkerFailed as error:
            self._record_contender(problem, peer, error.status, reason=error.reason)
            return False

    def peers(self, problem: Problem, slow: bool = False) -> list[Contender]:
        """torch's own kernels that can serve the problem, those that are slow to start only if asked."""
        every = Space.load("sdpa").variants(problem, self.device)
        return [self.contender(v, problem) for v in every if slow or v.axes["kernel"] not in sdpa.SLOW_TO_START]

    def build(self, problem: Problem, variants: Sequence[Variant]) -> list[Contender]:
        """Compile side by side; what fails or has a flaw is recorded and left out."""

        def attempt(variant: Variant) -> Built | ElsaTuneError | WorkerFailed:
            try:
                if self.builders:
                    return self.builders.run(build, variant, problem, self.device, timeout=BUILD_SECONDS)
                return backends.get(variant.backend).build(variant, problem, self.device)
            except (ElsaTuneError, WorkerFailed) as error:
                return error

        with ThreadPoolExecutor(host_cpu().cores) as pool:
            attempts = list(pool.map(attempt, variants))
        built = []
        for variant, result in zip(variants, attempts, strict=True):
            if not isinstance(result, Built):
                self._record(problem, variant, "failed", reason=str(result))
            elif result.flaw:
                facts = {"digest": result.digest, "resources": dict(result.resources)}
                self._record(problem, variant, "pruned", reason=result.flaw, **facts)
            else:
                built.append(Contender(variant, result, self.device))
        return built

    def trial(self, problem: Problem, incumbent: Contender, seconds: float, candidate: Contender, best: float) -> None:
        """Check a candidate, then time it with few samples, fewer if it is far below the ``best`` ratio known."""
        if not self.usable(problem, incumbent, seconds, candidate):
            return
        limit = 60 + 40 * seconds
        try:
            pair = [incumbent, candidate]
            samples = self.worker.run(race, problem, pair, TRIAL_ROUNDS, TRIAL_SECONDS, best, timeout=limit)
        except WorkerFailed as error:
            self._record_contender(problem, candidate, error.status, reason=error.reason)
            return
        self._record_ratio(problem, candidate, incumbent, "trial", samples[1], samples[0])

    def usable(self, problem: Problem, incumbent: Contender, seconds: float, candidate: Contender) -> bool:
        """Whether a candidate is right, checked once per kernel and problem; if not, that is recorded."""
        key = (str(problem), candidate.built.digest)
        if key in self._shapes:
            return not self._shapes[key].reason
        try:
            verdict = self._family(problem, candidate)
            if not verdict.reason:
                limit = 60 + 40 * seconds
                verdict = self.worker.run(check_shape, problem, candidate, incumbent, timeout=limit)
        except WorkerFailed as error:
            self._record_contender(problem, candidate, error.status, reason=error.reason)
            return False
        self._shapes[key] = verdict
        if verdict.reason:
            self._record_contender(problem, candidate, "wrong", reason=verdict.reason)
        return not verdict.reason

    def _family(self, problem: Problem, candidate: Contender) -> Verdict:
        key = (problem.family, candidate.built.digest)
        if key not in self._families:
            self._families[key] = self.worker.run(check_family, problem, candidate, self.peers(problem), timeout=60.0)
        return self._families[key]

    def find_limits(self) -> None:
        """Measure the device's peaks and note its clocks; what cannot be measured is left out."""
        try:
            peaks = self.worker.run(peak, self.device, timeout=60.0)
            self.limits = {f"peak_{name}": value for name, value in peaks.items()}
            self.limits |= self.worker.run(state, self.device, timeout=60.0)
        except WorkerFailed:
            self.limits = {}

    def final(
        self, problem: Problem, incumbent: Contender, finalists: Sequence[Contender], rounds: int, seconds: float
    ) -> None:
        """Race usable finalists with many samples. Raises WorkerFailed if the race is lost."""
        self.find_limits()
        contenders = [incumbent, *finalists]
        limit = 120 + 10 * seconds
        samples = self.worker.run(race, problem, contenders, rounds, seconds, timeout=limit)
        longest = max(len(s) for s in samples[1:])
        for contender, own in zip(contenders, samples, strict=True):
            stage = "final" if len(own) == longest or contender is incumbent else "trial"
            self._record_ratio(problem, contender, incumbent, stage, own, samples[0])

    def versions(self, backend: str) -> dict[str, str]:
        """The software that a measurement of a backend depends on."""
        return {**backends.get("sdpa").toolchain(), **backends.get(backend).toolchain(self.device)}

    # Recording.

    def _record_ratio(
        self, problem: Problem, contender: Contender, incumbent: Contender, stage: str,
        own: Sequence[float], incumbents: Sequence[float],
    ) -> None:  # fmt: skip
        found = ratio(incumbents, own)
        self._record_contender(
            problem, contender, "ok", stage=stage, samples=tuple(own), seconds=statistics.median(own),
            ratio=found.median, ratio_low=found.low, ratio_high=found.high,
            incumbent=str(incumbent.variant), incumbent_samples=tuple(incumbents[: len(own)]),
        )  # fmt: skip

    def _record_contender(self, problem: Problem, contender: Contender, status: str, **facts: object) -> None:
        verdict = self._shapes.get((str(problem), contender.built.digest))
        if verdict and math.isfinite(verdict.error):
            facts.update(error=verdict.error, constant=verdict.constant)
        facts.update(digest=contender.built.digest, resources=dict(contender.built.resources))
        self._record(problem, contender.variant, status, **facts)

    def _record(self, problem: Problem, variant: Variant, status: str, **facts: object) -> None:
        versions: dict[str, str | float] = {
            **self.versions(variant.backend),
            "installation": self.database.installation,
        }
        if source := backends.get(variant.backend).source(variant, problem):
            versions["source"] = source.digest
        if era := drift.era(self.database, self.device, str(problem)):
            versions["era"] = era
        measurement = Measurement(
            device=str(self.device),
            problem=str(problem),
            variant=str(variant),
            status=status,
            provenance={**versions, **self.limits},
            created=self.database.now(),
            **facts,  # type: ignore[arg-type]
        )
        self.database.record(measurement)
        self.recorded(problem, measurement)
