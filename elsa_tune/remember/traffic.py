"""Traffic that programs recorded, read as foreign text: JSON lines, or the table of a database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elsa_tune.device import Device
from elsa_tune.errors import BadWorkload
from elsa_tune.problem import Problem
from elsa_tune.remember.reading import Reader
from elsa_tune.traffic import Traffic

MOST_LINE = 1 << 12
MOST_LINES = 1 << 20
"""Characters of a line, and lines of a file."""

MOST_SECONDS, MOST_CALLS = 1e12, 1 << 53


class _Line(BaseModel):
    """What a line may say: bounded numbers, and spellings that today's nouns read."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    device: Annotated[str, Field(max_length=200)]
    problem: Annotated[str, Field(max_length=200)]
    calls: Annotated[int, Field(ge=1, le=MOST_CALLS)]
    seconds: Annotated[float, Field(ge=0, le=MOST_SECONDS)]
    process: Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}$")]
    wall: Annotated[float, Field(ge=0, le=MOST_SECONDS)]
    torch: Annotated[str, Field(max_length=100, pattern=r"^[ -~]*$")]
    threads: Annotated[int, Field(ge=1, le=1 << 20)]


def parse(line: str) -> Traffic:
    """A line that a process wrote. Raises ValueError, which pydantic's and our own errors are, with one sentence."""
    return _sound(_Line.model_validate_json(line))


def _sound(found: _Line) -> Traffic:
    said: dict[str, Any] = {**found.__dict__}
    return Traffic(**{**said, "device": Device.parse(found.device), "problem": Problem.parse(found.problem)})


def read(path: Path) -> list[Traffic]:
    """What a file holds, JSON lines or a database; each line once. Raises BadWorkload, DatabaseUnusable."""
    try:
        with path.open("rb") as file:
            if file.read(16).startswith(b"SQLite format 3"):
                return list(_numbered(path, _rows(path)))
            file.seek(0)
            lines = (line.decode(errors="replace") for line in iter(lambda: file.readline(MOST_LINE), b""))
            return list(dict.fromkeys(_numbered(path, _whole(line for line in lines if line.strip()))))
    except OSError as error:
        raise BadWorkload(
            f"traffic {path}: {error.strerror or error}; name a file that elsa-tune run -o wrote, or a database"
        ) from error


def _whole(lines: Iterator[str]) -> Iterator[Traffic]:
    """The lines read, but for a last one that its writer did not end."""
    for line in lines:
        try:
            yield parse(line)
        except ValueError:
            if line.endswith("\n") or len(line) >= MOST_LINE:
                raise


def _rows(path: Path) -> Iterator[Traffic]:
    with Reader.for_reading(path) as database:
        rows = database.traffic()
    return (_sound(_Line.model_validate(row)) for row in rows)


def _numbered(path: Path, each: Iterator[Traffic]) -> Iterator[Traffic]:
    """The same; a malformed one is told by its number. Raises BadWorkload."""
    number = 0
    while number < MOST_LINES:
        number += 1
        try:
            yield next(each)
        except StopIteration:
            return
        except ValueError as error:
            raise BadWorkload(
                f"traffic {path}, line {number}: {_sentence(error)}; remove that line, or record anew with elsa-tune run"
            ) from None
    raise BadWorkload(f"traffic {path} has more than {MOST_LINES} lines; give a part of it")


def _sentence(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{ascii(first['loc'][0])[1:-1] if first['loc'] else 'not JSON'}: {first['msg']}"[:160]
