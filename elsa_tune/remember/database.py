"""The database: records measurements, derives winners. The only file that speaks SQL."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from elsa_tune import places
from elsa_tune.errors import DatabaseUnusable, ElsaTuneError
from elsa_tune.measurement import Evidence, Measurement, canonical
from elsa_tune.remember import evidence

T = TypeVar("T")

SCHEMA_VERSION = 2
PATIENCE = 30.0
"""Seconds that a writer waits for another to let go of the database."""

_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "ceph", "9p", "fuse.sshfs"}

_UNREADABLE = (sqlite3.DatabaseError, ValueError, TypeError, AttributeError, KeyError, RecursionError, struct.error)
"""What reading a row that nobody recorded may raise."""

LONGEST_INLINE = 64
"""Bytes of an incumbent's samples that are kept in their row."""

LEAST_ROW = 60
"""Bytes that no row is smaller than."""

_NUMBERS = ("error", "constant", "seconds", "ratio", "ratio_low", "ratio_high", "created")
_TEXTS = ("device", "family", "problem", "variant", "digest", "incumbent", "reason")
_WORDS = (*_TEXTS, "resources", "provenance", "incumbent_samples")
_PLAIN = ("status", "stage")
_COLUMNS = ("id", "local", *_PLAIN, *_WORDS, *_NUMBERS, "samples")

# What repeats is a word, kept once. `local` says that this database's own machine measured it; it is no part of the content.
_SCHEMA = f"""
CREATE TABLE words (id INTEGER PRIMARY KEY, key INTEGER NOT NULL UNIQUE, content NOT NULL);
CREATE TABLE records (
  number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, local INTEGER NOT NULL, status TEXT NOT NULL, stage TEXT NOT NULL,
  {", ".join(f"{name} INTEGER" for name in _WORDS)},
  {", ".join(f"{name} REAL" for name in _NUMBERS)}, samples BLOB
);
CREATE INDEX by_problem ON records (device, problem);
CREATE INDEX finals ON records (device, family, problem) WHERE status = 'ok' AND stage = 'final';
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_KEPT = [name for name in ("local", *_PLAIN, *_NUMBERS) if not name.startswith("ratio")]
_VIEWS = {
    "measurements": f"""SELECT hex(r.id) AS id, {", ".join(f"r.{n}" for n in ("local", *_PLAIN, *_NUMBERS))},
  {", ".join(f"(SELECT content FROM words w WHERE w.id = r.{name}) AS {name}" for name in _WORDS if name != "incumbent_samples")}
  FROM records r""",
    "winners": f"""SELECT m.id, {", ".join(f"m.{name}" for name in (*_KEPT, *_TEXTS, "resources", "provenance"))},
  w.ratio, w.ratio_low, w.ratio_high, w.finals FROM measurements m JOIN ({evidence.WINNERS.format(where="")}) w ON m.id = hex(w.id)""",
}
"""What anyone's SQL reads; the ratio of a winner is that of all its finals together."""


def _on_network(path: Path) -> bool:
    """Whether the path lies on a file system shared by hosts, where SQLite's write-ahead log does not work."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    inside = [(len(where), kind) for where, kind in mounts if str(path.resolve()).startswith(where.rstrip("/") + "/")]
    return bool(inside) and max(inside)[1] in _NETWORK_FILE_SYSTEMS


def _identity(path: Path) -> tuple[int, int]:
    """What tells one file from another of the same name."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _key(content: str | bytes) -> int:
    digest = hashlib.sha256(content if isinstance(content, bytes) else content.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _packed(samples: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(samples)}f", *samples)


def _unpacked(blob: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(blob) // 4}f", blob)


def _json(facts: Mapping[str, Any]) -> str:
    return canonical(dict(facts)) if facts else ""


class Database:
    """Append-only measurements and the view of winners over them."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.name = name
        self._connection = connection
        self._ids: dict[str | bytes, int] = {}  # word -> its number
        self._contents: dict[int, str | bytes] = {}
        self._latest: float | None = None
        self._file: tuple[int, int] | None = None  # that it was opened on, for writing

    # Opening.

    @classmethod
    def for_writing(cls, path: Path | None = None) -> Database:
        """Open or create; a corrupt file is set aside first, and what can be read of it is kept. Raises DatabaseUnusable."""
        path = path or places.database()
        deadline = time.monotonic() + PATIENCE
        aside: Path | None = None
        while True:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                database = cls._open(path)
            except sqlite3.OperationalError as error:
                # SQLite never waits for a lock in the way of a change of journal mode, so this does.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise DatabaseUnusable(
                        f"{path}: {error}; make it writable, close what locks it, or set ELSA_TUNE_HOME to another folder"
                    ) from error
                time.sleep(0.02)
            except sqlite3.DatabaseError:
                aside = set_aside(path)
            except OSError as error:
                raise DatabaseUnusable(f"{path}: {error}; set ELSA_TUNE_HOME to a writable folder") from error
            else:
                if aside is not None:
                    database._keep_what_is_left(aside)
                return database

    @classmethod
    def _open(cls, path: Path) -> Database:
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise DatabaseUnusable(
                    f"{path} was written by a newer elsa-tune (format {version}, this one reads {SCHEMA_VERSION}); upgrade"
                )
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            if os.name == "posix" and path.stat().st_uid == os.getuid():
                path.chmod(path.stat().st_mode & ~0o022)  # a database that others may change is not read
            connection.execute(f"PRAGMA journal_mode = {'DELETE' if _on_network(path) else 'WAL'}")
            connection.execute("PRAGMA synchronous = FULL")
            database = cls(connection, str(path))
            database._file = _identity(path)
            database._create()
            return database
        except BaseException:
            connection.close()
            raise

    @classmethod
    def for_reading(cls, path: Path) -> Database:
        """Open without ever writing or waiting long. Raises DatabaseUnusable."""
        if not path.is_file():
            raise DatabaseUnusable(f"there is no database at {path}; run elsa-tune, or name a file that is there")
        for options in ("mode=ro", "mode=ro&immutable=1"):
            try:
                connection = sqlite3.connect(
                    f"{path.resolve().as_uri()}?{options}", uri=True, timeout=0.2, check_same_thread=False
                )
                connection.execute("PRAGMA trusted_schema = OFF")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version > SCHEMA_VERSION:
                    raise DatabaseUnusable(
                        f"{path} is of format {version}, this version reads {SCHEMA_VERSION}; upgrade elsa-tune"
                    )
                if version == 1:
                    raise DatabaseUnusable(
                        f"{path} is of format 1; the next elsa-tune, or elsa-tune db info, rewrites it"
                    )
                kinds = connection.execute(
                    "SELECT type FROM sqlite_master WHERE name IN ('records', 'words')"
                ).fetchall()
                if kinds != [("table",)] * 2:  # somebody's else; a view could make reading last for ever
                    raise DatabaseUnusable(f"{path} is no database of measurements; name another")
            except sqlite3.OperationalError as error:
                failure: Exception = error
                if "locked" in str(error) or "no such table" in str(error):
                    break
                continue
            except sqlite3.DatabaseError as error:
                failure = error
                break
            return cls(connection, str(path))
        raise DatabaseUnusable(f"{path}: {failure}; `elsa-tune doctor` says more") from failure

    @classmethod
    def in_memory(cls, measurements: Iterable[Measurement], name: str) -> Database:
        """A database of the given measurements."""
        database = cls(sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None), name)
        database._create()
        database.add(measurements)
        return database

    def _create(self) -> None:
        with self._transaction():
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                self._define_views()
                return
            old = self._measurements_of_format_1() if version == 1 else []
            for statement in filter(str.strip, _SCHEMA.split(";\n")):
                self._connection.execute(statement)
            self._define_views()
            self._connection.execute("INSERT INTO about VALUES ('installation', ?)", [secrets.token_hex(8)])
            self._insert((m, not m.incumbent or m.incumbent.startswith("sdpa.")) for m in old)
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _define_views(self) -> None:
        """Define the views as this version does; an older one may have written the file."""
        found = dict(self._connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
        for name, select in _VIEWS.items():
            wanted = f"CREATE VIEW {name} AS {select}"
            if found.get(name) != wanted:
                self._connection.execute(f"DROP VIEW IF EXISTS {name}")
                self._connection.execute(wanted)

    def _measurements_of_format_1(self) -> list[Measurement]:
        cursor = self._connection.execute("SELECT * FROM measurements")
        names, found = [column[0] for column in cursor.description], []
        for row in cursor:
            known = {name: value for name, value in zip(names, row, strict=True) if name not in ("id", "family")}
            for name in ("samples", "incumbent_samples", "resources", "provenance"):
                known[name] = json.loads(known[name])
            found.append(Measurement(**known))
        self._connection.execute("DROP VIEW winners")
        self._connection.execute("DROP TABLE measurements")
        return found

    @property
    def installation(self) -> str:
        """This database's random name, which its measurements carry; it says nothing of user or host."""
        return self.about("installation")

    def about(self, name: str) -> str:
        """A fact this database keeps beside its measurements; empty if it keeps none of that name."""
        found = self._connection.execute("SELECT value FROM about WHERE name = ?", [name]).fetchone()
        return str(found[0]) if found else ""

    # Writing.

    def now(self) -> float:
        """Seconds since 1970, later than anything this machine has recorded: a clock that was set back must not make old
        measurements the newest."""
        if self._latest is None:
            newest = self._connection.execute("SELECT MAX(created) FROM records WHERE local = 1").fetchone()[0]
            self._latest = float(newest or 0.0)
        self._latest = max(time.time(), self._latest + 1e-3)
        return self._latest

    def note(self, name: str, value: str) -> None:
        """Keep a fact beside the measurements."""
        self._lastingly(lambda: self._connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", [name, value]))

    def _lastingly(self, write: Callable[[], T]) -> T:
        """What ``write`` returns, in a transaction; again in the new file, if another process has set this one aside."""
        while True:
            with self._transaction():
                result = write()
            if not self._is_set_aside():
                return result
            successor = Database.for_writing(Path(self.name))
            self._connection.close()
            self._connection, self._file = successor._connection, successor._file
            self._contents.clear()
            self._ids.clear()

    def _is_set_aside(self) -> bool:
        """Whether the file that this was opened on no longer bears its name."""
        if self._file is None:
            return False
        with suppress(OSError):
            return _identity(Path(self.name)) != self._file
        return True

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. Raises DatabaseUnusable where the disk is full or what was opened cannot be written."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._ids.clear()
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
                raise DatabaseUnusable(
                    f"{self.name}: {error}; free some space or make it writable; what was recorded before is kept"
                ) from error
            raise

    def record(self, measurement: Measurement) -> None:
        """Append what this machine measured; the same measurement twice is one row. Durable when this returns."""
        self._lastingly(lambda: self._insert([(measurement, True)]))

    def add(self, measurements: Iterable[Measurement], at_once: int = 5000) -> int:
        """Append what others measured, and say how many were new. Durable in portions of ``at_once``."""
        each, new = iter(measurements), 0
        while portion := [(m, False) for m in islice(each, at_once)]:
            new += self._lastingly(partial(self._insert, portion))
        return new

    def _insert(self, measurements: Iterable[tuple[Measurement, bool]]) -> int:
        before = self._connection.total_changes
        words = self._connection.total_changes
        rows = []
        for m, local in measurements:
            texts = [*(getattr(m, name) for name in _TEXTS), _json(m.resources), _json(m.provenance)]
            numbers = [*map(self._id_of, texts), self._shared(_packed(m.incumbent_samples))]
            plain = (m.status, m.stage, *numbers, *(getattr(m, name) for name in _NUMBERS))
            rows.append((bytes.fromhex(m.id), int(local), *plain, _packed(m.samples)))
        words = self._connection.total_changes - words
        marks = ", ".join("?" * len(_COLUMNS))
        self._connection.executemany(f"INSERT OR IGNORE INTO records ({', '.join(_COLUMNS)}) VALUES ({marks})", rows)
        return self._connection.total_changes - before - words

    def _shared(self, samples: bytes) -> int | bytes | None:
        """The incumbent's samples: as a word, because finalists share them, unless they are shorter than a word costs."""
        return self._id_of(samples) if len(samples) > LONGEST_INLINE else samples

    def _id_of(self, content: str | bytes) -> int | None:
        """The number of a word, new or old; None for an empty one."""
        if not content:
            return None
        if content not in self._ids:
            key = _key(content)
            made = self._connection.execute("INSERT OR IGNORE INTO words (key, content) VALUES (?, ?)", [key, content])
            if made.rowcount == 1:
                self._ids[content] = int(made.lastrowid or 0)
            else:
                found = self._connection.execute("SELECT id FROM words WHERE key = ?", [key]).fetchone()
                self._ids[content] = int(found[0])
        return self._ids[content]

    # Reading.

    def measurements(self, local: bool | None = None, **equal: str) -> list[Measurement]:
        """Measurements whose columns equal the given values, oldest first; ``local``: this machine's own, or only others'."""
        return list(self._read(f"SELECT {', '.join(_COLUMNS)} FROM records", local, equal, "ORDER BY created, id"))

    def __iter__(self) -> Iterator[Measurement]:
        """Every measurement, in no order that means anything. Raises DatabaseUnusable."""
        try:
            self._contents.update(self._connection.execute("SELECT id, content FROM words"))
            yield from self._read(f"SELECT {', '.join(_COLUMNS)} FROM records", None, {}, "")
        except _UNREADABLE as error:
            raise DatabaseUnusable(f"{self.name}: {error}; elsa-tune db verify mends one's own") from error

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM records").fetchone()[0])

    def winners(
        self,
        local: bool | None = None,
        devices: Collection[str] = (),
        families: Collection[str] = (),
        understood: Callable[[str], bool] = lambda variant: True,
        **equal: str,
    ) -> list[Evidence]:
        """What wins each device and problem, of those devices and families (all, if none is named) whose columns equal the
        given values. A row that is not what was recorded never counts, nor a variant that is not ``understood``."""
        where, values = self._where(local, equal)
        for column, names in (("device", devices), ("family", families)):
            if names:
                where.append(f"{column} IN ({', '.join('?' * len(names))})")
                values += [self._number_of(name) for name in names]
        return self._pooled(evidence.WINNERS, where, values, understood)

    def evidence(self, local: bool | None = None, **equal: str) -> list[Evidence]:
        """What all finals of each device, problem and variant say together."""
        return self._pooled(evidence.EVERY, *self._where(local, equal))

    def _pooled(
        self, select: str, where: list[str], values: list[Any], understood: Callable[[str], bool] = lambda variant: True
    ) -> list[Evidence]:
        damaged: list[int] = []
        strange: list[int] = []
        while True:
            without = [
                f"{name} NOT IN ({', '.join('?' * len(x))})"
                for name, x in (("number", damaged), ("variant", strange))
                if x
            ]
            condition = "".join(f" AND {one}" for one in [*where, *without])
            rows = self._connection.execute(select.format(where=condition), [*values, *damaged, *strange])
            names_of = [column[0] for column in rows.description]
            found = [dict(zip(names_of, row, strict=True)) for row in rows]
            members = {int(number) for row in found for number in str(row["members"]).split(",")}
            read = list(self._numbered(members))
            bad = [number for number, m, name in read if m.id != name]
            odd = sorted({row["variant"] for row in found if not understood(row["spelling"])})
            if not bad and not odd:
                sound = {name: m for _, m, name in read}
                pools = [
                    Evidence(sound[row["id"].hex()], row["ratio"], row["ratio_low"], row["ratio_high"], row["finals"])
                    for row in found
                ]
                return sorted(pools, key=lambda pool: (pool.measurement.created, pool.measurement.id))
            damaged += bad
            strange += odd

    def _numbered(self, numbers: Iterable[int]) -> Iterator[tuple[int, Measurement, str]]:
        """Number, measurement and name of some rows."""
        each, columns = iter(sorted(numbers)), ("number", *_COLUMNS)
        while portion := list(islice(each, 500)):
            asked = f"SELECT {', '.join(columns)} FROM records WHERE number IN ({', '.join(map(str, portion))})"
            for row in self._connection.execute(asked):
                known = dict(zip(columns, row, strict=True))
                yield known["number"], self._measurement(known), known["id"].hex()

    def counts(self, local: bool | None = None) -> dict[tuple[str, str], int]:
        """(device, status) -> measurements."""
        where, values = self._where(local, {})
        condition = f"WHERE {where[0]}" if where else ""
        rows = self._connection.execute(
            f"SELECT device, status, COUNT(*) FROM records {condition} GROUP BY device, status", values
        ).fetchall()
        return {(str(self._content(device)), str(status)): int(count) for device, status, count in rows}

    def finals_of(self) -> list[tuple[str, str]]:
        """(device, family) pairs that a final was measured for."""
        pairs = self._connection.execute(
            "SELECT DISTINCT device, family FROM records WHERE status = 'ok' AND stage = 'final'"
        ).fetchall()
        return [(str(self._content(device)), str(self._content(family))) for device, family in pairs]

    def slower(self, device: str) -> set[tuple[str, str]]:
        """(problem, variant) pairs whose finals on this device, together, are slower than torch's SDPA."""
        rows = self._connection.execute(
            f"SELECT problem, variant FROM ({evidence.EVERY.format(where='AND device = ?')}) WHERE ratio < 1",
            [self._number_of(device)],
        ).fetchall()
        return {(str(self._content(problem)), str(self._content(variant))) for problem, variant in rows}

    def _where(self, local: bool | None, equal: Mapping[str, str]) -> tuple[list[str], list[Any]]:
        unknown = set(equal) - set(_COLUMNS)
        if unknown:
            raise ElsaTuneError(f"measurements have no column {sorted(unknown)[0]!r}; they have {', '.join(_COLUMNS)}")
        where = [f"{column} = ?" for column in equal]
        values = [self._number_of(text) if column in _WORDS else text for column, text in equal.items()]
        if local is not None:
            where.append(f"local = {int(local)}")
        return where, values

    def _read(self, select: str, local: bool | None, equal: Mapping[str, str], order: str) -> Iterator[Measurement]:
        where, values = self._where(local, equal)
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        rows = self._connection.execute(f"{select} {condition} {order}", values)
        return (self._measurement(dict(zip(_COLUMNS, row, strict=True))) for row in rows)

    def _measurement(self, row: Mapping[str, Any]) -> Measurement:
        known: dict[str, Any] = {name: row[name] for name in (*_PLAIN, *_NUMBERS)}
        for name in _TEXTS:
            known[name] = self._content(row[name])
        del known["family"]
        for name in ("resources", "provenance"):
            known[name] = json.loads(self._content(row[name]) or "{}")
        known["samples"] = _unpacked(row["samples"])
        known["incumbent_samples"] = _unpacked(self._content(row["incumbent_samples"]) or b"")
        return Measurement(**known)

    def _content(self, number: int | bytes | None) -> Any:
        if number is None or isinstance(number, bytes):
            return number or ""
        if number not in self._contents:
            found = self._connection.execute("SELECT content FROM words WHERE id = ?", [number]).fetchone()
            if found is None:
                raise sqlite3.DatabaseError(f"word {number} is missing")
            self._contents[number] = found[0]
        return self._contents[number]

    def _number_of(self, content: str) -> int | None:
        """The number of a word that is there, or None."""
        if content not in self._ids:
            found = self._connection.execute("SELECT id FROM words WHERE key = ?", [_key(content)]).fetchone()
            if found is None:
                return None
            self._ids[content] = int(found[0])
        return self._ids[content]

    # Keeping whole.

    def damaged(self) -> list[int]:
        """Row numbers whose content is not what was recorded: each row's name is the digest of its content."""
        return [number for number, m, name, _ in self._rows_one_by_one() if m is None or m.id != name]

    def _rows_one_by_one(self) -> Iterator[tuple[int, Measurement | None, str, bool]]:
        """Number, measurement (None where it cannot be read), name and locality of every row that has not lost its page."""
        columns = ", ".join(("number", *_COLUMNS))
        pending = [(0, self._last_number())]
        while pending:
            low, high = pending.pop()
            try:
                rows = self._connection.execute(
                    f"SELECT {columns} FROM records NOT INDEXED WHERE number BETWEEN ? AND ?", [low, high]
                ).fetchall()
            except sqlite3.DatabaseError:
                if low < high:
                    middle = (low + high) // 2
                    pending += [(middle + 1, high), (low, middle)]
                continue
            for row in rows:
                known = dict(zip(("number", *_COLUMNS), row, strict=True))
                try:
                    yield row[0], self._measurement(known), known["id"].hex(), bool(known["local"])
                except _UNREADABLE:
                    yield row[0], None, "", False

    def _last_number(self) -> int:
        try:
            return int(self._connection.execute("SELECT COALESCE(MAX(number), 0) FROM records").fetchone()[0])
        except (sqlite3.DatabaseError, TypeError):
            return Path(self.name).stat().st_size // LEAST_ROW

    def _keep_what_is_left(self, aside: Path) -> None:
        """Take over from a file set aside whatever can be read of it and still is what was recorded."""
        with tempfile.TemporaryDirectory(dir=aside.parent) as folder:
            for attempt in (_copied, _copied_with_new_first_page):
                kept = 0
                with suppress(sqlite3.DatabaseError, OSError):
                    copy = attempt(aside, Path(folder))
                    broken = sqlite3.connect(copy, isolation_level=None)
                    broken.text_factory = lambda text: text.decode(errors="replace")
                    try:
                        rows = Database(broken, str(copy))._rows_one_by_one()
                        sound = ((m, local) for _, m, name, local in rows if m is not None and m.id == name)
                        while portion := list(islice(sound, 5000)):
                            kept += self._lastingly(partial(self._insert, portion))
                    finally:
                        broken.close()
                if kept:
                    break

    def pack(self) -> None:
        """Forget words that no measurement uses, and give back the space."""
        used = " UNION ".join(f"SELECT {name} FROM records WHERE {name} IS NOT NULL" for name in _WORDS)
        with self._transaction():
            self._connection.execute(f"DELETE FROM words WHERE id NOT IN ({used})")
        self._contents.clear()
        self._ids.clear()
        self._connection.execute("VACUUM")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _copied(aside: Path, folder: Path) -> Path:
    """A copy of a database and its log, under one name."""
    target = folder / "copy.db"
    shutil.copyfile(aside, target)
    log = aside.with_name(aside.name + "-wal")
    if log.exists():
        shutil.copyfile(log, target.with_name(target.name + "-wal"))
    return target


def _copied_with_new_first_page(aside: Path, folder: Path) -> Path:
    """A copy whose header and tables are a new database's: both are the same in every database of this format."""
    fresh, page = folder / "fresh.db", 4096
    connection = sqlite3.connect(fresh, isolation_level=None)
    connection.executescript(_SCHEMA)  # without views, whose text is longer than a page
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.close()
    target = folder / "mended.db"
    shutil.copyfile(aside, target)
    first = bytearray(fresh.read_bytes()[:page])
    first[28:32] = struct.pack(">I", target.stat().st_size // page)  # pages of the database
    first[32:40] = bytes(8)  # no free pages
    first[92:96] = first[24:28]  # the size is that of this change
    with target.open("r+b") as file:
        file.write(first)
    return target


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


@dataclass(frozen=True, slots=True)
class Health:
    """What verifying a database came to: measurements that are what was recorded; whether the file held together, and those
    that were not what was recorded; files set aside, now or before."""

    sound: int
    whole: bool
    damaged: int
    aside: list[Path] = field(default_factory=list)


def verify(path: Path | None = None) -> Health:
    """Compare every measurement with its digest, and indexes with what they index; where anything differs, a new database
    takes over what is sound, and the file as it was is set aside. Raises DatabaseUnusable."""
    path = path or places.database()
    with Database.for_writing(path) as database:
        try:
            whole = database._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            damaged = len(database.damaged()) if whole else 0
        except sqlite3.DatabaseError:
            whole, damaged = False, 0
    if damaged or not whole:
        aside = set_aside(path)
        with Database.for_writing(path) as database:
            database._keep_what_is_left(aside)
    with Database.for_writing(path) as database:
        return Health(len(database), whole, damaged, sorted(path.parent.glob(f"{path.name}.corrupt-*[0-9]")))
