"""Measurement: what happened when a variant was tried; Evidence: what its finals say together; Winner: what to use because of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from operator import attrgetter
from typing import Any

KERNELS = 2
"""Which kernels a measurement is of: raised when those of earlier versions turn out to be faulty. Theirs are built anew.
1: the error of a long fold grew with the number of its leaves."""

STATUSES = ("ok", "wrong", "failed", "timeout", "pruned", "candidate")
STAGES = ("trial", "final")
ROLES = ("candidate", "rival")
INCUMBENT_ROLES = ("rival", "yardstick")
LONGEST_REASON = 2000

DISTURBED = 0.25
"""A measurement of which a larger share of samples stayed disturbed by others is a disturbed one."""


canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
"""One spelling of a mapping in JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One variant tried on one problem and device.

    ``samples`` and ``incumbent_samples`` are seconds per call, taken in turns in one run; ``ratio`` is the median of
    incumbent / variant with a bootstrap 95 % interval [ratio_low, ratio_high]: above 1 the variant is faster.
    ``error`` is relative to max|v| and ``constant`` is C of the bound, both against the truth. ``stage`` says whether few
    samples were taken (trial) or many, among finalists (final). Status candidate: compiled, never measured. ``role`` says whether
    the variant is a candidate of ours or a rival, torch's own; ``incumbent_role`` whether the incumbent is a rival or the
    yardstick of a kit, whose ratio says nothing of torch. ``created`` is seconds since 1970.

    ``said`` is each field that is not empty as canonical JSON, in the order of names, and ``line`` all of them: equal content is
    equal text.
    """

    device: str
    problem: str
    variant: str
    status: str
    digest: str = ""
    stage: str = "trial"
    role: str = "candidate"
    reason: str = ""
    error: float | None = None
    constant: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    samples: tuple[float, ...] = ()
    incumbent: str = ""
    incumbent_role: str = "rival"
    incumbent_samples: tuple[float, ...] = ()
    resources: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, str | float] = field(default_factory=dict)
    created: float = 0.0
    said: Mapping[str, str] = field(init=False, repr=False, compare=False)
    line: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """One spelling of equal content: floats, six digits of a sample, no order among facts."""
        listed = {}
        for name in ("samples", "incumbent_samples"):
            words = [f"{x:.6g}" for x in getattr(self, name)]
            object.__setattr__(self, name, tuple(map(float, words)))
            listed[name] = _listed(words)
        for name in ("error", "constant", "seconds", "ratio", "ratio_low", "ratio_high", "created"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "reason", self.reason[:LONGEST_REASON])
        facts = {k: v if isinstance(v, str) else float(v) for k, v in self.provenance.items()}
        object.__setattr__(self, "provenance", facts)
        values = zip(_EMPTY.items(), _values(self), strict=True)
        said = {name: listed.get(name) or _json(value) for (name, empty), value in values if value != empty}
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "line", "{" + ",".join([f'"{name}":{text}' for name, text in said.items()]) + "}")

    @property
    def family(self) -> str:
        """The problem's family."""
        return self.problem.partition("@")[0]

    @property
    def is_rival(self) -> bool:
        """Whether torch's own kernel was measured."""
        return self.role == "rival"

    @property
    def is_hint(self) -> bool:
        """Whether it ran against a kit's yardstick: a hint of what to try, its ratio says nothing of torch."""
        return bool(self.incumbent) and self.incumbent_role != "rival"

    @property
    def is_of_faulty_code(self) -> bool:
        """Whether its kernel was rendered by a version whose kernels are not used any more (KERNELS)."""
        return "source" in self.provenance and self.provenance.get("kernels", 1.0) != float(KERNELS)

    @property
    def disturbed(self) -> bool:
        """Whether others wanted the machine while this was measured."""
        return float(self.provenance.get("disturbed", 0.0)) > DISTURBED

    @property
    def no_verdict(self) -> bool:
        """Whether this says nothing of the variant: it took too long on a machine that was busy with something else."""
        return self.status == "timeout" and self.disturbed

    @property
    def id(self) -> str:
        """The digest of everything else."""
        return hashlib.sha256(self.line.encode()).hexdigest()[:24]

    @classmethod
    def from_line(cls, line: str) -> Measurement:
        """The measurement that ``line`` wrote; foreign lines are read by elsa_tune.remember.foreign."""
        return cls(**json.loads(line))


_EMPTY: dict[str, Any] = {
    f.name: {} if f.default_factory is not MISSING else f.default
    for f in sorted(fields(Measurement), key=attrgetter("name"))
    if f.init
}
"""What each field is when nothing is said of it, in the order of names."""

_values = attrgetter(*_EMPTY)


def _json(value: object) -> str:
    """As canonical, which takes longer over a single number."""
    return repr(value) if isinstance(value, float) and isfinite(value) else canonical(value)


def _listed(words: Iterable[str]) -> str:
    """Numbers of six digits as canonical writes them: as they are, unless they are whole, large or none."""
    return f"[{','.join([w if '.' in w and '+' not in w else canonical(float(w)) for w in words])}]"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What all finals of a variant say together: ``ratio`` and its interval are weighted means over ``finals`` of them, and
    ``measurement`` is the newest. Finals on a busy machine count only where there is no other."""

    measurement: Measurement
    ratio: float
    ratio_low: float
    ratio_high: float
    finals: int

    @property
    def device(self) -> str:
        """Where it was measured."""
        return self.measurement.device

    @property
    def is_rival(self) -> bool:
        """Whether torch's own kernel was measured."""
        return self.measurement.is_rival

    @property
    def problem(self) -> str:
        """What was measured."""
        return self.measurement.problem

    @property
    def variant(self) -> str:
        """With what."""
        return self.measurement.variant


@dataclass(frozen=True, slots=True)
class Winner:
    """The variant to use for a problem: a row of the ``winners`` view and where it came from.

    ``layer`` is "own", "imported", "team" or "shipped"; ``rung`` is how close the device it was measured on is to this one.
    """

    evidence: Evidence
    layer: str
    rung: str

    @property
    def problem(self) -> str:
        """What it won."""
        return self.evidence.problem

    @property
    def variant(self) -> str:
        """What won."""
        return self.evidence.variant

    @property
    def measurement(self) -> Measurement:
        """Its newest final."""
        return self.evidence.measurement

    @property
    def ratio(self) -> float:
        """Its advantage over SDPA."""
        return self.evidence.ratio

    @property
    def ratio_low(self) -> float:
        """The least advantage over SDPA that its finals support."""
        return self.evidence.ratio_low

    @property
    def finals(self) -> int:
        """How many finals say so."""
        return self.evidence.finals
