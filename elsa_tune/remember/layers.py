"""Where winners come from: one's own measurements, imported ones, a team's databases, and what this version ships."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from elsa_tune import places, space
from elsa_tune.device import RUNGS, Device
from elsa_tune.errors import BadDevice, BadSettings, BadVariant, DatabaseUnusable, ElsaTuneError
from elsa_tune.measurement import Evidence, Measurement, Winner
from elsa_tune.problem import Problem
from elsa_tune.remember import lines, settings
from elsa_tune.remember.database import Database
from elsa_tune.remember.reading import Reader

T = TypeVar("T")

REFRESH_SECONDS = 24 * 3600.0
"""How old a copy of a remote database may grow before it is fetched again."""

listeners: list[Callable[[], None]] = []
"""Called when this process has finished changing its own database."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A source of winners: its database, or why it cannot be read, in a sentence that names the file; neither where nothing is
    recorded yet. ``local`` picks this machine's own or others' rows."""

    name: str
    place: str
    database: Reader | None
    problem: str = ""
    local: bool | None = None

    def winners(self, devices: Collection[str] = (), families: Collection[str] = (), **equal: str) -> list[Evidence]:
        """The layer's winners, as Reader.winners; none where it cannot be read."""
        return self._ask(lambda database: database.winners(self.local, devices, families, _is_understood, **equal), [])

    def measurements(self, **equal: str) -> list[Measurement]:
        """The layer's measurements whose columns equal the given values; none where it cannot be read."""
        return self._ask(lambda database: database.measurements(self.local, **equal), [])

    def finals_of(self) -> list[tuple[str, str]]:
        """(device, family) pairs that a final was measured for; none where it cannot be read."""
        return self._ask(lambda database: database.finals_of(), [])

    def slower(self, device: str) -> set[tuple[str, str]]:
        """(problem, variant) pairs that are slower than torch's SDPA on a device; none where it cannot be read."""
        return self._ask(lambda database: database.slower(device), set())

    def _ask(self, question: Callable[[Reader], T], nothing: T) -> T:
        """What the database answers; where it cannot, the next layer does, and ``trouble`` says why."""
        with suppress(DatabaseUnusable):
            if self.database is not None:
                return question(self.database)
        return nothing

    @property
    def trouble(self) -> str:
        """Why it may say less than was recorded, in a sentence with what to do; empty where nothing is known to be wrong."""
        return self.database.trouble if self.database is not None else self.problem

    def inventory(self) -> Iterator[str]:
        """One line on the layer, and one for each device in it."""
        if self.database is None:
            yield f"{self.name}: {self.problem or f'{self.place}: nothing is tuned yet; run elsa-tune'}"
            return
        counts: dict[tuple[str, str], int] = self._ask(lambda database: database.counts(self.local), {})
        yield f"{self.name}: {self.place}: {sum(counts.values())} measurements"
        for device in sorted({device for device, _ in counts}):
            of_status = ", ".join(f"{n} {status}" for (one, status), n in sorted(counts.items()) if one == device)
            yield f"  {device}: {of_status}; {len(self.winners([device]))} winners"
        if self.trouble:
            yield f"  {self.trouble}"


def _is_understood(variant: str) -> bool:
    """Whether this version's search spaces have a variant: another version may have recorded it."""
    try:
        space.parse(variant)
    except BadVariant:
        return False
    return True


def layers() -> list[Layer]:
    """One's own measurements, then imported ones, the team's databases, and what this package ships; one that cannot be read
    says why and the next serves."""
    return list(nearest_first())


def nearest_first() -> Iterator[Layer]:
    """The layers one by one: those behind the one that answers need not be read."""
    yield from _own()
    yield from _team()
    yield _shipped()


def _own() -> Iterator[Layer]:
    path, problem = places.database(), ""
    if path.exists():
        try:
            if problem := places.unsafe(path):
                raise DatabaseUnusable(problem)
            database = Reader.for_reading(path)
            yield Layer("own", str(path), database, local=True)
            yield Layer("imported", str(path), database, local=False)
            return
        except (DatabaseUnusable, OSError) as error:
            problem = str(error)
    yield Layer("own", str(path), None, problem)


def _team() -> Iterator[Layer]:
    try:
        sources = settings.databases()
    except BadSettings as error:
        yield Layer("team", str(places.settings()), None, str(error))
        return
    for source in sources:
        try:
            copy = _copy_of(source)
            if source not in _kept and (problem := copy.exists() and places.unsafe(copy)):
                raise DatabaseUnusable(problem)
            yield Layer("team", source, _kept.get(source) or Reader.for_reading(copy))
        except (DatabaseUnusable, OSError):
            yield Layer(
                "team",
                source,
                None,
                f"{source}: not read yet; elsa-tune db info reads it, dispatch does so beside its work",
            )


def _shipped() -> Layer:
    folder = places.data("cache")
    try:
        rows = [m for path in sorted(folder.glob("*.jsonl")) for m in lines.read(path)]
        return Layer("shipped", str(folder), Database.in_memory(rows, str(folder)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Layer("shipped", str(folder), None, f"{folder}: {error}; reinstall elsa-tune")


# The team's databases: read as foreign, kept as a copy.

_kept: dict[str, Reader] = {}  # source -> its measurements, where no copy can be written


def _copy_of(source: str) -> Path:
    return places.layers() / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.db"


def _is_stale(source: str) -> bool:
    """Whether a source has no copy, has changed since, or, where nobody can see that, was fetched long ago."""
    copy = _copy_of(source)
    if source in _kept:
        return False
    if not copy.exists():
        return True
    made = copy.stat().st_mtime
    if "://" in source:
        return time.time() - made > REFRESH_SECONDS
    path = Path(source).expanduser()
    return path.exists() and path.stat().st_mtime > made


def stale() -> list[str]:
    """The team's databases that should be read again."""
    with suppress(BadSettings, OSError):
        return [source for source in settings.databases() if _is_stale(source)]
    return []


def refresh(source: str) -> None:
    """Read a team's database again and keep a copy; in memory, where none can be written. The old copy serves until then.

    Raises BadMeasurements, NotTrusted, CompilerMissing's kin for a missing library: whatever reading it raises.
    """
    from elsa_tune.remember import foreign  # pydantic is for foreign lines only

    started = time.time()
    copy = _copy_of(source)
    work = copy.with_suffix(f".{os.getpid()}")
    try:
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Database.for_writing(work) as database:
            foreign.import_from(source, database)
            database.pack()
        os.utime(work, (started, started))
        work.replace(copy)
    except (DatabaseUnusable, OSError):
        memory = Database.in_memory([], source)
        foreign.import_from(source, memory)
        _kept[source] = memory
    finally:
        for left in copy.parent.glob(f"{work.name}*") if copy.parent.is_dir() else ():
            left.unlink(missing_ok=True)


def refresh_all() -> list[str]:
    """Read the team's databases that have changed; what could not be read, in a sentence each."""
    troubles = []
    for source in stale():
        try:
            refresh(source)
        except ElsaTuneError as error:
            troubles.append(str(error))
    return troubles


def troubles(found: Iterable[Layer]) -> list[str]:
    """What is wrong with layers, as far as they were read: a sentence each, which names the file and what to do."""
    return list(dict.fromkeys(layer.trouble for layer in found if layer.trouble))


# What a device may use of them.


def winners_of(problem: Problem, device: Device, found: Iterable[Layer]) -> list[Winner]:
    """Winners for the very problem on the very device, nearer layers first; those behind one's own are not asked."""
    for layer in found:
        if winning := layer.winners([str(device)], [problem.family], problem=str(problem)):
            return [Winner(found, layer.name, "exact") for found in winning]
    return []


def known_winners(
    device: Device, found: Iterable[Layer], wanted: Callable[[str], bool] = lambda family: True, **equal: str
) -> list[Winner]:
    """Winners for ``device`` and its kin, best rung first, nearer layers first, of ``wanted`` families."""
    winning = []
    for order, layer in enumerate(found):
        finals = layer.finals_of()
        kin = {spelled: rung for spelled in {one for one, _ in finals} if (rung := _kinship(device, spelled))}
        families = {family for one, family in finals if one in kin and wanted(family)}
        if not kin or not families:
            continue
        for pool in layer.winners(list(kin), list(families), **equal):
            winner = Winner(pool, layer.name, kin[pool.device])
            winning.append((RUNGS.index(winner.rung), order, winner))
    return [winner for _, _, winner in sorted(winning, key=lambda w: w[:2])]


def _kinship(device: Device, spelled: str) -> str | None:
    try:
        return device.kinship(Device.parse(spelled))
    except BadDevice:  # recorded by another version
        return None


def slower_than_sdpa(device: Device, found: Iterable[Layer]) -> set[tuple[str, str]]:
    """(problem, variant) pairs that finals on this very device found slower than torch's SDPA."""
    return {pair for layer in found for pair in layer.slower(str(device))}
