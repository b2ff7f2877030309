"""Databases as earlier versions wrote them: what the first and the second format kept of the same measurements."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from elsa_tune.measurement import Measurement, canonical
from elsa_tune.remember import earlier

NUMBERS = ("error", "constant", "seconds", "ratio", "ratio_low", "ratio_high", "created")
NAMES = ("device", "family", "problem", "variant", "digest", "incumbent", "reason")
WORDS = (*NAMES, "resources", "provenance", "incumbent_samples")


def first(path: Path, rows: Iterable[Measurement]) -> None:
    """A database of format 1."""
    columns = [*["id", "device", "family", "problem", "variant", "digest", "stage", "status", "reason", "error", "constant", "seconds"],
               *["ratio", "ratio_low", "ratio_high", "samples", "incumbent", "incumbent_samples", "resources", "provenance", "created"]]  # fmt: skip
    with closing(sqlite3.connect(path)) as old, old:
        old.execute(f"CREATE TABLE measurements ({', '.join(columns)})")
        old.execute("CREATE VIEW winners AS SELECT * FROM measurements")
        for m in map(earlier.unsaid, rows):
            facts = {name: getattr(m, name) for name in columns}
            facts |= {"samples": json.dumps(m.samples), "incumbent_samples": json.dumps(m.incumbent_samples)}
            facts |= {"resources": json.dumps(dict(m.resources)), "provenance": json.dumps(dict(m.provenance))}
            old.execute(
                f"INSERT INTO measurements VALUES ({', '.join('?' * len(columns))})", [facts[c] for c in columns]
            )
        old.execute("PRAGMA user_version = 1")


def second(path: Path, rows: Iterable[tuple[Measurement, bool]], about: Mapping[str, str]) -> None:
    """A database of format 2, in its write-ahead log's mode: measurements, each with whether this machine made it."""
    with closing(sqlite3.connect(path)) as old, old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(
            f"""CREATE TABLE words (id INTEGER PRIMARY KEY, key INTEGER NOT NULL UNIQUE, content NOT NULL);
            CREATE TABLE records (number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, local INTEGER NOT NULL,
              status TEXT NOT NULL, stage TEXT NOT NULL, {", ".join(f"{name} INTEGER" for name in WORDS)},
              {", ".join(f"{name} REAL" for name in NUMBERS)}, samples BLOB);
            CREATE INDEX by_problem ON records (device, problem);
            CREATE INDEX finals ON records (device, family, problem) WHERE status = 'ok' AND stage = 'final';
            CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
            CREATE VIEW measurements AS SELECT * FROM records;
            CREATE VIEW winners AS SELECT * FROM measurements;
            PRAGMA user_version = 2"""
        )
        old.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        for m, local in rows:
            m = earlier.unsaid(m)
            words: dict[str, Any] = {name: getattr(m, name) for name in NAMES}
            words |= {name: canonical(dict(facts)) if facts else "" for name, facts in (("resources", m.resources), ("provenance", m.provenance))}  # fmt: skip
            race = _packed(m.incumbent_samples)
            facts = {"id": bytes.fromhex(m.id), "local": int(local), "status": m.status, "stage": m.stage}
            facts |= {name: _word(old, content) for name, content in words.items()}
            facts["incumbent_samples"] = _word(old, race) if len(race) > 64 else race or None
            facts |= {name: getattr(m, name) for name in NUMBERS} | {"samples": _packed(m.samples)}
            old.execute(
                f"INSERT INTO records ({', '.join(facts)}) VALUES ({', '.join('?' * len(facts))})", [*facts.values()]
            )


def _packed(samples: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(samples)}f", *samples)


def _word(old: sqlite3.Connection, content: str | bytes) -> int | None:
    if not content:
        return None
    digest = hashlib.sha256(content if isinstance(content, bytes) else content.encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    old.execute("INSERT OR IGNORE INTO words (key, content) VALUES (?, ?)", [key, content])
    return int(old.execute("SELECT id FROM words WHERE key = ?", [key]).fetchone()[0])
