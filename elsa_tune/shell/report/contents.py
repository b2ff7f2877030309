"""What a report tells: a chapter for each problem that a layer of measurements knows on a device, and who knows what side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from elsa_tune import device as devices
from elsa_tune.device import Device
from elsa_tune.errors import BadMeasurements, ElsaTuneError
from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import foreign, layers
from elsa_tune.remember.database import Database
from elsa_tune.remember.layers import Layer
from elsa_tune.tuning.report import Outcome

MOST_TOLD = 300
"""Letters of why measurements were left out, where nothing else was found."""


LAYERS = ("own", "imported", "team", "shipped")
"""Words for what is no file."""


@dataclass(frozen=True, slots=True)
class Column:
    """Who says something: a layer of measurements, of one device."""

    layer: str
    device: Device

    def __str__(self) -> str:
        return f"{self.layer}: {self.device}"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Variants that were not used for one and the same reason."""

    status: str
    reason: str
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Chapter:
    """One problem on one device as a layer knows it: ``tried`` is every measurement, oldest first."""

    column: Column
    outcome: Outcome
    tried: tuple[Measurement, ...]

    @property
    def problem(self) -> Problem:
        """What was tuned."""
        return self.outcome.problem

    @cached_property
    def contenders(self) -> list[Measurement]:
        """The newest measurement against torch of every variant that is right, fastest first, torch's own among them."""
        newest = {m.variant: m for m in self.tried if m.status == "ok" and m.ratio and not m.is_hint}
        return sorted(newest.values(), key=lambda m: m.ratio or 0.0, reverse=True)

    @cached_property
    def rejections(self) -> list[Rejection]:
        """Why variants were not used, most frequent reasons first."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        for m in self.tried:
            if m.status not in ("ok", "candidate"):
                found.setdefault((m.status, m.reason), {})[m.variant] = None
        grouped = [Rejection(status, reason, tuple(variants)) for (status, reason), variants in found.items()]
        return sorted(grouped, key=lambda one: -len(one.variants))

    @cached_property
    def peaks(self) -> dict[str, float]:
        """GFLOP/s and GB/s of the device by name (``gflops``, ``gbytes``, ...), as measured last beside this problem; empty if never."""
        for m in reversed(self.tried):
            found = {k.removeprefix("peak_"): float(v) for k, v in m.provenance.items() if k.startswith("peak_")}
            if found:
                return found
        return {}

    @property
    def backends(self) -> list[str]:
        """Those whose variants were tried, torch's own left out."""
        return [name for name in backends.candidates() if any(m.variant.startswith(f"{name}.") for m in self.tried)]


@dataclass(frozen=True)
class Contents:
    """All chapters, in the order of columns and problems, and what else a reader should know."""

    chapters: Sequence[Chapter]
    notes: Sequence[str]

    @cached_property
    def columns(self) -> list[Column]:
        """Who says something."""
        return list(dict.fromkeys(chapter.column for chapter in self.chapters))

    def of(self, column: Column) -> list[Chapter]:
        """The chapters of a column."""
        return [chapter for chapter in self.chapters if chapter.column == column]

    @cached_property
    def side_by_side(self) -> dict[Problem, list[Chapter | None]]:
        """Each problem that several columns know, and its chapter in every column."""
        known = {(chapter.column, chapter.problem): chapter for chapter in self.chapters}
        rows = {p: [known.get((column, p)) for column in self.columns] for p in dict.fromkeys(p for _, p in known)}
        return {problem: row for problem, row in rows.items() if len([one for one in row if one]) > 1}


def contents(sources: Sequence[str] = (), device: str | None = None, problems: Iterable[str] = ()) -> Contents:
    """What layers (LAYERS), files and addresses of measurements say; without any, one's own.

    ``device`` keeps one device, or those of a kind or an architecture, ``problems`` those that are spelled so. Raises BadMeasurements
    where that is nothing, BadDevice, BadProblem, NotTrusted.
    """
    wanted = {Problem.parse(text) for text in problems}
    notes: list[str] = []
    read = {
        layer.name: (layer, layer.measurements()) for source in sources or ("own",) for layer in _layers(source, notes)
    }
    recorded = {m.device for _, tried in read.values() for m in tried}
    meant = set(devices.among(device, recorded)) if device and recorded else recorded
    known = [chapter for layer, tried in read.values() for chapter in _chapters(layer, tried, meant, notes)]
    notes += layers.troubles(layer for layer, _ in read.values())
    chapters = [chapter for chapter in known if not wanted or chapter.problem in wanted]
    if not chapters:
        asked = f" of {', '.join(map(str, wanted))}" if wanted else ""
        told = f" ({'; '.join(dict.fromkeys(notes))[:MOST_TOLD]})" if notes else ""
        raise BadMeasurements(
            f"nothing was measured{asked} in {', '.join(sources or ['own'])}{told}; run elsa-tune, or name a file of measurements"
        )
    return Contents(chapters, list(dict.fromkeys(notes)))


def _layers(source: str, notes: list[str]) -> Iterator[Layer]:
    """The layers of that name, or the file or address that is named, each under a name of its own."""
    named = [layer for layer in layers.layers() if layer.name == source]
    for layer in named:
        yield replace(layer, name=f"{layer.name}, {layer.place}") if len(named) > 1 else layer
    if not named:
        refused: Counter[str] = Counter()
        try:
            found = foreign.measurements(source, refused)
        except BadMeasurements as error:
            raise BadMeasurements(f"{error}; or use one of the layers {', '.join(LAYERS)}") from error
        notes += [f"{source}: left out {count}: {reason}" for reason, count in refused.items()]
        yield Layer(source, source, Database.in_memory(found, source))


def _chapters(layer: Layer, tried: Iterable[Measurement], meant: set[str], notes: list[str]) -> Iterator[Chapter]:
    """A chapter for every problem on one of those devices."""
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for m in tried:
        if m.device in meant:
            grouped.setdefault((m.device, m.problem), []).append(m)
    winners = {(found.device, found.problem): found for found in layer.winners()}
    for (device, problem), found in sorted(grouped.items()):
        try:
            here, asked = Device.parse(device), Problem.parse(problem)
        except ElsaTuneError as error:  # recorded by another version
            notes.append(f"{layer.name}: {error}")
            continue
        outcome = Outcome.won(asked, here, winners.get((device, problem)))
        yield Chapter(Column(layer.name, here), outcome, tuple(found))
