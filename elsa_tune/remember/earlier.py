"""Earlier formats of the database, and what their measurements did not say."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.remember import schema
from elsa_tune.space import Space

COLUMNS = {
    1: ("id", "device", "family", "problem", "variant", "digest", "stage", "status", "reason", "error", "constant", "seconds",
        "ratio", "ratio_low", "ratio_high", "samples", "incumbent", "incumbent_samples", "resources", "provenance", "created"),
    2: ("number", "id", "local", "status", "stage", *schema.NAMES, *schema.FACTS, "incumbent_samples", *schema.NUMBERS, "samples"),
}  # fmt: skip
"""What a row of each format holds, in its order: of ``measurements`` in the first, of ``records`` in the second."""

LEFT = {
    1: ("VIEW winners", "TABLE measurements"),
    2: ("VIEW winners", "VIEW measurements", "TABLE records", "TABLE words"),
}
"""What is dropped once its measurements are taken over."""


def roles(variant: str, incumbent: str) -> dict[str, Any]:
    """Role of a variant and of the incumbent it ran against, which lines and formats before the third did not say."""
    is_rival = not incumbent or backends.role(incumbent) == "rival"
    return {"role": backends.role(variant), "incumbent_role": "rival" if is_rival else "yardstick"}


def measurement(version: int, row: Mapping[str, Any]) -> tuple[Measurement, bool] | None:
    """A row of an earlier format, its texts resolved, and whether this machine measured it; None if it is not what was
    recorded. What was never a row may raise any of schema.UNREADABLE."""
    found = schema.measurement(row)
    is_sound = version == 1 or found.id == row["id"].hex()
    said = roles(found.variant, found.incumbent)
    if any(getattr(found, name) != role for name, role in said.items()):
        found = replace(found, **said)
    local = not found.is_hint if version == 1 else bool(row["local"])
    return (found, local) if is_sound else None


def measurements(connection: sqlite3.Connection, version: int) -> Iterator[tuple[Measurement, bool]]:
    """Every sound measurement of a database of an earlier format, and whether this machine measured it."""
    texts = dict(connection.execute("SELECT id, content FROM words")) if version == 2 else {}
    names = COLUMNS[version]
    for values in connection.execute(f"SELECT {', '.join(names)} FROM {'records' if version == 2 else 'measurements'}"):
        row = dict(zip(names, values, strict=True))
        row |= {name: texts[row[name]] for name in schema.TEXTS if version == 2 and isinstance(row[name], int)}
        if found := measurement(version, row):
            yield found


def copied(path: Path, version: int) -> Path:
    """A copy of a database of an earlier format, beside it. Whoever asks holds its lock, so nothing is recorded meanwhile."""
    copy = path.with_name(f"{path.name}.format-{version}.part")
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    return copy


def keep(copy: Path) -> None:
    """Let a copy have its name, which no other file has."""
    number = 0
    while (target := copy.with_name(f"{copy.stem}-{number}")).exists():
        number += 1
    copy.replace(target)


def unsaid(m: Measurement) -> Measurement:
    """A measurement as format 2 named it: without roles."""
    return replace(m, role="candidate", incumbent_role="rival")


def overlay(connection: sqlite3.Connection) -> None:
    """Let a database of format 2, which is not written to, be read as one of today's: the roles are filled in as it is read."""
    names = [text for backend in backends.rivals() for text in _spelled(backend)]
    marks = ", ".join("?" * len(names))
    found = connection.execute(f"SELECT id FROM words WHERE key IN ({marks})", [*map(schema.key, names)]).fetchall()
    rivals = ", ".join(str(number) for (number,) in found)
    kept = ", ".join(name for name in COLUMNS[2])
    connection.execute(
        f"""CREATE TEMP VIEW recorded AS SELECT {kept}, CASE WHEN variant IN ({rivals}) THEN 'rival' ELSE 'candidate' END AS role,
        CASE WHEN incumbent IS NULL OR incumbent IN ({rivals}) THEN 'rival' ELSE 'yardstick' END AS incumbent_role FROM main.records"""
    )
    connection.execute("CREATE TEMP VIEW texts AS SELECT id AS number, key, content FROM main.words")


def _spelled(backend: str) -> Iterator[str]:
    space = Space.read(backend)
    for values in product(*(axis.values for axis in space.axes)):
        yield str(space.variant({axis.name: value for axis, value in zip(space.axes, values, strict=True)}))
