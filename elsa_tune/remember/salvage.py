"""What can still be read of a database that is damaged: rows in the leaves of its file, wherever those lie.

Nothing of SQLite is asked, so nothing has to be whole but a leaf itself: neither the first page, nor the schema, nor the pages
that lead to the leaf. A row counts if its name is the digest of its content. The format: https://www.sqlite.org/fileformat2.html
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

from elsa_tune.measurement import Measurement
from elsa_tune.remember import earlier, schema

PAGE = 4096
"""Bytes of a page, where the header does not say: SQLite's default, which this program writes."""

MOST_READINGS = 64
"""Readings of one row that are tried, where numbers of texts were used twice."""

_LEAF = 13
"""What a page that holds rows of a table begins with."""

_TORN = (*schema.UNREADABLE, IndexError)

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
    for number, values in _rows(path):
        if len(values) == 3 and isinstance(values[1], int) and isinstance(values[2], str | bytes):
            texts[number].add(values[2])
        elif version := _FORMATS.get(len(values)):
            found.append((version, dict(zip(_COLUMNS[version], values, strict=True))))
    for version, row in found:
        for reading in islice(_readings(row, texts), MOST_READINGS):
            with suppress(*_TORN):
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


# Pages.


def _rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """Number and values of every row that a leaf of the file or of its log holds."""
    content = path.read_bytes() if path.is_file() else b""
    size = _page_size(content)
    pages = {number + 1: content[number * size : (number + 1) * size] for number in range(-(-len(content) // size))}
    leaves = list(pages.values())
    log = path.with_name(path.name + "-wal")
    if log.is_file():
        frames = log.read_bytes()[32:]
        for start in range(0, len(frames), 24 + size):
            leaves.append(frames[start + 24 : start + 24 + size])
            pages[int.from_bytes(frames[start : start + 4], "big")] = leaves[-1]
    first = content[:size]
    for leaf in leaves:
        begin = 100 if leaf is pages.get(1) or leaf == first else 0
        if len(leaf) == size and leaf[begin] == _LEAF:
            yield from _cells(leaf, begin, size, pages)


def _page_size(content: bytes) -> int:
    said = int.from_bytes(content[16:18], "big")
    is_one = content.startswith(b"SQLite format 3\0") and said >= 512 and said & (said - 1) == 0
    return said if is_one else PAGE


def _cells(leaf: bytes, begin: int, size: int, pages: Mapping[int, bytes]) -> Iterator[tuple[int, list[Any]]]:
    for cell in range(int.from_bytes(leaf[begin + 3 : begin + 5], "big")):
        with suppress(*_TORN):
            at = int.from_bytes(leaf[begin + 8 + 2 * cell : begin + 10 + 2 * cell], "big")
            length, at = _varint(leaf, at)
            number, at = _varint(leaf, at)
            yield number, _values(_payload(leaf, at, length, size, pages))


def _payload(leaf: bytes, at: int, length: int, size: int, pages: Mapping[int, bytes]) -> bytes:
    """The bytes of a row: in its leaf, and where they are many in a chain of pages of their own."""
    if length <= size - 35:
        return leaf[at : at + length]
    least = (size - 12) * 32 // 255 - 23
    here = least + (length - least) % (size - 4)
    here = here if here <= size - 35 else least
    parts, left = [leaf[at : at + here]], length - here
    following = int.from_bytes(leaf[at + here : at + here + 4], "big")
    while left > 0:
        page = pages[following]
        parts.append(page[4 : 4 + left])
        left -= size - 4
        following = int.from_bytes(page[:4], "big")
    return b"".join(parts)


def _values(payload: bytes) -> list[Any]:
    """The columns of a record: the kinds of all of them come first."""
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        length = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)[kind] if kind < 10 else (kind - 12) // 2
        part = payload[at : at + length]
        if len(part) < length:
            raise ValueError("cut off")
        at += length
        values.append(_value(kind, part))
    return values


def _value(kind: int, part: bytes) -> Any:
    if kind == 0:
        return None
    if kind <= 6:
        return int.from_bytes(part, "big", signed=True)
    if kind == 7:
        return struct.unpack(">d", part)[0]
    if kind < 10:
        return kind - 8
    return part.decode() if kind % 2 else part


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, seven bits each, and where it ends."""
    value = 0
    for used in range(8):
        value = value << 7 | content[at + used] & 0x7F
        if content[at + used] < 0x80:
            return value, at + used + 1
    return value << 8 | content[at + 8], at + 9
