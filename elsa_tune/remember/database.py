"""The database as who writes sees it: a Reader that records, through sqlite-utils on a connection of our own."""

from __future__ import annotations

import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from elsa_tune import places
from elsa_tune.errors import DatabaseUnusable
from elsa_tune.measurement import Measurement
from elsa_tune.remember import earlier, salvage, schema
from elsa_tune.remember.reading import Reader
from elsa_tune.traffic import FIELDS as TRAFFIC_FIELDS
from elsa_tune.traffic import Traffic

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that a writer waits for another to let go of the database."""

PORTION = 5000
"""Measurements that are recorded together, where they are many."""

AT_ONCE = 500
"""Texts that are looked up in one statement: fewer than the variables that any SQLite takes."""

_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "ceph", "9p", "fuse.sshfs"}


class Tables(Protocol):
    """How a database's tables are made and filled, inside a transaction that somebody else begins and ends."""

    def create(self) -> None:
        """Make the tables of this format."""

    def view(self, name: str, select: str) -> None:
        """Define a view, anew if an older version defined it otherwise."""

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add rows, but for those that are there."""


class _OnDisk:
    """Tables through sqlite-utils, which only who writes to a file waits for: importing it takes 0.15 s."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        import sqlite_utils

        found = version("sqlite-utils")
        if int(found.split(".")[0]) < 4:
            raise DatabaseUnusable(
                f"sqlite-utils {found} is too old: it commits what is not its own; pip install 'sqlite-utils>=4.0'"
            )
        self._tables = sqlite_utils.Database(connection, recursive_triggers=False, execute_plugins=False)

    def create(self) -> None:
        self._tables.executescript(schema.TABLES)

    def view(self, name: str, select: str) -> None:
        self._tables.create_view(name, select, replace=True)

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self._tables.table(table).insert_all([columns, *rows], ignore=True)


class _InMemory:
    """Tables of what is gone with its process, dispatch's copy of the shipped winners among it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def create(self) -> None:
        for statement in schema.TABLES.split(";\n"):
            self._connection.execute(statement)

    def view(self, name: str, select: str) -> None:
        """Nobody else reads it."""

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        marks = ", ".join("?" * len(columns))
        self._connection.executemany(f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)


class Database(Reader):
    """Append-only measurements and facts beside them."""

    def __init__(
        self, connection: sqlite3.Connection, name: str, tables: Tables, file: tuple[int, int] | None = None
    ) -> None:
        super().__init__(connection, name)
        self._tables = tables
        self._file = file  # that it was opened on
        self._latest: float | None = None

    # Opening.

    @classmethod
    def for_writing(cls, path: Path | None = None) -> Database:
        """Open or create; a corrupt file is set aside first, and what can be read of it is kept; one of an earlier format is
        rewritten, and kept beside it as it was. Raises DatabaseUnusable."""
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
                        f"{path}: {error}; free some space, make it writable, close what locks it, or set ELSA_TUNE_HOME to another folder"
                    ) from error
                time.sleep(0.02)
            except sqlite3.DatabaseError:
                try:
                    aside = salvage.set_aside(path)
                except OSError as error:
                    raise DatabaseUnusable(
                        f"{path} is damaged and cannot be set aside: {error.strerror}; make its folder writable"
                    ) from error
            except OSError as error:
                raise DatabaseUnusable(f"{path}: {error}; set ELSA_TUNE_HOME to a writable folder") from error
            else:
                if aside is not None:
                    database.take_over(salvage.measurements(aside))
                return database

    @classmethod
    def _open(cls, path: Path) -> Database:
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > schema.FORMAT:
                raise DatabaseUnusable(
                    f"{path} was written by a newer elsa-tune (format {version}, this one reads {schema.FORMAT}); upgrade"
                )
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            if sys.platform != "win32" and path.stat().st_uid == os.getuid():
                path.chmod(path.stat().st_mode & ~0o022)  # a database that others may change is not read
            connection.execute(f"PRAGMA journal_mode = {'DELETE' if _on_network(path) else 'WAL'}")
            connection.execute("PRAGMA synchronous = FULL")
            database = cls(connection, str(path), _OnDisk(connection), _identity(path))
            database._prepare()
            return database
        except UnicodeDecodeError as error:  # a name of the schema was damaged
            connection.close()
            raise sqlite3.DatabaseError(str(error)) from error
        except BaseException:
            connection.close()
            raise

    @classmethod
    def in_memory(cls, measurements: Iterable[Measurement], name: str) -> Database:
        """A database of the given measurements, as others'."""
        connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        database = cls(connection, name, _InMemory(connection))
        database._prepare()
        database.add(measurements)
        return database

    def _prepare(self) -> None:
        """Tables and views as this version has them; what an earlier one recorded is taken over, all of it or nothing."""
        with self._transaction():
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version != schema.FORMAT:
                self._tables.create()
                if version:
                    self._rewrite(version)
                if not self.installation:
                    self._note("installation", secrets.token_hex(8))
                self._connection.execute(f"PRAGMA user_version = {schema.FORMAT}")
            self._connection.execute(schema.TRAFFIC)
            for name, select in schema.VIEWS.items():
                self._tables.view(name, select)
        if version not in (0, schema.FORMAT):
            with suppress(sqlite3.OperationalError):  # others are reading: then it stays larger than it need be
                self._connection.execute("VACUUM")

    def _rewrite(self, version: int) -> None:
        """Take over what an earlier format holds, and keep the file as it was beside this one.

        In this file and in one transaction: another file under its name would part those who have it open from its log.
        """
        copy = earlier.copied(Path(self.name), version)
        each = earlier.measurements(self._connection, version)
        while portion := list(islice(each, PORTION)):
            self._insert(portion)
        for left in earlier.LEFT[version]:
            self._connection.execute(f"DROP {left}")
        earlier.keep(copy)

    # Writing.

    def now(self) -> float:
        """Seconds since 1970, later than anything this machine has recorded: a clock that was set back must not make old
        measurements the newest."""
        if self._latest is None:
            newest = self._connection.execute("SELECT MAX(created) FROM recorded WHERE local = 1").fetchone()[0]
            self._latest = float(newest or 0.0)
        self._latest = max(time.time(), self._latest + 1e-3)
        return self._latest

    def note(self, name: str, value: str) -> None:
        """Keep a fact beside the measurements."""
        self._lastingly(lambda: self._note(name, value))

    def _note(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", [name, value])

    def record(self, measurement: Measurement) -> None:
        """Append what this machine measured; the same measurement twice is one row. Durable when this returns."""
        self._lastingly(lambda: self._insert([(measurement, True)]))

    def add(self, measurements: Iterable[Measurement], at_once: int = PORTION) -> int:
        """Append what others measured, and say how many were new. Durable in portions of ``at_once``."""
        return self.take_over(((m, False) for m in measurements), at_once)

    def take_over(self, measurements: Iterable[tuple[Measurement, bool]], at_once: int = PORTION) -> int:
        """Append measurements, each with whether this machine made it, and say how many were new. Durable in portions."""
        each, new = iter(measurements), 0
        while portion := list(islice(each, at_once)):
            new += self._lastingly(partial(self._insert, portion))
        return new

    def keep_traffic(self, found: Iterable[Traffic]) -> None:
        """Append what programs asked; the same line twice is one row. Durable when this returns."""
        rows = [[*one.said.values()] for one in found]
        self._lastingly(lambda: self._tables.insert("traffic", TRAFFIC_FIELDS, rows))

    def pack(self) -> None:
        """Forget texts that no measurement uses, and give back the space. Raises DatabaseUnusable."""
        try:
            self._pack()
        except sqlite3.OperationalError as error:
            raise DatabaseUnusable(
                f"{self.name}: {error}; free some space, or end what holds it, and try again"
            ) from error

    def _pack(self) -> None:
        used = " UNION ".join(f"SELECT {name} FROM recorded WHERE {name} IS NOT NULL" for name in schema.TEXTS)
        with self._transaction():
            self._connection.execute(f"DELETE FROM texts WHERE number NOT IN ({used})")
        self._texts.clear()
        self._numbers.clear()
        self._connection.execute("VACUUM")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def flaws(self) -> list[str]:
        """What SQLite finds wrong with the file, indexes beside what they index; nothing where it is whole."""
        try:
            said = [str(text) for (text,) in self._connection.execute("PRAGMA integrity_check(8)")]
        except sqlite3.DatabaseError as error:
            return [str(error)]
        return said if said != ["ok"] else []

    def _lastingly(self, write: Callable[[], T]) -> T:
        """What ``write`` returns, in a transaction; again in the new file, if another process has set this one aside. Raises
        DatabaseUnusable."""
        while True:
            try:
                with self._transaction():
                    result = write()
            except sqlite3.OperationalError as error:  # locked, for as long as we wait
                raise DatabaseUnusable(
                    f"{self.name}: {error} by another process for {PATIENCE:.0f} s; end what holds it, and go on: what was recorded before is kept"
                ) from error
            if not self._is_set_aside():
                return result
            successor = Database.for_writing(Path(self.name))
            self._connection.close()
            self._connection, self._tables, self._file = successor._connection, successor._tables, successor._file
            self._texts.clear()
            self._numbers.clear()

    def _is_set_aside(self) -> bool:
        """Whether the file that this was opened on no longer bears its name."""
        if self._file is None:
            return False
        with suppress(OSError):
            return _identity(Path(self.name)) != self._file
        return True

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; what sqlite-utils does inside are savepoints of it. Raises DatabaseUnusable where the disk is full or
        what was opened cannot be written."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._numbers.clear()
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and "locked" not in str(error):
                raise DatabaseUnusable(
                    f"{self.name}: {error}; free some space or make it writable; what was recorded before is kept"
                ) from error
            raise

    def _insert(self, measurements: Iterable[tuple[Measurement, bool]]) -> int:
        """Append rows and the texts they name; how many rows were new."""
        rows = [schema.row(m, local) for m, local in measurements]
        first, race = schema.COLUMNS.index(schema.TEXTS[0]), schema.COLUMNS.index(schema.RACE)
        once = {text for row in rows for text in row[first:race]}
        once |= {row[race] for row in rows if len(row[race] or "") > schema.LONGEST_INLINE}
        self._learn(once - {None})
        for row in rows:
            row[first:race] = map(self._numbers.get, row[first:race])
            row[race] = self._numbers.get(row[race], row[race])
        before = self._connection.total_changes
        self._tables.insert("recorded", schema.COLUMNS, rows)
        return self._connection.total_changes - before

    def _learn(self, texts: Iterable[str]) -> None:
        """Add the texts that are not there, and know the number of each."""
        keys = {text: schema.key(text) for text in texts if text not in self._numbers}
        content = {key: text for text, key in keys.items()}
        self._tables.insert("texts", ("key", "content"), content.items())
        each, numbers = iter(content), dict[int, int]()
        while portion := list(islice(each, AT_ONCE)):
            marks = ", ".join("?" * len(portion))
            numbers.update(
                self._connection.execute(f"SELECT key, number FROM texts WHERE key IN ({marks})", portion).fetchall()
            )
        self._numbers.update((text, numbers[key]) for text, key in keys.items())

    def __enter__(self) -> Database:
        return self


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
