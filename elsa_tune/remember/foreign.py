"""Measurements from elsewhere: read as foreign text, judged by a schema, merged by content."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.errors import BadMeasurements
from elsa_tune.measurement import INCUMBENT_ROLES, ROLES, STAGES, STATUSES, Evidence, Measurement
from elsa_tune.problem import Problem
from elsa_tune.remember import earlier, settings
from elsa_tune.remember.database import Database
from elsa_tune.remember.fetch import MOST_BYTES, fetched
from elsa_tune.remember.lines import place_of, write_lines
from elsa_tune.remember.signatures import check_signature

MOST_SPELLINGS = 1 << 14
"""Of a kind of thing, that are remembered as sound."""

MOST_LINE = 1 << 16
MOST_GARBAGE = 1 << 24
"""Of one line, and of what may come before a file is taken for garbage."""


def _spelled(parse: Callable[[str], object]) -> AfterValidator:
    """A text that ``parse`` reads and spells the same: no other spelling of a thing, in whatever alphabet, gets in."""

    return AfterValidator(lambda text: _as_spelled(parse, text))


@lru_cache(3 * MOST_SPELLINGS)  # thousands of lines spell the same
def _as_spelled(parse: Callable[[str], object], text: str) -> str:
    if str(parse(text)) != text:
        raise ValueError("not as this program spells it")
    return text


def _incumbent(text: str) -> object:
    return text if text in ("", "plain") else space.parse(text)  # plain: a kit's own yardstick


_Name = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
_Words = Annotated[str, Field(max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Number = Annotated[float, Field(ge=0, le=1e12)]
_Samples = Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], Field(max_length=10_000)]


_NUMBERS = ("peak_", "disturbed", "kernels")
"""How the facts of a provenance begin that are computed with."""


class Line(BaseModel):
    """What a line may say: enumerations, bounded numbers, and spellings that today's nouns read."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    device: Annotated[str, Field(max_length=200), _spelled(Device.parse)]
    problem: Annotated[str, Field(max_length=200), _spelled(Problem.parse)]
    variant: Annotated[str, Field(max_length=200), _spelled(space.parse)]
    status: Literal[STATUSES]  # type: ignore[valid-type]
    stage: Literal[STAGES] = "trial"  # type: ignore[valid-type]
    role: Literal[ROLES] | None = None  # type: ignore[valid-type]
    incumbent_role: Literal[INCUMBENT_ROLES] | None = None  # type: ignore[valid-type]
    digest: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,200}$")] = ""
    reason: Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")] = ""
    error: _Number | None = None
    constant: _Number | None = None
    seconds: _Number | None = None
    ratio: _Number | None = None
    ratio_low: _Number | None = None
    ratio_high: _Number | None = None
    samples: _Samples = []
    incumbent: Annotated[str, Field(max_length=200), _spelled(_incumbent)] = ""
    incumbent_samples: _Samples = []
    resources: Annotated[dict[_Name, Annotated[int, Field(ge=0, le=1 << 53)]], Field(max_length=100)] = {}
    provenance: Annotated[dict[_Name, Annotated[float, Field(ge=-1e15, le=1e15)] | _Words], Field(max_length=60)] = {}
    created: Annotated[float, Field(ge=0, le=1e11)] = 0.0


def sound(line: str) -> Measurement:
    """A measurement from a line that somebody else wrote. Raises ValueError, which pydantic's and our own errors are, with one
    sentence."""
    if len(line) > MOST_LINE:
        raise ValueError(f"line: longer than {MOST_LINE >> 10} KiB")
    try:
        found = Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{ascii(first['loc'][0])[1:-1] if first['loc'] else 'line'}: {first['msg']}"[:160]) from None
    roles = earlier.roles(found.variant, found.incumbent)  # which earlier versions do not say
    if wrong := [name for name, role in roles.items() if found.__dict__[name] not in (None, role)]:
        raise ValueError(
            f"{wrong[0]}: not that of {found.variant if wrong[0] == 'role' else found.incumbent or 'nobody'}"
        )
    if words := sorted(k for k, v in found.provenance.items() if isinstance(v, str) and k.startswith(_NUMBERS)):
        raise ValueError(f"provenance: {words[0]} should be a number")
    measurement = Measurement(**{**found.__dict__, **roles})
    if measurement.line != line:  # another's spelling of the same content, unless it says something twice
        try:
            json.loads(line, object_pairs_hook=_once)
        except RecursionError:
            raise ValueError("line: nested too deeply") from None
    if measurement.samples and min(measurement.samples) < 1e-12:
        raise ValueError("samples: no clock gives less than a picosecond")
    return measurement


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("line: a name is said twice")
    return dict(pairs)


# Reading.


@contextmanager
def _vouched_for(source: str) -> Iterator[Path]:
    """As ``fetched``; where the user lists whom to trust, only what one of those signed. Raises NotTrusted too."""
    with fetched(source) as path:
        if settings.trusted():
            check_signature(source, path)
        yield path


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file: JSON lines, packed or not, or a database of this program. Raises BadMeasurements."""
    try:
        with path.open("rb") as start:
            magic = start.read(16)
        if magic.startswith(b"SQLite format 3"):
            with Database.for_reading(path) as database:
                yield from (m.line for m in database)
            return
        read = 0
        with gzip.open(path, "rb") if magic.startswith(b"\x1f\x8b") else path.open("rb") as file:
            whole = True  # whether the line before this one has ended
            while line := file.readline(MOST_LINE + 1):
                read += len(line)
                if read > MOST_BYTES or (not whole and not line.endswith(b"\n") and read > MOST_GARBAGE):
                    raise BadMeasurements(
                        f"{path} is too large unpacked, or one endless line; give a file of measurements"
                    )
                begins, whole = whole, line.endswith(b"\n")
                if begins and line.strip():
                    yield line.decode(errors="replace").rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise BadMeasurements(f"{path}: {error}; give a file that elsa-tune db export or a kit wrote") from error


def read(path: Path, refused: Counter[str]) -> Iterator[Measurement]:
    """The sound measurements of a file; the others are counted by reason. Raises BadMeasurements."""
    for line in _lines(path):
        try:
            yield sound(line)
        except ValueError as error:
            refused[str(error)] += 1


def measurements(source: str, refused: Counter[str]) -> list[Measurement]:
    """The sound measurements of a path or URL; the others are counted by reason. Raises BadMeasurements, NotTrusted."""
    with _vouched_for(source) as path:
        return list(read(path, refused))


@dataclass
class Imported:
    """What reading files of measurements came to: sound ones, how many of them were new, the others by reason."""

    sound: int = 0
    new: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def import_from(source: str, database: Database) -> Imported:
    """Add the sound measurements of a path or URL to a database, as others'. Raises BadMeasurements, NotTrusted."""
    found = Imported()

    def counted(measurements: Iterator[Measurement]) -> Iterator[Measurement]:
        for measurement in measurements:
            found.sound += 1
            yield measurement

    with _vouched_for(source) as path:
        found.new = database.add(counted(read(path, found.refused)))
    return found


# Files of measurements: merged, compared.


def merge(sources: Sequence[str], output: Path) -> Imported:
    """Write what any of the sources holds, each measurement once. The order of sources, and merging again, change nothing."""
    total = Imported()
    lines: set[tuple[str, str, str, str]] = set()
    for source in sources:
        found = measurements(source, total.refused)
        lines |= {place_of(measurement) for measurement in found}
        total.sound += len(found)
    total.new = len(lines)
    write_lines([line for *_, line in sorted(lines)], output)
    return total


@dataclass(frozen=True, slots=True)
class Difference:
    """What two files hold that the other does not, how much they share, and (device, problem) -> winners that differ."""

    only_first: list[Measurement]
    only_second: list[Measurement]
    shared: int
    winners: dict[tuple[str, str], tuple[Evidence | None, Evidence | None]]


def diff(first: str, second: str) -> Difference:
    """Compare two files by content. Raises BadMeasurements."""
    sides: list[dict[str, Measurement]] = []
    winning: list[dict[tuple[str, str], Evidence]] = []
    for source in (first, second):
        sides.append({m.id: m for m in measurements(source, Counter())})
        database = Database.in_memory(sides[-1].values(), source)
        winning.append({(m.device, m.problem): m for m in database.winners()})
    a, b = sides
    keys = sorted(winning[0].keys() | winning[1].keys())
    pairs = {key: (winning[0].get(key), winning[1].get(key)) for key in keys}
    differing = {k: (x, y) for k, (x, y) in pairs.items() if (x and x.variant) != (y and y.variant)}
    return Difference(
        [m for name, m in a.items() if name not in b], [m for name, m in b.items() if name not in a],
        len(a.keys() & b.keys()), differing,
    )  # fmt: skip
