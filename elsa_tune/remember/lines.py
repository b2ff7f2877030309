"""Measurements as lines of canonical JSON: equal content is equal bytes, and a change is a readable diff."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

from elsa_tune import places
from elsa_tune.errors import FolderTaken
from elsa_tune.measurement import Measurement


def read(path: Path) -> Iterator[Measurement]:
    """Measurements from JSON lines of our own writing, as `cache/` ships them."""
    for line in path.read_text().splitlines():
        if line.strip():
            yield Measurement.from_line(line)


def sorted_lines(measurements: Iterable[Measurement]) -> list[str]:
    """Canonical lines, each once, by device, problem, variant and content."""
    return [line for *_, line in sorted(set(map(place_of, measurements)))]


def place_of(m: Measurement) -> tuple[str, str, str, str]:
    """What lines are sorted by; the last is the line itself."""
    return m.device, m.problem, m.variant, m.line


def write(measurements: Iterable[Measurement], path: Path) -> int:
    """Write canonical, sorted lines, packed where the name ends in .gz; how many. Whole or not at all. Raises FolderTaken."""
    return write_lines(sorted_lines(measurements), path)


def write_lines(lines: list[str], path: Path) -> int:
    """Write lines that are sorted already, as ``write``."""
    text = "".join(f"{line}\n" for line in lines).encode()
    try:
        places.replace(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    except OSError as error:
        raise FolderTaken(f"{path}: {error}; name a file that can be written with -o") from error
    return len(lines)
