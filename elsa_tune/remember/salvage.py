"""What can still be read of a database that is damaged: rows in the leaves of its file, wherever those lie.

Nothing of SQLite is asked, so nothing has to be whole but a leaf itself: neither the first page, nor the schema, nor the pages
that lead to the leaf. A row counts if its name is the digest of its content.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

from elsa_tune.measurement import Measurement
from elsa_tune.remember import earlier, schema
from elsa_tune.remember.pages import Pages

MOST_READINGS = 64
"""Readings of one row that are tried, where numbers of texts were used twice."""

_COLUMNS = {
    schema.FORMAT: ("number", *schema.COLUMNS),
    **earlier.COLUMNS,
}
_FORMATS = {len(columns): version for version, columns in _COLUMNS.items()}


def set_aside(path: Path) -> Path:
    """Move a database that cannot be read out of the way, never over another file."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while (target := path.with_name(f"{path.name}.corrupt-{stamp}-{number}")).exists():
        number += 1
    with suppress(FileNotFoundError):  # another process has just set it aside
        path.rename(target)
    for tail in ("-wal", "-shm"):
        companion = path.with_name(path.name + tail)
        if companion.exists():
            companion.rename(target.with_name(target.name + tail))
    return target


def measurements(path: Path) -> Iterator[tuple[Measurement, bool]]:
    """Every measurement, of any format, that is left in a file and its log and is what was recorded, and whether its machine
    made it; in no order, and perhaps twice."""
    texts: dict[int, set[Any]] = defaultdict(set)
    found = []
    for number, values in Pages(path).rows():
        if len(values) == 3 and isinstance(values[1], int) and isinstance(values[2], str | bytes):
            texts[number].add(values[2])
        elif version := _FORMATS.get(len(values)):
            found.append((version, dict(zip(_COLUMNS[version], values, strict=True))))
    for version, row in found:
        for reading in islice(_readings(row, texts), MOST_READINGS):
            with suppress(*schema.UNREADABLE, IndexError):
                if sound := _sound(version, reading):
                    yield sound
                    break


def _sound(version: int, row: Mapping[str, Any]) -> tuple[Measurement, bool] | None:
    if version != schema.FORMAT:
        return earlier.measurement(version, row)
    found = schema.measurement(row)
    return (found, bool(row["local"])) if found.id == row["id"].hex() else None


def _readings(row: dict[str, Any], texts: Mapping[int, set[Any]]) -> Iterator[dict[str, Any]]:
    """A row with its texts: several, where an older text of the same number is left in the file too."""
    named = [name for name in schema.TEXTS if isinstance(row.get(name), int)]
    for chosen in product(*(texts.get(row[name], ()) for name in named)):
        yield {**row, **dict(zip(named, chosen, strict=True))}
