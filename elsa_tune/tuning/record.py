"""What becomes of variants on a device, written down as measurements with everything that they depend on."""

from __future__ import annotations

from typing import Any

from elsa_tune.device import Device
from elsa_tune.generate import backends
from elsa_tune.measurement import KERNELS, Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember.database import Database
from elsa_tune.tuning import drift
from elsa_tune.tuning.telemetry import Reading
from elsa_tune.variant import Variant


class Recorder:
    """Records in a database what happens on a device. ``peaks`` are measured, once somebody did, with its clocks meanwhile."""

    def __init__(self, database: Database, device: Device) -> None:
        self.database, self.device = database, device
        self.peaks: dict[str, float] = {}

    def versions(self, backend: str) -> dict[str, str]:
        """The software that a measurement of a backend depends on."""
        incumbents = [backends.get(name).toolchain() for name in backends.rivals()]
        return {
            **{k: v for found in incumbents for k, v in found.items()},
            **backends.get(backend).toolchain(self.device),
        }

    def record(
        self,
        problem: Problem,
        variant: Variant,
        status: str,
        disturbed: float = 0.0,
        reading: Reading | None = None,
        **facts: Any,
    ) -> Measurement:
        """The measurement of a variant, once it is safe in the database."""
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
            provenance={**versions, **self.peaks, **(reading or {})},
            created=self.database.now(),
            **facts,
        )
        self.database.record(measurement)
        return measurement
