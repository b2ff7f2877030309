"""A SQLite file page by page, without SQLite: rows in leaves wherever they lie, and the pages of each table that cannot be read.

The format: https://www.sqlite.org/fileformat2.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE = 4096
"""Bytes of a page, where the header does not say: SQLite's default, which this program writes."""

MAGIC = b"SQLite format 3\0"

TORN = (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error)
"""What reading bytes that nobody wrote may raise."""

MOST_TOLD = 8
"""Runs of pages that are told one by one."""

_KINDS = {"table": (5, 13), "index": (2, 10)}
"""What pages of a tree begin with: those that lead to others, and its leaves."""


class Pages:
    """The pages of a file and of its write-ahead log."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        size = self._size = _page_size(content)
        self._first = content[:size]
        self._newest = {
            number + 1: content[number * size : (number + 1) * size] for number in range(-(-len(content) // size))
        }
        self._every = list(self._newest.values())
        log = path.with_name(path.name + "-wal")
        frames = log.read_bytes()[32:] if log.is_file() else b""
        for start in range(0, len(frames) - 23 - size, 24 + size):
            self._every.append(frames[start + 24 : start + 24 + size])
            self._newest[_integer(frames, start, 4)] = self._every[-1]

    def rows(self) -> Iterator[tuple[int, list[Any]]]:
        """Number and values of every row that a leaf of the file or of its log holds, older ones too."""
        for page in self._every:
            begin = 100 if page is self._newest.get(1) or page == self._first else 0
            if len(page) == self._size and page[begin] == _KINDS["table"][1]:
                yield from self._cells(page, begin)

    def damage(self) -> list[str]:
        """Each table and index that has pages which cannot be read, and which those are; what only such a page leads to is not
        seen, and whether a row is what was recorded nobody but its digest says."""
        told = [] if self._first.startswith(MAGIC) else ["the header: page 1"]
        for kind, name, root in [("table", "sqlite_schema", 1), *self._roots()]:
            if torn := sorted(number for number, page in self._tree(kind, root) if not page):
                told.append(f"{kind} {name}: page{'s' * (len(torn) > 1)} {_runs(torn)}")
        return told

    def _roots(self) -> Iterator[tuple[str, str, int]]:
        """Kind, name and first page of each table and index that the schema names."""
        for number, page in self._tree("table", 1):
            begin = 100 if number == 1 else 0
            if page and page[begin] == _KINDS["table"][1]:
                for _, values in self._cells(page, begin):
                    with suppress(*TORN):
                        kind, name, _, root, _ = values
                        if kind in _KINDS and isinstance(root, int) and root > 0:
                            yield kind, name, root

    def _tree(self, kind: str, root: int) -> Iterator[tuple[int, bytes]]:
        """Number and content of each page of a tree; no content where it is not a page of such a tree."""
        pending, seen = [root], set[int]()
        while pending:
            number = pending.pop()
            if number not in seen:
                seen.add(number)
                try:
                    pending += self._below(kind, number)
                    yield number, self._newest[number]
                except TORN:
                    yield number, b""

    def _below(self, kind: str, number: int) -> list[int]:
        """The pages that a page leads to. Raises any of TORN where it is not one of such a tree."""
        page, begin = self._newest[number], 100 if number == 1 else 0
        inner, leaf = _KINDS[kind]
        if len(page) != self._size or page[begin] not in (inner, leaf):
            raise ValueError("not a page of this tree")
        cells, first = _integer(page, begin + 3, 2), begin + (12 if page[begin] == inner else 8)
        places = [_integer(page, first + 2 * cell, 2) for cell in range(cells)]
        if any(not first + 2 * cells <= at < self._size for at in places):
            raise ValueError("cells outside the page")
        if page[begin] == inner:
            return [*(_integer(page, at, 4) for at in places), _integer(page, begin + 8, 4)]
        if kind == "table" and len(list(self._cells(page, begin))) < cells:
            raise ValueError("rows that cannot be read")
        return []

    def _cells(self, leaf: bytes, begin: int) -> Iterator[tuple[int, list[Any]]]:
        for cell in range(_integer(leaf, begin + 3, 2)):
            with suppress(*TORN):
                at = _integer(leaf, begin + 8 + 2 * cell, 2)
                length, at = _varint(leaf, at)
                number, at = _varint(leaf, at)
                yield number, _values(_payload(leaf, at, length, self._size, self._newest))


def _runs(numbers: list[int]) -> str:
    """Numbers in ascending order, neighbours as a run: 3, 7-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:MOST_TOLD])
    return told + (f" and {sum(map(len, runs[MOST_TOLD:]))} more" if len(runs) > MOST_TOLD else "")


def _integer(content: bytes, at: int, length: int) -> int:
    if at + length > len(content):
        raise ValueError("cut off")
    return int.from_bytes(content[at : at + length], "big")


def _page_size(content: bytes) -> int:
    said = int.from_bytes(content[16:18], "big")
    is_one = content.startswith(MAGIC) and said >= 512 and said & (said - 1) == 0
    return said if is_one else PAGE


def _payload(leaf: bytes, at: int, length: int, size: int, pages: Mapping[int, bytes]) -> bytes:
    """The bytes of a row: in its leaf, and where they are many in a chain of pages of their own."""
    if length <= size - 35:
        return leaf[at : at + length]
    if length > len(pages) * size:
        raise ValueError("longer than the file")
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
