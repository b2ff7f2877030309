"""The database: records measurements, derives winners, reads layers. The only file that imports sqlite_utils."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from elsa_tune import places, space
from elsa_tune.device import RUNGS, Device
from elsa_tune.errors import BadMeasurements, DatabaseUnusable, ElsaTuneError
from elsa_tune.measurement import STAGES, STATUSES, Measurement, Winner
from elsa_tune.problem import Problem

SCHEMA_VERSION = 1
PATIENCE = 30.0
"""Seconds that a writer waits for another to let go of the database."""
TIED = 0.98
"""Within this share of the best ratio, or with overlapping intervals, variants are tied."""

_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "ceph", "9p", "fuse.sshfs"}

_COLUMNS = {
    "id": str, "device": str, "family": str, "problem": str, "variant": str, "digest": str, "stage": str, "status": str,
    "reason": str, "error": float, "constant": float, "seconds": float, "ratio": float, "ratio_low": float,
    "ratio_high": float, "samples": str, "incumbent": str, "incumbent_samples": str, "resources": str,
    "provenance": str, "created": float,
}  # fmt: skip

# The newest final measurement of each variant counts. A generated variant must beat SDPA beyond its interval. Among
# variants tied with the best, the smaller error wins, then fewer stack accesses, then the spelling.
_WINNERS = f"""
WITH latest AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY device, problem, variant ORDER BY created DESC, id) AS age
  FROM measurements WHERE status = 'ok' AND stage = 'final'
), eligible AS (
  SELECT * FROM latest WHERE age = 1 AND (variant LIKE 'sdpa.%' OR ratio_low > 1)
), ranked AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY device, problem ORDER BY ratio DESC, id) AS place FROM eligible
), tied AS (
  SELECT r.*, ROW_NUMBER() OVER (
    PARTITION BY r.device, r.problem
    ORDER BY r.error, COALESCE(json_extract(r.resources, '$.hot_spills'), 0), r.variant
  ) AS choice
  FROM ranked r JOIN ranked best ON best.device = r.device AND best.problem = r.problem AND best.place = 1
  WHERE r.ratio >= {TIED} * best.ratio OR r.ratio_high >= best.ratio_low
)
SELECT {", ".join(_COLUMNS)} FROM tied WHERE choice = 1
"""


def _on_network(path: Path) -> bool:
    """Whether the path lies on a file system shared by hosts, where SQLite's write-ahead log does not work."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    inside = [(len(where), kind) for where, kind in mounts if str(path.resolve()).startswith(where.rstrip("/") + "/")]
    return bool(inside) and max(inside)[1] in _NETWORK_FILE_SYSTEMS


class Database:
    """Append-only measurements and the view of winners over them."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.name = name
        self._connection = connection
        self._connection.row_factory = sqlite3.Row

    @property
    def _table(self) -> Any:
        import sqlite_utils  # only writers need it, so that dispatch starts without

        return sqlite_utils.Database(self._connection)["measurements"]

    @classmethod
    def for_writing(cls, path: Path | None = None) -> Database:
        """Open or create; a corrupt file is set aside first. Raises DatabaseUnusable."""
        path = path or places.database()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                return cls._open(path)
            except sqlite3.OperationalError as error:
                # SQLite never waits for a lock in the way of a change of journal mode, so this does.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise DatabaseUnusable(
                        f"{path}: {error}; make it writable, close what locks it, or set ELSA_TUNE_HOME to another folder"
                    ) from error
                time.sleep(0.02)
            except sqlite3.DatabaseError:
                set_aside(path)
            except OSError as error:
                raise DatabaseUnusable(f"{path}: {error}; set ELSA_TUNE_HOME to a writable folder") from error

    @classmethod
    def _open(cls, path: Path) -> Database:
        connection = sqlite3.connect(path, timeout=PATIENCE)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise DatabaseUnusable(
                    f"{path} was written by a newer elsa-tune (format {version}, this one reads {SCHEMA_VERSION}); upgrade"
                )
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            connection.execute(f"PRAGMA journal_mode = {'DELETE' if _on_network(path) else 'WAL'}")
            connection.execute("PRAGMA synchronous = FULL")
            database = cls(connection, str(path))
            database._create()
            return database
        except BaseException:
            connection.close()
            raise

    @classmethod
    def for_reading(cls, path: Path) -> Database:
        """Open without ever writing or waiting long. Raises DatabaseUnusable."""
        for options in ("mode=ro", "mode=ro&immutable=1"):
            try:
                connection = sqlite3.connect(
                    f"{path.resolve().as_uri()}?{options}", uri=True, timeout=0.2, check_same_thread=False
                )
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                connection.execute("SELECT 1 FROM winners LIMIT 1")
            except sqlite3.OperationalError as error:
                failure: Exception = error
                if "locked" in str(error) or "no such table" in str(error):
                    break
                continue
            except sqlite3.DatabaseError as error:
                failure = error
                break
            if version > SCHEMA_VERSION:
                raise DatabaseUnusable(
                    f"{path} is of format {version}, this version reads {SCHEMA_VERSION}; upgrade elsa-tune"
                )
            return cls(connection, str(path))
        raise DatabaseUnusable(f"{path}: {failure}; `elsa-tune doctor` says more") from failure

    @classmethod
    def in_memory(cls, measurements: Iterable[Measurement], name: str) -> Database:
        """A database of the given measurements."""
        database = cls(sqlite3.connect(":memory:", check_same_thread=False), name)
        database._create()
        for measurement in measurements:
            database.record(measurement)
        return database

    def _create(self) -> None:
        self._table.create(_COLUMNS, pk="id", if_not_exists=True)
        self._table.create_index(["device", "family", "problem"], if_not_exists=True)
        with self._connection:
            self._connection.execute(f"CREATE VIEW IF NOT EXISTS winners AS {_WINNERS}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def record(self, measurement: Measurement) -> None:
        """Append; the same measurement twice is one row. Durable when this returns."""
        with self._connection:
            self._table.insert(measurement.as_row(), pk="id", ignore=True)

    def measurements(self, **equal: str) -> list[Measurement]:
        """Measurements whose columns equal the given values, oldest first."""
        return [Measurement.from_row(row) for row in self._rows("measurements", equal)]

    def winners(self, **equal: str) -> list[Measurement]:
        """The winning measurement of each device and problem, of those whose columns equal the given values."""
        return [Measurement.from_row(row) for row in self._rows("winners", equal)]

    def _rows(self, table: str, equal: dict[str, str]) -> Iterator[dict[str, Any]]:
        unknown = set(equal) - set(_COLUMNS)
        if unknown:
            raise ElsaTuneError(f"measurements have no column {sorted(unknown)[0]!r}; they have {', '.join(_COLUMNS)}")
        where = " AND ".join(f"{column} = ?" for column in equal) or "1"
        rows = self._connection.execute(
            f"SELECT * FROM {table} WHERE {where} ORDER BY created, id", list(equal.values())
        )
        return (dict(row) for row in rows)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


listeners: list[Callable[[], None]] = []
"""Called when this process has finished changing the database."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A source of winners: its database, or why it cannot be read."""

    name: str
    place: str
    database: Database | None
    problem: str = ""


def read_lines(path: Path) -> Iterator[Measurement]:
    """Measurements from JSON lines, as `cache/` ships them."""
    for line in path.read_text().splitlines():
        if line.strip():
            yield Measurement.from_row(json.loads(line))


@dataclass(frozen=True, slots=True)
class Imported:
    """What reading a file of measurements came to: those taken, and how many were left out for each reason."""

    taken: int
    refused: dict[str, int]


def import_lines(path: Path, database: Database) -> Imported:
    """Record the measurements of a file of JSON lines that are sound; count the others by reason. The same line twice is one
    row. Raises BadMeasurements for a file that cannot be read."""
    refused: dict[str, int] = {}
    taken = 0
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadMeasurements(f"{path}: {error}; give the results.jsonl that a kit wrote") from error
    for line in filter(str.strip, lines):
        try:
            database.record(replace(sound(json.loads(line)), stage="trial"))  # nobody else's final makes a winner here
            taken += 1
        except (ValueError, KeyError, TypeError, RecursionError, ElsaTuneError) as error:
            reason = str(error)[:160]
            refused[reason] = refused.get(reason, 0) + 1
    return Imported(taken, refused)


_TEXTS = ("digest", "reason", "incumbent")
_NUMBERS = ("error", "constant", "seconds", "ratio", "ratio_low", "ratio_high")


def sound(row: Any) -> Measurement:
    """A measurement from a row that somebody else wrote. Raises ValueError, KeyError, TypeError or ElsaTuneError where a
    field is missing, of another type, or not a number that a clock can give."""
    if not isinstance(row, dict):
        raise ValueError("a line is no mapping")
    known: dict[str, Any] = {"device": str(Device.parse(row["device"])), "problem": str(Problem.parse(row["problem"]))}
    known["variant"] = str(space.parse(row["variant"]))
    for name, allowed in (("status", STATUSES), ("stage", STAGES)):
        known[name] = row.get(name, allowed[0])
        if known[name] not in allowed:
            raise ValueError(f"{name} is none of {', '.join(allowed)}")
    for name in _TEXTS:
        known[name] = row.get(name, "")
        if not isinstance(known[name], str) or len(known[name]) > 1000:
            raise ValueError(f"{name} is no short text")
    for name in _NUMBERS:
        known[name] = _number(row.get(name), name)
    known["created"] = _number(row.get("created"), "created") or 0.0
    for name in ("samples", "incumbent_samples"):
        known[name] = tuple(_number(x, name) for x in json.loads(row.get(name, "[]")))
    for name in ("resources", "provenance"):
        known[name] = json.loads(row.get(name, "{}"))
        if not isinstance(known[name], dict) or not all(isinstance(x, str | int | float) for x in known[name].values()):
            raise ValueError(f"{name} is no mapping of numbers and words")
    return Measurement(**known)


def _number(x: Any, name: str) -> float | None:
    """A finite number of ordinary size, or None."""
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x < 1e12:
        raise ValueError(f"{name} is no number from 0 on")
    return float(x)


def write_lines(measurements: Iterable[Measurement], path: Path) -> None:
    """Write measurements as sorted JSON lines, so that equal content is equal bytes and a change is a readable diff."""
    rows = sorted((m.as_row() for m in measurements), key=lambda row: (row["problem"], row["variant"], row["id"]))
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def layers() -> list[Layer]:
    """The user's own database, then what this package ships; an unreadable one says why and the next serves."""
    own = places.database()
    found = []
    if own.exists():
        try:
            found.append(Layer("own", str(own), Database.for_reading(own)))
        except (DatabaseUnusable, OSError) as error:
            found.append(Layer("own", str(own), None, str(error)))
    else:
        found.append(Layer("own", str(own), None, "nothing is tuned yet; run elsa-tune"))
    shipped = places.data("cache")
    try:
        rows = [m for path in sorted(shipped.glob("*.jsonl")) for m in read_lines(path)]
        found.append(Layer("shipped", str(shipped), Database.in_memory(rows, str(shipped))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.append(Layer("shipped", str(shipped), None, f"{error}; reinstall elsa-tune"))
    return found


def slower_than_sdpa(device: Device, found: Iterable[Layer]) -> set[tuple[str, str]]:
    """(problem, variant) pairs that a final on this very device found slower than torch's SDPA."""
    return {
        (m.problem, m.variant)
        for layer in found
        if layer.database
        for m in layer.database.measurements(device=str(device), stage="final", status="ok")
        if m.ratio is not None and m.ratio < 1
    }


def known_winners(device: Device, found: Iterable[Layer], **equal: str) -> list[Winner]:
    """Winners for ``device`` and its kin, best rung first, own before shipped; one per problem, variant and rung."""
    winners = []
    for order, layer in enumerate(found):
        if layer.database is None:
            continue
        for m in layer.database.winners(**equal):
            rung = device.kinship(Device.parse(m.device))
            if rung:
                winners.append((RUNGS.index(rung), order, Winner(m.problem, m.variant, m, layer.name, rung)))
    return [winner for _, _, winner in sorted(winners, key=lambda w: w[:2])]
