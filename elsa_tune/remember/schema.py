"""What the database looks like: tables, indexes and views in plain SQL, and a measurement as a row."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from elsa_tune.measurement import Measurement
from elsa_tune.remember import evidence

FORMAT = 3
"""``PRAGMA user_version`` of a database that this version writes; earlier ones are in ``earlier``."""

LONGEST_INLINE = 64
"""Characters of an incumbent's samples that are kept in their row."""

NUMBERS = ("error", "constant", "seconds", "ratio", "ratio_low", "ratio_high", "created")
NAMES = ("device", "family", "problem", "variant", "digest", "incumbent", "reason")
FACTS = ("resources", "provenance")
TEXTS = (*NAMES, *FACTS, "incumbent_samples")
"""Columns that hold the number of a text: what repeats is kept once."""

RACE = "incumbent_samples"
"""The one of them that stands in its row itself where it is short."""

PLAIN = ("status", "stage", "role", "incumbent_role")
COLUMNS = ("id", "local", *PLAIN, *TEXTS, *NUMBERS, "samples")

# `local` says that this database's own machine measured it; it is no part of the content, as the number of a row is not.
TABLES = f"""
CREATE TABLE texts (number INTEGER PRIMARY KEY, key INTEGER NOT NULL UNIQUE, content TEXT NOT NULL);
CREATE TABLE recorded (
  number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, local INTEGER NOT NULL,
  {", ".join(f"{name} TEXT NOT NULL" for name in PLAIN)},
  {", ".join(f"{name} INTEGER" for name in TEXTS)},
  {", ".join(f"{name} REAL" for name in NUMBERS)}, samples TEXT NOT NULL
);
CREATE INDEX recorded_by_problem ON recorded (device, problem);
CREATE INDEX recorded_finals ON recorded (device, family, problem) WHERE status = 'ok' AND stage = 'final';
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

TRAFFIC = """CREATE TABLE IF NOT EXISTS traffic (
  number INTEGER PRIMARY KEY, device TEXT NOT NULL, problem TEXT NOT NULL, calls INTEGER NOT NULL, seconds REAL NOT NULL,
  process TEXT NOT NULL, wall REAL NOT NULL, torch TEXT NOT NULL, threads INTEGER NOT NULL,
  UNIQUE (process, device, problem, wall)
)"""
"""What programs asked (elsa_tune.traffic), beside the measurements and of no format of theirs: a database that has no such table gains it
when it is written to."""


def _content(name: str) -> str:
    return f"(SELECT content FROM texts WHERE number = r.{name}) AS {name}"


_SAID = f"""lower(hex(r.id)) AS id, r.local, {", ".join(f"r.{name}" for name in PLAIN)}, {", ".join(map(_content, (*NAMES, *FACTS)))},
  {", ".join(f"r.{name}" for name in NUMBERS if not name.startswith("ratio"))}"""
_SAMPLES = """r.samples, CASE typeof(r.incumbent_samples) WHEN 'integer'
  THEN (SELECT content FROM texts WHERE number = r.incumbent_samples) ELSE r.incumbent_samples END AS incumbent_samples"""
VIEWS = {
    "measurements": f"""SELECT {_SAID}, r.ratio, r.ratio_low, r.ratio_high,
  {_SAMPLES}
  FROM recorded r""",
    "winners": f"""SELECT {_SAID}, w.ratio, w.ratio_low, w.ratio_high, w.finals,
  {_SAMPLES}
  FROM ({evidence.WINNERS.format(where="")}) w JOIN recorded r ON r.number = w.number""",
}
"""What anyone's SQL reads, samples and facts as JSON; the ratio of a winner is that of all its finals together."""


def key(text: str) -> int:
    """What a text is found by: 64 bits of its digest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


_plain, _names, _numbers = attrgetter(*PLAIN), attrgetter(*NAMES), attrgetter(*NUMBERS)


def row(m: Measurement, local: bool) -> list[Any]:
    """A measurement as COLUMNS; those of TEXTS hold the text itself, or None for an empty one."""
    texts = [*(text or None for text in _names(m)), *map(m.said.get, (*FACTS, RACE))]
    return [bytes.fromhex(m.id), int(local), *_plain(m), *texts, *_numbers(m), m.said.get("samples", "[]")]


def measurement(row: Mapping[str, Any]) -> Measurement:
    """The measurement that ``row`` made a row of; what was never one may raise any of UNREADABLE."""
    known: dict[str, Any] = {name: row[name] for name in (*PLAIN, *NUMBERS) if name in row}
    known |= {name: row[name] or "" for name in NAMES if name != "family"}
    known |= {name: json.loads(row[name] or "{}") for name in FACTS}
    known |= {name: _samples(row[name]) for name in ("samples", "incumbent_samples")}
    return Measurement(**known)


def _samples(samples: str | bytes | None) -> tuple[float, ...]:
    if isinstance(samples, bytes):  # as format 2 kept them
        return struct.unpack(f"<{len(samples) // 4}f", samples)
    return tuple(json.loads(samples)) if samples else ()


UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError, struct.error)
"""What making a measurement of a row that nobody recorded may raise."""
