"""Measurement: what happened when a variant was tried; Winner: what to use because of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STATUSES = ("ok", "wrong", "failed", "timeout", "pruned", "candidate")
STAGES = ("trial", "final")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One variant tried on one problem and device.

    ``samples`` and ``incumbent_samples`` are seconds per call, taken in turns in one run; ``ratio`` is the median of
    incumbent / variant with a bootstrap 95 % interval [ratio_low, ratio_high]: above 1 the variant is faster.
    ``error`` is relative to max|v| and ``constant`` is C of the bound, both against float64. ``stage`` says whether few
    samples were taken (trial) or many, among finalists (final). Status candidate: compiled, never measured. ``created`` is seconds since 1970.
    """

    device: str
    problem: str
    variant: str
    status: str
    digest: str = ""
    stage: str = "trial"
    reason: str = ""
    error: float | None = None
    constant: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    samples: tuple[float, ...] = ()
    incumbent: str = ""
    incumbent_samples: tuple[float, ...] = ()
    resources: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, str | float] = field(default_factory=dict)
    created: float = 0.0

    @property
    def family(self) -> str:
        """The problem's family."""
        return self.problem.partition("@")[0]

    def as_row(self) -> dict[str, Any]:
        """A flat mapping of JSON scalars, with ``id``: the digest of everything else."""
        row = asdict(self)
        for name in ("samples", "incumbent_samples", "resources", "provenance"):
            row[name] = json.dumps(row[name], sort_keys=True)
        row["family"] = self.family
        canonical = json.dumps(row, sort_keys=True, separators=(",", ":"))
        return {"id": hashlib.sha256(canonical.encode()).hexdigest()[:32], **row}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Measurement:
        """The measurement that ``as_row`` wrote."""
        known = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        for name in ("samples", "incumbent_samples"):
            known[name] = tuple(json.loads(row[name]))
        for name in ("resources", "provenance"):
            known[name] = json.loads(row[name])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Winner:
    """The variant to use for a problem: a row of the ``winners`` view and where it came from.

    ``layer`` is "own" or "shipped"; ``rung`` is how close the device it was measured on is to this one.
    """

    problem: str
    variant: str
    measurement: Measurement
    layer: str
    rung: str

    @property
    def ratio_low(self) -> float:
        """The least advantage over SDPA that the measurement supports."""
        return self.measurement.ratio_low or 0.0
